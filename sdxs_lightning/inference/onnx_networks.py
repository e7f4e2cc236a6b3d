"""Backend onnx: an export on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.inference.graph_networks import Arrays, GraphNetworks, unloadable
from sdxs_lightning.inference.model_folder import ModelFolder

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""Execution providers by device."""


class OnnxNetworks(GraphNetworks):
    """Networks of an ONNX export; a session starts when its network is first needed.

    Args:
        model: the export's folder.
        device: "auto" (CUDA where ONNX Runtime has it), "cpu", "cuda" or "tensorrt".
        providers: execution providers in their order, instead of the device's.
        threads: of one network; None is one for each core.

    Raises:
        UserError: without ONNX Runtime, or for a provider that it lacks.
    """

    def __init__(
        self,
        model: ModelFolder,
        device: str = "auto",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(model)
        self._runtime = import_onnxruntime()
        self._providers = list(providers or _providers(device, self._runtime.get_available_providers()))
        missing = set(self._providers) - set(self._runtime.get_available_providers())
        if missing:
            found = ", ".join(self._runtime.get_available_providers())
            wanted = ", ".join(sorted(missing))
            raise UserError(
                f"this ONNX Runtime has no {wanted}, but {found}; give `device` cpu, or install onnxruntime-gpu."
            )
        self._threads = threads
        self._session = lru_cache(maxsize=None)(self._start)

    def run(self, part: str, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        session = self._session(part)
        names = [one.name for one in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def _start(self, part: str) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3  # it warns about each initializer that it folds
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        file = self._model.path / part / "model.onnx"
        try:
            return self._runtime.InferenceSession(str(file), options, providers=self._providers)
        except Exception as error:
            raise unloadable(file, error) from error


def import_onnxruntime() -> Any:
    """The module.

    Raises:
        UserError: without it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "the backend onnx needs ONNX Runtime; install it with `uv sync --extra onnx` or pip install sdxs-lightning[onnx]."
        ) from error
    return onnxruntime


def _providers(device: str, available: Sequence[str]) -> tuple[str, ...]:
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"][0] in available else "cpu"
    if device not in PROVIDERS:
        raise UserError(
            f"`device` is '{device}', but for `backend` onnx must be auto, {', '.join(PROVIDERS)}."
        )
    return PROVIDERS[device]
