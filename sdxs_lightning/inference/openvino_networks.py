"""Backend openvino: an export on OpenVINO."""

from __future__ import annotations

import sys
from functools import cache, lru_cache
from typing import Any

import numpy as np

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.inference.graph_networks import Arrays, GraphNetworks, unloadable
from sdxs_lightning.inference.model_folder import ModelFolder

FILE = "openvino_model.xml"


class OpenVinoNetworks(GraphNetworks):
    """Networks of an OpenVINO export; a network is compiled when it is first needed.

    Args:
        model: the export's folder.
        device: "auto" and "cpu" for the CPU, or a device of OpenVINO ("GPU", "NPU").
        threads: of one network; None is one for each core.
        static_shapes: whether to compile a network anew for each shape, which runs faster and starts later.

    Raises:
        UserError: without OpenVINO, or for a device that it lacks.
    """

    def __init__(
        self,
        model: ModelFolder,
        device: str = "auto",
        threads: int | None = None,
        static_shapes: bool = False,
    ) -> None:
        super().__init__(model)
        self._core = openvino_core()
        self._device = "CPU" if device in ("auto", "cpu") else device
        if self._device.split(".")[0] not in {one.split(".")[0] for one in self._core.available_devices}:
            known = ", ".join(self._core.available_devices)
            raise UserError(
                f"`device` is '{device}', and this OpenVINO has {known}; give auto or one of them."
            )
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        if model.manifest is not None and model.manifest["dtype"] == "fp32" and self._device == "CPU":
            self._settings["INFERENCE_PRECISION_HINT"] = "f32"  # processors with bf16 units would use them
        self._static = static_shapes
        self._compiled = lru_cache(maxsize=32)(self._compile)

    def run(self, part: str, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        shapes = tuple((name, tuple(one.shape)) for name, one in inputs.items()) if self._static else ()
        request = self._compiled(part, shapes)
        outputs = request.infer(dict(inputs))
        # Copies, since the next call of the same request writes to the same memory.
        return {port.get_any_name(): np.array(value) for port, value in outputs.items()}

    def _compile(self, part: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Any:
        file = self._model.path / part / FILE
        try:
            network = self._core.read_model(file)
        except Exception as error:
            raise unloadable(file, error) from error
        if shapes:
            network.reshape({name: list(shape) for name, shape in shapes})
        return self._core.compile_model(network, self._device, self._settings).create_infer_request()


@cache
def openvino_core() -> Any:
    """The process's one Core, which lives as long as the process.

    A Core that loads the CPU's plugin gives the main thread a stack for signal handlers, and puts the one before back when it
    ends. Of two that end in the order of their creation the second puts back one that is gone, and the next signal with a
    handler (a child that ends, SIGTERM, a timer) kills the process.

    Raises:
        UserError: without OpenVINO.
    """
    return import_openvino().Core()


def import_openvino() -> Any:
    """The module.

    Raises:
        UserError: without it.
    """
    # With this package OpenVINO and NNCF report imports and conversions to their maker, from forked processes.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            "the backend openvino needs OpenVINO; install it with `uv sync --extra openvino` or pip install "
            "sdxs-lightning[openvino]."
        ) from error
    return openvino
