"""Exports for ONNX Runtime and OpenVINO: equal to PyTorch for any batch and size, in optimum's layout, complete or absent."""

from __future__ import annotations

import builtins
import ctypes
import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.export_runtime import main
from sdxs_lightning.inference.exporting import export as exporting
from sdxs_lightning.inference.exporting import openvino_files
from sdxs_lightning.inference.exporting.export import _write_rest, export_runtime
from sdxs_lightning.inference.exporting.graphs import Adapted, Part, parts
from sdxs_lightning.inference.exporting.onnx_files import write_onnx
from sdxs_lightning.inference.exporting.openvino_files import write_openvino
from sdxs_lightning.inference.generator import OneStepGenerator
from sdxs_lightning.inference.model_folder import MANIFEST, ModelFolder
from sdxs_lightning.inference.openvino_networks import openvino_core
from tests.helpers.ranks.processes import in_ranks
from tests.helpers.students import KINDS, PROMPTS, SEEDS, condition, save_student

SIZES = [(32, 32), (24, 40), (48, 32), (40, 40)]
ROOT = Path(__file__).parents[2]
Students = Callable[[str], Path]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max()) / 2  # of pixels in [0, 1]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Students:
    """The folder of a student of KINDS with two stages: tracing takes most of the time, and grows with the network."""
    root = tmp_path_factory.mktemp("students")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            save_student(root, name, **KINDS[name], stages=2)  # type: ignore[arg-type]
        return root / name

    return folder


@pytest.fixture(scope="module")
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets exports of one network share its trace, which takes most of their time: one for ONNX, one on OpenVINO's way.

    A trace is a function of the module, its weights and the example inputs, which make its name here.
    """
    root = tmp_path_factory.mktemp("traces")

    def once(part: Part, folder: Path) -> None:
        digest = hashlib.sha256(f"{part.name} {part.module} {part.axes} {part.config}".encode())
        for name, tensor in [*part.module.state_dict().items(), *part.inputs.items()]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        trace = root / digest.hexdigest()
        if not trace.is_dir():
            trace.mkdir()
            write_onnx(part, trace)
        shutil.copytree(trace, folder, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exporting, "write_onnx", once)
        patched.setattr(openvino_files, "write_onnx", once)
        yield


@pytest.fixture(scope="module")
def exported(
    student: Students, tmp_path_factory: pytest.TempPathFactory, traced_once: None
) -> Callable[..., Path]:
    """An export with ControlNet and merged LoRA; made once."""
    root = tmp_path_factory.mktemp("exports")

    def folder(name: str, runtime: Any, precision: Any = "fp32", adapted: bool = True) -> Path:
        out = root / f"{name}-{runtime}-{precision}-{adapted}"
        if not out.is_dir():
            model = student(name)
            chosen = Adapted(f"{model}-controlnet", f"{model}-lora", 0.5) if adapted else Adapted()
            export_runtime(model, out, runtime, precision, chosen)
        return out

    return folder


# Steps and prediction types are the generator's, whatever runs the networks. Of family, mid block (without one the decoder is a
# tiny one) and runtime each two values meet; the student of four steps has the networks of "sd".
@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("sd-4-steps", "onnx"),
        ("sd", "openvino"),
        ("sdxl", "onnx"),
        ("sd-midless", "onnx"),
        ("sdxl-midless", "openvino"),
    ],
)
def test_equals_pytorch(name: str, runtime: Any, student: Students, exported: Callable[..., Path]) -> None:
    model = student(name)
    torch_made = OneStepGenerator.load(
        model, controlnet=f"{model}-controlnet", lora=f"{model}-lora", lora_scale=0.5, device="cpu"
    )
    found = OneStepGenerator.load(exported(name, runtime), backend=runtime, device="cpu")
    ways: list[dict[str, Any]] = [
        {"control_images": condition(2, SIZES[0]), "control_scale": 0.7},
        {"image": condition(1, SIZES[1]), "strength": 0.5},
        {"control_images": condition(1, SIZES[2])},
        {},
    ]
    for size, count, given in zip(SIZES, (2, 1, 1, 2), ways, strict=True):
        given |= {"prompts": PROMPTS[:count], "seeds": SEEDS[:count], "size": size}
        assert difference(found.sample(**given), torch_made.sample(**given)) <= 1e-4


def weight_bytes(network: Path) -> int:
    """Bytes of the weights of an exported network, without its graph."""
    if (network / "openvino_model.bin").is_file():
        return (network / "openvino_model.bin").stat().st_size
    return sum(len(one.raw_data) for one in onnx.load(network / "model.onnx").graph.initializer)


def computes_in_bf16() -> bool:
    """Whether OpenVINO takes this processor's bf16 units for networks that are not in float32."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextmanager
def float32_arithmetic() -> Iterator[None]:
    """Has OpenVINO leave bf16 units alone, so that what differs is the weights'."""
    core, name = openvino_core(), "INFERENCE_PRECISION_HINT"
    before = core.get_property("CPU", name)
    core.set_property("CPU", {name: "f32"})
    try:
        yield
    finally:
        core.set_property("CPU", {name: before})


@pytest.mark.parametrize(
    ("name", "runtime", "precision", "bound"),
    [
        ("sd-midless", "onnx", "fp16", 0.02),
        ("sdxl", "onnx", "fp16", 0.02),
        ("sd-midless", "openvino", "fp16", 0.01),
        ("sdxl", "openvino", "int8", 0.1),
    ],
)
def test_smaller_weights(
    name: str, runtime: Any, precision: Any, bound: float, student: Students, exported: Callable[..., Path]
) -> None:
    folder = exported(name, runtime, precision, adapted=False)
    expected = OneStepGenerator.load(student(name), device="cpu").sample(PROMPTS, SEEDS)

    def off() -> float:
        found = OneStepGenerator.load(folder, backend=runtime, device="cpu").sample(PROMPTS, SEEDS)
        return difference(found, expected)

    if runtime == "openvino":
        with float32_arithmetic():
            assert 0 < off() <= bound
    if runtime == "openvino" and precision == "fp16" and computes_in_bf16():
        bound *= 8  # bf16 rounds 8 times as coarsely as fp16; as much as other prompts change these images
    assert 0 < off() <= bound
    stored = load_file(student(name) / "unet" / "diffusion_pytorch_model.safetensors").values()
    share = weight_bytes(folder / "unet") / (4 * sum(one.numel() for one in stored))
    # A few constants stay as they were, of which these tiny networks have many; int8 has a scale for each channel.
    most = {("onnx", "fp16"): 0.51, ("openvino", "fp16"): 0.51, ("openvino", "int8"): 0.32}
    assert 0.2 < share < most[runtime, precision]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert 0 < manifest["largest_difference"] <= bound and manifest["dtype"] == precision


def test_nothing_is_reported_to_the_makers(student: Students, tmp_path: Path) -> None:
    part = next(parts(ModelFolder.read(student("sd"), "torch"), Adapted(), torch.float32))
    write_openvino(part, tmp_path, "int8")
    assert (tmp_path / "openvino_model.bin").is_file()
    with pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")
    assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]


class SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_: ClassVar = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def signal_stack_is_mapped() -> bool:
    """Whether this thread's stack for signal handlers is memory of this process; if not, the next signal is its end."""
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    if not stack.address:
        return True
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(low, 16) <= stack.address < int(high, 16) for low, high in ranges)


def test_generators_that_end_in_any_order_leave_signals_alive(exported: Callable[..., Path]) -> None:
    folder = exported("sd", "openvino", adapted=False)
    first, second = (OneStepGenerator.load(folder, backend="openvino") for _ in range(2))
    first.sample(PROMPTS[:1], SEEDS[:1])
    second.sample(PROMPTS[:1], SEEDS[:1])
    del first
    gc.collect()
    del second
    gc.collect()
    assert signal_stack_is_mapped()


def test_layout_and_names_of_optimum(exported: Callable[..., Path]) -> None:
    folder = exported("sdxl", "onnx", adapted=False)
    index = json.loads((folder / "model_index.json").read_text())
    networks = {"text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"}
    assert networks <= index.keys() and "vae" not in index
    assert (
        index["unet"] == ["diffusers", "OnnxRuntimeModel"]
        and index["_class_name"] == "StableDiffusionXLPipeline"
    )
    assert all((folder / name / "config.json").is_file() for name in networks)
    assert {"tokenizer", "tokenizer_2", "scheduler"} <= {path.name for path in folder.iterdir()}
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / "tokenizer_2").iterdir()}
    session = onnxruntime.InferenceSession(folder / "unet" / "model.onnx")
    names = [one.name for one in session.get_inputs()]
    assert names == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert [one.name for one in session.get_outputs()] == ["out_sample"]
    decoder = json.loads((folder / "vae_decoder" / "config.json").read_text())
    assert decoder["scaling_factor"] == 1.0  # optimum divides by it, and the graph has done so
    second = onnxruntime.InferenceSession(folder / "text_encoder_2" / "model.onnx")
    assert [one.name for one in second.get_outputs()][:2] == ["text_embeds", "last_hidden_state"]
    graph = openvino_core().read_model(
        exported("sd", "openvino", adapted=False) / "unet" / "openvino_model.xml"
    )
    assert {one.get_any_name() for one in graph.inputs} == {"sample", "timestep", "encoder_hidden_states"}
    assert [one.get_any_name() for one in graph.outputs] == ["out_sample"]


def test_tokenizers_of_earlier_exports_get_their_vocabulary(tmp_path: Path) -> None:
    """The shipped student has tokenizer.json alone, which optimum's transformers does not read."""
    model = ModelFolder.read(ROOT / "data" / "toy" / "student", "torch")
    _write_rest(model, tmp_path, "onnx", {})
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "tokenizer").iterdir()}


def test_manifest_and_residuals(exported: Callable[..., Path], student: Students) -> None:
    folder = exported("sd-midless", "onnx")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["steps"], manifest["timesteps"], manifest["guidance_scale"]) == (1, [999], 0)
    assert (manifest["height"], manifest["size_multiple"], manifest["latent_factor"]) == (32, 8, 2)
    assert manifest["lora_scale"] == 0.5 and manifest["largest_difference"] <= 1e-4
    assert "licence of the base" in manifest["licence"]
    # Two stages of one layer: a student has 4 + 1, where SD-1.5 has 12 + 1.
    assert len(manifest["control_residuals"]) == 5
    inputs = [one.name for one in onnx.load(folder / "unet" / "model.onnx").graph.input]
    assert inputs[3:] == [name for name, _, _ in manifest["control_residuals"]]
    # Scaling is inside the graph of a KL decoder (0.5 here), and there is none in a tiny one.
    latents = torch.randn(1, 4, 16, 16)
    for name in ("sd", "sd-midless"):
        session = onnxruntime.InferenceSession(
            exported(name, "onnx", adapted=name != "sd") / "vae_decoder" / "model.onnx"
        )
        found = torch.from_numpy(session.run(None, {"latent_sample": latents.numpy()})[0])
        networks = OneStepGenerator.load(student(name), device="cpu").networks
        assert difference(found, networks.decode(latents)) <= 1e-5


def test_weights_beside_the_graph(student: Students, tmp_path: Path) -> None:
    model = ModelFolder.read(student("sd"), "torch")
    part = next(one for one in parts(model, Adapted(), torch.float32) if one.name == "unet")
    for limit, name in ((0, "beside"), (10**9, "inside")):
        (tmp_path / name).mkdir()
        write_onnx(part, tmp_path / name, inline_bytes=limit)
    assert [file.name for file in (tmp_path / "inside").iterdir()] == ["model.onnx"]
    assert (tmp_path / "beside" / "model.onnx").stat().st_size < (
        tmp_path / "inside" / "model.onnx"
    ).stat().st_size
    inputs = {
        name: torch.randn_like(one).numpy() if one.ndim > 1 else one.numpy()
        for name, one in part.inputs.items()
    }
    outputs = [
        onnxruntime.InferenceSession(tmp_path / name / "model.onnx").run(None, inputs)[0]
        for name in ("beside", "inside")
    ]
    assert (outputs[0] == outputs[1]).all()
    onnx.checker.check_model(tmp_path / "beside" / "model.onnx")


class Layers(nn.Module):
    """Linear layers of a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(16)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layers(x),)

    def part(self) -> Part:
        return Part("unet", self, {"x": torch.zeros(1, self.width)}, ["y"], {}, {})


def resident_peak(reset: bool = False) -> int:
    """Largest resident memory of this process since the last reset, bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def print_memory(folder: Path) -> None:
    """Writes 268 MB of weights beside the graph, then inside; prints by how much the resident peak grew, over the weights."""
    write_onnx(Layers(8).part(), folder)  # imports and caches
    part = Layers(2048).part()
    size = 16 * 2048 * 2048 * 4
    before = resident_peak(reset=True)
    for inline_bytes in (0, 10**9):
        write_onnx(part, folder, inline_bytes=inline_bytes)
        print((resident_peak() - before) / size)


def test_memory_is_bounded_by_the_weights(tmp_path: Path) -> None:
    """Tracing and writing makes no copy of the weights."""
    # In a process of its own: in that of other tests the allocator returns pages of theirs at any moment.
    (done,) = in_ranks(print_memory, (tmp_path,), tmp_path, count=1)
    assert done.code == 0, done.said
    beside, inside = map(float, done.said.split()[-2:])
    assert (
        beside < 1
    )  # parts of them pass through, of which the allocator keeps more or less, but never a copy
    assert inside > 1  # what is measured is seen: inside the file they are copied


def killed_behind_the_unet(*arguments: str) -> None:
    """The command, which gets SIGTERM when it has written the second of its networks; prints their names."""
    write_part = exporting._write_part

    def killed(part: Part, folder: Path, runtime: Any, precision: Any) -> None:
        write_part(part, folder, runtime, precision)
        print("WROTE", part.name, flush=True)
        if part.name == "unet":
            os.kill(os.getpid(), signal.SIGTERM)

    exporting._write_part = killed
    main(arguments)


def test_an_interrupted_export_leaves_nothing(
    student: Students, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "export"
    out.mkdir()
    (out / MANIFEST).write_text("an earlier export")
    # In a process of its own: signals reach the main thread, and a worker of pytest may run tests in another.
    arguments = (str(student("sd")), "--to", "onnx", "--out", str(out))
    said = tmp_path_factory.mktemp("said")
    (done,) = in_ranks(killed_behind_the_unet, arguments, said, count=1)
    assert done.code == 143, done.said[-2000:]
    assert re.findall("^WROTE (.*)$", done.said, re.MULTILINE) == ["text_encoder", "unet"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in out.iterdir()] == [MANIFEST]


def test_an_export_that_differs_is_not_written(
    student: Students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(part: Any, folder: Path, *given: Any) -> None:
        with torch.no_grad():
            for one in part.module.parameters():
                one.mul_(1.01)
        write_onnx(part, folder)

    monkeypatch.setattr(exporting, "_write_part", wrong)
    with pytest.raises(
        UserError, match=r"the fp32 export differs from PyTorch by up to .* so nothing was written"
    ):
        export_runtime(student("sd"), tmp_path / "export", "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--to", "onnx", "--dtype", "int8"], "--dtype int8 is for --to openvino"),
        (["--to", "single-file", "--controlnet", "x"], "--controlnet is for onnx and openvino"),
        (["--to", "onnx", "--controlnet", "nowhere"], "there is no ControlNet in 'nowhere'"),
        (["--to", "onnx", "--lora", "nowhere"], "there is no file or folder 'nowhere'"),
        (["--to", "single-file", "--steps", "1"], "--steps is for onnx and openvino"),
        (["--to", "tensorrt"], "--to is 'tensorrt', but must be one of onnx, openvino, single-file"),
    ],
)
def test_messages(
    line: list[str], message: str, student: Students, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(student("sd")), *line, "--out", "never"])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not Path("never").exists()


def test_only_an_earlier_export_is_replaced(
    student: Students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "run" / "pipeline"
    shutil.copytree(student("sd"), model)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years")
    (tmp_path / "notes" / "README.txt").write_text("of another program")
    monkeypatch.chdir(tmp_path)
    for out, reason in (
        (model, "is in it"),
        (tmp_path / "run", "is in it"),
        (tmp_path, "is in it"),
        (tmp_path / "notes", "is no earlier export"),
        (tmp_path / "notes" / "thesis.txt", "is no earlier export"),
        (model / "unet" / "export", f"is inside of '{model}'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(model), "--to", "single-file", "--out", str(out)])
        assert stop.value.code == 2 and reason in capsys.readouterr().err
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years" and (model / "unet").is_dir()
    for _ in range(2):  # its own files it does replace
        main([str(model), "--to", "single-file", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_edited_manifest_is_refused(exported: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported("sd", "onnx", adapted=False), folder)
    before = json.loads((folder / MANIFEST).read_text())
    for change, message in (
        ({"format": 2}, "has format 2, and this version reads 1"),
        ({"runtime": None}, "has runtime None, which no export writes; was it edited"),
        ({"dtype": "half"}, "has dtype 'half', which no"),
        ({"input_dtype": "int64"}, "has input_dtype 'int64', which no"),
        ({"pipeline_class": 3}, "has pipeline_class 3, which no"),
        ({"control_residuals": [["a", 1]]}, r"has control_residuals \[\['a', 1\]\], which no"),
    ):
        (folder / MANIFEST).write_text(json.dumps(before | change))
        with pytest.raises(UserError, match=message):
            OneStepGenerator.load(folder, backend="onnx")


def test_an_export_refuses_what_it_has_inside(exported: Callable[..., Path], tmp_path: Path) -> None:
    folder = exported("sd", "onnx", adapted=False)
    with pytest.raises(
        UserError, match="is an export for onnx, got `backend` torch; give `backend` onnx, or the diffusers"
    ):
        OneStepGenerator.load(folder)
    with pytest.raises(UserError, match="`lora` is 'x', but an export has its adapters inside"):
        OneStepGenerator.load(folder, backend="onnx", lora="x")
    with pytest.raises(UserError, match="`compiled` is for `backend` torch"):
        OneStepGenerator.load(folder, backend="onnx", compiled=True)
    with pytest.raises(UserError, match="`dtype` is 'fp16', but an export has the precision that it was"):
        OneStepGenerator.load(folder, backend="onnx", dtype="fp16")
    generator = OneStepGenerator.load(folder, backend="onnx")
    with pytest.raises(UserError, match="this export has no LoRA whose scale could change"):
        generator.set_lora_scale(0.5)
    with pytest.raises(UserError, match="without ControlNet; export it with one"):
        generator.generate(PROMPTS, control_images=condition(2, (32, 32)))
    with pytest.raises(UserError, match="is an export for onnx, got `backend` torch"):
        export_runtime(folder, folder.with_name("again"), "onnx")
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "unet" / "model.onnx").write_bytes((folder / "unet" / "model.onnx").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"unet/model.onnx' cannot be loaded .* was a file cut off"):
        OneStepGenerator.load(cut, backend="onnx").generate("a")


@pytest.mark.parametrize(
    ("module", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino"), ("onnx", "onnx")]
)
def test_a_missing_extra_is_named(
    module: str, extra: str, student: Students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *given: Any) -> Any:
        if name == module:
            raise ImportError(name)
        return imported(name, *given)

    monkeypatch.setattr(builtins, "__import__", without)
    runtime: Any = "openvino" if extra == "openvino" else "onnx"
    with pytest.raises(UserError, match=f"uv sync --extra {extra}"):
        export_runtime(student("sd"), tmp_path / "out", runtime)


def test_static_shapes_of_openvino(exported: Callable[..., Path], student: Students) -> None:
    folder = exported("sd", "openvino", adapted=False)
    static = OneStepGenerator.load(folder, backend="openvino", static_shapes=True, threads=1)
    expected = OneStepGenerator.load(student("sd"), device="cpu")
    for size in SIZES[:2]:
        found = static.sample(PROMPTS, SEEDS, size=size)
        assert difference(found, expected.sample(PROMPTS, SEEDS, size=size)) <= 1e-4
