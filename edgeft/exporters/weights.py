"""How many bytes of weights decoding one token reads: all but what is only looked up in."""

from __future__ import annotations

from pathlib import Path


def bytes_per_token(artifact: Path) -> int:
    """Of a GGUF file, a folder with one and perhaps an adapter, or a folder with an ONNX graph.

    An embedding that is the output matrix too is read whole; one that is not gives a row a token.

    Args:
        artifact: as in a bundle.
    """
    if artifact.is_file():
        return _gguf(artifact)
    parts = sorted(artifact.glob("*.gguf"))
    return sum(map(_gguf, parts)) if parts else _onnx(artifact)


def _gguf(path: Path) -> int:
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def _onnx(folder: Path) -> int:
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    total = 0
    for path in sorted(folder.glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        looked_up = {
            node.input[0]
            for node in graph.node
            if node.op_type in ("Gather", "GatherBlockQuantized")
        }
        multiplied = {
            name
            for node in graph.node
            if not node.op_type.startswith("Gather")
            for name in node.input
        }
        for weight in graph.initializer:
            if weight.name in looked_up - multiplied:
                continue
            if uses_external_data(weight):
                total += ExternalDataInfo(weight).length or 0
            else:
                total += weight.ByteSize()
    return total
