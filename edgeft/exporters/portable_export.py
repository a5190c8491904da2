"""The child of :mod:`edgeft.exporters.portable`: runs in optimum's environment, on transformers 4."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UserError


def export(folder: Path, out: Path, precision: str) -> None:
    """Write ``out/model.onnx`` from a model folder whose configuration is for transformers 4.

    Raises:
        UserError: optimum is not installed here, or fails.
    """
    try:
        import onnxruntime.quantization
        import transformers
        from optimum.exporters.onnx import main_export

        from edgeft.exporters import portable_graph
    except ImportError as error:
        raise UserError(f"optimum's environment is not complete: {error}") from error
    warnings.filterwarnings("ignore")  # the tracer's, about what is constant
    logging.getLogger().setLevel(logging.ERROR)
    whole = out if precision == "fp32" else out / "fp32"
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        main_export(
            str(folder),
            output=whole,
            task="text-generation-with-past",
            device="cpu",
            dtype="fp32",
            framework="pt",
            library_name="transformers",
            local_files_only=True,
            do_validation=False,  # edgeft compares the logits itself
            # It shares a tied embedding with the head, through a Transpose: then the head would be
            # no constant to quantize, the largest matrix of all and read for every token.
            no_post_process=precision != "fp32",
            custom_onnx_configs=_positions(config),
        )
        source = whole / "model.onnx"
        portable_graph.keep_last(source)
        if precision == "int8":
            size = sum(path.stat().st_size for path in whole.glob("model.onnx*"))
            onnxruntime.quantization.quantize_dynamic(
                source,
                out / "model.onnx",
                op_types_to_quantize=["MatMul"],
                per_channel=True,  # one scale for each of a weight's columns
                # Unsigned like the activations: the product of unsigned and signed bytes overflows
                # its 16 bits on an x86 CPU without VNNI, and nothing is left of the model.
                weight_type=onnxruntime.quantization.QuantType.QUInt8,
                extra_options={"WeightSymmetric": True},
                use_external_data_format=size > portable_graph.ONE_FILE_BYTES,
            )
            if config.tie_word_embeddings:
                portable_graph.tie(out / "model.onnx")
    except Exception as error:  # whatever a library raises, it is about this model
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"optimum could not export this model: {reason}") from error


def _positions(config: Any) -> dict[str, Any] | None:
    """Position ids as an input where optimum leaves them out: without them no row can be padded."""
    if config.model_type != "gemma3_text":
        return None
    from optimum.exporters.onnx.config import TextDecoderWithPositionIdsOnnxConfig
    from optimum.exporters.onnx.model_configs import Gemma3TextOnnxConfig

    class Gemma3(TextDecoderWithPositionIdsOnnxConfig, Gemma3TextOnnxConfig):  # type: ignore[misc]
        pass

    return {"model": Gemma3(config, "text-generation", use_past=True, use_past_in_inputs=True)}


def _work(request: Any, emit: Callable[..., None]) -> None:
    export(Path(request["folder"]), Path(request["out"]), request["precision"])


if __name__ == "__main__":
    child.serve(_work)
