"""The file that many QLoRA tutorials lead to: a run's adapter merged into the model loaded in 4 bits.

    python benchmarks/merge_4bit.py RUN theirs-q8_0.gguf

bitsandbytes loads the base in NF4, PEFT merges into that, and what comes out is written in 16 bits
and quantized once more, to Q8_0. RUN is one that left an adapter; ``edgeft export RUN --file
theirs-q8_0.gguf --target gguf-f16`` puts the file beside edgeft's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeft import recipe
from edgeft.exporters import gguf, merge, quantize
from edgeft.stages import Run


def merged(base: Path, adapter: Path, out: Path) -> None:
    """Write the model folder ``out``, whose linear layers went through NF4 after the merge."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from edgeft.train.methods import nf4

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4(torch.bfloat16))
    whole = PeftModel.from_pretrained(model, adapter).merge_and_unload().dequantize()
    whole.to(torch.float16).save_pretrained(out)
    merge.copy_tokenizer(base, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    run = Run(asked.run, recipe.load(asked.run / "recipe.yaml"), {})
    with TemporaryDirectory() as place:
        folder, whole = Path(place) / "model", Path(place) / "model.gguf"
        merged(run.folder("base"), run.adapter, folder)
        gguf.convert(folder, whole, "theirs")
        quantize.quantize(whole, asked.out, "Q8_0")


if __name__ == "__main__":
    main()
