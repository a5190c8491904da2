"""Importance matrices: by how much each column of a weight matters to the products it is in.

The statistics are those of llama.cpp's llama-imatrix, in its GGUF format: for every matrix of a
block the sum over tokens of the squared input, by column, and the number of tokens. As there, the
head and the embedding have none. llama-imatrix cuts a text file into chunks; here the tokens are
the run's training questions with their solutions, each alone, as the device will see questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import child, model
from edgeft.errors import UserError
from edgeft.exporters.gguf import ARCHITECTURES, name_map
from edgeft.prompts import Item, read_items

QUESTIONS = 256  # llama-imatrix is commonly run on as many tokens as these have, about 30,000
TOKENS = 1 << 16  # where questions are long, fewer of them
_BATCH = 8


@dataclass(frozen=True)
class Statistics:
    """Of one weight's input.

    Attributes:
        squares: sum over tokens of x², float32 [columns].
        tokens: how many there were.
    """

    squares: Any
    tokens: int


@dataclass(frozen=True)
class Matrix:
    """An importance matrix, read from a file.

    Attributes:
        columns: mean over tokens of x² by the weight's name, float32 [columns] (of a tensor of
            several experts [experts * columns]).
        datasets: what it was made from.
        chunks: texts that it was made from.
    """

    columns: Mapping[str, Any]
    datasets: Sequence[str]
    chunks: int

    def blocks(self) -> int:
        """One more than the number of the last block."""
        return block_count(self.columns)


def block_count(names: Iterable[str]) -> int:
    """Blocks of a model with tensors of these names."""
    return max((int(n.split(".")[1]) for n in names if n.startswith("blk.")), default=-1) + 1


def check_supported(wanted: bool | str, folder: Path) -> None:
    """Refuse, before any training, a matrix that could not be made or does not fit.

    Args:
        wanted: as a target's settings have it.

    Raises:
        UserError: with the reason.
    """
    config = model.config(folder)
    architecture = (config.get("architectures") or ["none"])[0]
    if isinstance(wanted, str):
        matrix = read(Path(wanted).expanduser())
        expected = config.get("num_hidden_layers")  # other architectures have other names for it
        if expected is not None and matrix.blocks() != expected:
            raise UserError(
                f"{wanted} is another model's importance matrix: it has {matrix.blocks()} "
                f"blocks, {folder} has {expected}"
            )
    elif wanted and architecture not in ARCHITECTURES:
        raise UserError(
            f"cannot make an importance matrix for {architecture}, whose tensors' GGUF names are "
            f"not known here (known: {', '.join(ARCHITECTURES)}); make one with llama-imatrix "
            'and name it: imatrix = "FILE.gguf"'
        )


def draw(items: Sequence[Item], seed: int) -> list[list[int]]:
    """At most :data:`QUESTIONS` of the training questions, and about :data:`TOKENS` tokens.

    Returns:
        Token ids, prompt and solution together.
    """
    drawn: list[list[int]] = []
    for item in random.Random(seed).sample(list(items), len(items)):
        if len(drawn) == QUESTIONS or sum(map(len, drawn)) >= TOKENS:
            break
        drawn.append([*item.prompt, *item.gold])
    return drawn


def measure(
    folder: Path,
    texts: Sequence[Sequence[int]],
    dtype: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Statistics]:
    """Run a model folder over texts and watch the inputs of its matrices.

    Args:
        texts: token ids, at least one text of at least one; each is read alone.
        dtype: what the model computes in, as train.dtype has it: ``auto`` is bfloat16 where the
            hardware multiplies it. Squares are added up in float32, batches in float64.
        progress: is told ``(texts, all)``.

    Returns:
        Statistics by the weight's GGUF name, every matrix of every block.

    Raises:
        UserError: a matrix has no GGUF name, or an input is not finite.
    """
    import torch

    opened = _open(folder, dtype)
    sums: dict[str, Any] = {}
    last: list[Any] = [None, None]  # query, key and value have one input: it is squared once
    real: Any = None  # float32 [texts * longest]: 1 at a token, 0 at padding

    def watch(name: str) -> Callable[[Any, Any], None]:
        def hook(_: Any, inputs: Any) -> None:
            if last[0] is not inputs[0]:
                squares = inputs[0].float().square().flatten(0, 1)  # [texts * longest, columns]
                last[:] = inputs[0], (real @ squares).double().cpu()
            sums[name] = sums.get(name, 0) + last[1]

        return hook

    for module, name in _names(folder, opened).items():
        opened.get_submodule(module).register_forward_pre_hook(watch(name))
    ordered = sorted(texts, key=len)
    for at in range(0, len(ordered), _BATCH):
        batch = ordered[at : at + _BATCH]
        # Padded on the right, where in a causal model nothing that counts sees it.
        ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.long, device=opened.device)
        there = torch.zeros(ids.shape, device=opened.device)
        for row, text in enumerate(batch):
            ids[row, : len(text)] = torch.tensor(text)
            there[row, : len(text)] = 1
        real = there.flatten()
        with torch.inference_mode():
            opened(input_ids=ids, use_cache=False, logits_to_keep=1)
        progress(min(at + _BATCH, len(ordered)), len(ordered))
    if odd := [name for name, squares in sums.items() if not squares.isfinite().all()]:
        raise UserError(f"{folder}: the input of {odd[0]} is not finite, nothing can be measured")
    tokens = sum(map(len, ordered))
    return {name: Statistics(sums[name].float().numpy(), tokens) for name in sorted(sums)}


def _open(folder: Path, dtype: str) -> Any:
    import torch
    import transformers

    from edgeft.train.methods import training_dtype

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=training_dtype(dtype), local_files_only=True, use_safetensors=True
    )
    return opened.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _names(folder: Path, opened: Any) -> dict[str, str]:
    """Of every linear layer, the head aside: its name in transformers to its weight's in GGUF."""
    import torch

    known = name_map(model.config(folder))
    head = opened.get_output_embeddings()
    names = {}
    for module, layer in opened.named_modules():
        if not isinstance(layer, torch.nn.Linear) or layer is head:
            continue
        name = known.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"{folder}: tensor {module}.weight has no GGUF name")
        names[module] = name
    return names


def write(
    out: Path, statistics: Mapping[str, Statistics], dataset: str, chunks: int, chunk_size: int
) -> None:
    """Write llama-imatrix's GGUF format, which ``llama-quantize --imatrix`` reads.

    Args:
        dataset: what the file says it was made from.
        chunks: how many texts that was.
        chunk_size: tokens in each; of questions the mean.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(out, "imatrix")
    del writer.kv_data[0]["general.architecture"]  # llama-imatrix writes none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, found in sorted(statistics.items()):
        writer.add_tensor(f"{name}.in_sum2", found.squares.astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[found.tokens]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> Matrix:
    """An importance matrix in llama-imatrix's GGUF format, by whichever program.

    Experts that no token came to have ones, as llama-quantize takes them.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    import numpy as np
    from gguf import GGUFReader

    if not path.is_file():
        raise UserError(f"no such importance matrix: {path}")
    other = UserError(
        f"{path} is no importance matrix in GGUF format: make one with llama-imatrix -o NAME.gguf"
    )
    try:
        reader = GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise other from error
    names = [n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")]
    if facts.get("general.type") != "imatrix" or not names:
        raise other
    columns = {}
    for name in names:
        if (counts := tensors.get(f"{name}.counts")) is None:
            raise other
        per_expert = counts.reshape(-1, 1)
        squares = tensors[f"{name}.in_sum2"].reshape(len(per_expert), -1)
        mean = np.where(per_expert > 0, squares / np.maximum(per_expert, 1), 1)
        columns[name] = np.ascontiguousarray(mean.ravel(), np.float32)
    return Matrix(columns, facts.get("imatrix.datasets", []), facts.get("imatrix.chunk_count", 0))


def _work(request: Any, emit: Callable[..., None]) -> None:
    texts = draw(read_items(Path(request["questions"])), request["seed"])
    if not texts:
        raise UserError("an importance matrix is made from training questions and there are none")
    statistics = measure(
        Path(request["folder"]),
        texts,
        request.get("dtype", "auto"),
        lambda done, total: emit("progress", done=done, total=total),
    )
    mean = sum(map(len, texts)) // len(texts)
    write(Path(request["out"]), statistics, request["dataset"], len(texts), mean)


if __name__ == "__main__":
    child.serve(_work)
