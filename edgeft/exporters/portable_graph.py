"""What edgeft changes in optimum's graphs, in ONNX's own operators."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

ONE_FILE_BYTES = 2**31 - 2**20  # protobuf's limit, with room for the graph
KEEP = "num_logits_to_keep"


def keep_last(path: Path) -> None:
    """Give a float graph the input ``num_logits_to_keep``: how many last positions have logits.

    The name is the one that programs such as transformers.js know. It has a default, 0 for all of
    them, so a program that does not know it need not feed it.
    """
    import numpy as np

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    head = made_by["logits"]
    while head.op_type != "MatMul":  # what may follow: Gemma's soft cap
        head = made_by[head.input[0]]
    graph.input.append(helper.make_tensor_value_info(KEEP, TensorProto.INT64, []))
    for name, value in ((KEEP, 0), ("keep_axis", [1]), ("keep_first", [0]), ("keep_end", [2**62])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    at = list(graph.node).index(head)
    for node in reversed(
        [
            helper.make_node("Neg", [KEEP], ["keep_negative"]),
            helper.make_node("Unsqueeze", ["keep_negative", "keep_first"], ["keep_start"]),
            helper.make_node(
                "Slice", [head.input[0], "keep_start", "keep_end", "keep_axis"], ["keep_hidden"]
            ),
        ]
    ):
        graph.node.insert(at, node)
    head.input[0] = "keep_hidden"
    onnx.save(model, path)


def tie(path: Path) -> None:
    """Look tokens up in the head's 8-bit matrix, where the embedding is the same one in 32 bits.

    The head has a scale for each token, so the embedding is as exact as the head.
    """
    graph = (whole := onnx.load(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    embed = next(n for n in graph.node if n.op_type == "Gather" and n.input[1] == "input_ids")
    vocabulary = next(t.dims[0] for t in graph.initializer if t.name == embed.input[0])
    head = next(
        node.input[1]
        for node in graph.node
        if node.op_type == "MatMulInteger"
        and any(t.name == node.input[1] and t.dims[1] == vocabulary for t in graph.initializer)
    )
    scale, zero = (head.removesuffix("_quantized") + end for end in ("_scale", "_zero_point"))
    if missing := {scale, zero} - weights:
        raise ValueError(f"the quantizer names no {min(missing)}")
    last = helper.make_tensor("embed_last", TensorProto.INT64, [1], [-1])
    graph.initializer.append(last)
    at = list(graph.node).index(embed)
    graph.node.remove(embed)
    for node in reversed(
        [
            helper.make_node("Gather", [head, "input_ids"], ["embed_columns"], axis=1),
            helper.make_node("Transpose", ["embed_columns"], ["embed_rows"], perm=[1, 2, 0]),
            helper.make_node("Cast", ["embed_rows"], ["embed_float"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [zero, "input_ids"], ["embed_zeros"]),
            helper.make_node("Unsqueeze", ["embed_zeros", last.name], ["embed_zero"]),
            helper.make_node("Cast", ["embed_zero"], ["embed_zero_float"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["embed_float", "embed_zero_float"], ["embed_integer"]),
            helper.make_node("Gather", [scale, "input_ids"], ["embed_scales"]),
            helper.make_node("Unsqueeze", ["embed_scales", last.name], ["embed_scale"]),
            helper.make_node("Mul", ["embed_integer", "embed_scale"], [embed.output[0]]),
        ]
    ):
        graph.node.insert(at, node)
    graph.initializer.remove(next(t for t in graph.initializer if t.name == embed.input[0]))
    for old in path.parent.glob("model.onnx*"):
        old.unlink()
    external = sum(len(tensor.raw_data) for tensor in graph.initializer) > ONE_FILE_BYTES
    onnx.save(whole, path, save_as_external_data=external, location=f"{path.name}_data")
