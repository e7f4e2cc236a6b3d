"""Writes a network as an ONNX file; weights above 1.5 GB go into a file beside it, since protobuf ends at 2 GB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdxs_lightning.inference.exporting.graphs import Part

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""Oldest opset whose Resize and GroupNorm parts this graph needs; TensorRT 10, OpenVINO and ONNX Runtime Web read it."""
FILE, DATA = "model.onnx", "model.onnx_data"
INLINE_BYTES = 1_500_000_000
"""Weights up to here are inside the file: one file loads everywhere, ONNX Runtime Web included."""


@torch.no_grad()
def write_onnx(part: Part, folder: Path, inline_bytes: int = INLINE_BYTES) -> None:
    """Traces a network and writes model.onnx, with model.onnx_data for large ones.

    The graph is traced without weights; these are then written one by one, so that no second copy of a large network is ever
    in memory.

    Args:
        part: the network.
        folder: existing folder for the files.
        inline_bytes: largest size of weights inside the file.
    """
    import onnx

    traced = io.BytesIO()
    with warnings.catch_warnings():
        # "Converting a tensor to a Python boolean": the sizes checked there are traced as they should be, see graphs.py.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            part.module.eval(),
            tuple(part.inputs.values()),
            traced,  # type: ignore[arg-type]
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_axes={name: dict(axes) for name, axes in part.axes.items()},
            opset_version=OPSET,
            dynamo=False,
            export_params=False,
            do_constant_folding=False,  # it would rename the weights that it transposes; every runtime folds by itself
        )
    model = onnx.load_from_string(traced.getvalue())
    weights = {**dict(part.module.named_parameters()), **dict(part.module.named_buffers())}
    size = sum(one.numel() * one.element_size() for one in weights.values())
    _add_weights(model, weights, part, folder / DATA if size > inline_bytes else None)
    onnx.save_model(model, folder / FILE)


def _add_weights(
    model: onnx.ModelProto, weights: Mapping[str, Tensor], part: Part, data: Path | None
) -> None:
    """Turns the graph's inputs that are weights into initializers."""
    inputs = [one for one in model.graph.input if one.name in part.inputs]
    names = [one.name for one in model.graph.input if one.name not in part.inputs]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    if data is None:
        model.graph.initializer.extend(_initializer(name, weights[name]) for name in names)
        return
    with data.open("wb") as stream:
        for name in names:
            stream.write(b"\0" * (-stream.tell() % 4096))  # mapped into memory, weights begin at a page
            offset, values = stream.tell(), _bytes(weights[name])
            stream.write(values)
            tensor = _initializer(name, weights[name], fill=False)
            _point_to(tensor, data.name, offset, len(values))
            model.graph.initializer.append(tensor)


def _initializer(name: str, weight: Tensor, fill: bool = True) -> onnx.TensorProto:
    import onnx

    kinds: dict[torch.dtype, Any] = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.int64: onnx.TensorProto.INT64,
    }
    tensor = onnx.TensorProto(name=name, data_type=kinds[weight.dtype], dims=list(weight.shape))
    if fill:
        tensor.raw_data = _bytes(weight)
    return tensor


def _point_to(tensor: onnx.TensorProto, file: str, offset: int, length: int) -> None:
    import onnx

    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _bytes(weight: Tensor) -> bytes:
    return weight.detach().cpu().contiguous().numpy().tobytes()
