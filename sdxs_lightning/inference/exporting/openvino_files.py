"""Writes a network as OpenVINO IR."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.inference.exporting.graphs import Part
from sdxs_lightning.inference.exporting.onnx_files import FILE, write_onnx
from sdxs_lightning.inference.openvino_networks import FILE as IR_FILE
from sdxs_lightning.inference.openvino_networks import import_openvino, openvino_core

Precision = Literal["fp32", "fp16", "int8"]


def write_openvino(part: Part, folder: Path, precision: Precision) -> None:
    """Converts a network and writes openvino_model.xml and .bin.

    Inputs and outputs are float32 in every precision; "fp16" and "int8" are what weights are stored in. OpenVINO computes in
    float32; with "fp16" and "int8" in bf16, on a processor that has units for it. The way leads over ONNX, so that both
    runtimes have one trace, and the same names.

    Args:
        part: the network, float32.
        folder: existing folder for the files.
        precision: of the weights; int8 by NNCF, symmetric or not as it chooses for each channel.
    """
    openvino = import_openvino()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".onnx-") as temporary:
        write_onnx(part, Path(temporary))
        network = openvino_core().read_model(Path(temporary) / FILE)
        _name_ends_only(network)
        if precision == "int8":
            network = compressed(network)
        openvino.save_model(network, folder / IR_FILE, compress_to_fp16=precision != "fp32")


def _name_ends_only(network: Any) -> None:
    """Leaves names to inputs and outputs alone: where an operation before an output is dropped, it would get two."""
    ends = {one.get_any_name() for one in (*network.inputs, *network.outputs)}
    for operation in network.get_ops():
        for output in operation.outputs():
            output.get_tensor().set_names(output.get_names() & ends)


def compressed(network: Any) -> Any:
    """The network with weights in 8 bits, by NNCF.

    Raises:
        UserError: without NNCF.
    """
    import_openvino()
    from openvino.passes import ConstantFolding, Manager

    try:
        import nncf
    except ImportError as error:
        raise UserError(
            "int8 weights need NNCF; install it with `uv sync --extra openvino` or pip install sdxs-lightning[openvino]."
        ) from error
    nncf.set_log_level(30)
    # NNCF passes over weights that reach their product through a transposition, as ONNX has those of linear layers.
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(network)
    return nncf.compress_weights(network)
