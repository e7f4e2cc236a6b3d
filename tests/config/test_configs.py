"""Every YAML that is shipped: it parses against the classes of today, and the stages run at tiny size: one iteration of each
kind, all that one configuration can differ in from others. What a second one adds is tested with each stage."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sdxs_lightning.cli import TrainingCLI, main
from sdxs_lightning.config_files import read_arguments
from sdxs_lightning.networks.controlnet import controlnet_from_unet, save_controlnet
from sdxs_lightning.networks.lora import LoRA, add_lora
from sdxs_lightning.networks.lora_files import live_adapters, write_lora
from tests.helpers.tiny import tiny_sd_unet, tiny_sdxl_unet
from tests.helpers.tiny_decoding import save_dinov2
from tests.helpers.tiny_distillation import family_of, save_base, save_shards
from tests.helpers.tiny_run import ROOT
from tests.networks.test_lora import move

CONFIGS = ROOT / "configs"
OVERLAYS = {
    "common/run.yaml": ["sd15/distill.yaml"],
    "hardware/cpu.yaml": ["sd15/distill.yaml"],
    "hardware/one_gpu.yaml": ["sd15/distill.yaml"],
    "hardware/ddp.yaml": ["sdxl/distill.yaml"],
    "hardware/fsdp2.yaml": ["sdxl/distill.yaml"],
    "hardware/hsdp.yaml": ["sdxl/distill.yaml"],
    "hardware/multi_node.yaml": ["sdxl/distill.yaml", "hardware/fsdp2.yaml"],
    "metrics/coco2014.yaml": ["sd15/distill.yaml"],
    "methods/gan_in_warmup.yaml": ["sd15/warmup.yaml"],
    **{
        f"methods/{name}.yaml": ["sd15/distill.yaml"]
        for name in (
            "alignment",
            "decoupled_guidance",
            "guidance_input",
            "half_the_work",
            "long_and_short_guidance",
            "lora_fake_score",
            "low_timesteps",
            "no_momentum",
            "plain_dmd",
            "rescaled_guidance",
            "samples_used_again",
            "score_identity",
            "small_fake_score_batch",
        )
    },
    "common/toy_dmd2.yaml": ["quickstart.yaml"],
    "sd15/distill_gan.yaml": ["sd15/distill.yaml"],
    "sd15/miniaturise_bk.yaml": ["sd15/miniaturise.yaml"],
    "toy/condition_background_bar.yaml": ["toy/controlnet_pretrained.yaml"],
    "toy/condition_sketch.yaml": ["toy/controlnet_pretrained.yaml"],
    "toy/control_metrics.yaml": ["toy/controlnet_joint.yaml"],
    **{
        f"{base}/controlnet_{size}.yaml": [f"{base}/controlnet_denoising.yaml"]
        for base in ("sd15", "sdxl")
        for size in ("1gpu", "8gpu")
    },
    "toy/longer.yaml": ["quickstart.yaml"],
    "toy/pruned.yaml": ["quickstart.yaml", "toy/longer.yaml"],
    "toy/recipe.yaml": ["toy/warmup.yaml"],
    "toy/stored_pairs.yaml": ["toy/warmup.yaml"],
    **{
        f"{base}/{name}.yaml": [f"{base}/distill.yaml"]
        for base in ("toy", "sd15", "sd21", "sdxl")
        for name in ("distill_segmented", "finish", "lora")
    },
    **{
        f"{base}/lora_segmented.yaml": [f"{base}/distill.yaml", f"{base}/lora.yaml"]
        for base in ("toy", "sd15", "sd21", "sdxl")
    },
    **{f"{base}/distill_4step.yaml": [f"{base}/distill.yaml"] for base in ("sd15", "sd21", "sdxl")},
    **{
        f"{base}/distill_{size}.yaml": [f"{base}/distill.yaml"]
        for base in ("sd15", "sd21", "sdxl")
        for size in ("1gpu", "8gpu", "64gpu")
    },
    **{f"{base}/warmup_1gpu.yaml": [f"{base}/warmup.yaml"] for base in ("sd15", "sd21", "sdxl")},
    **{
        f"{base}/miniaturise_{size}.yaml": [f"{base}/miniaturise.yaml"]
        for base in ("sd15", "sd21", "sdxl")
        for size in ("1gpu", "8gpu")
    },
}
"""Files that are laid over others."""


def names() -> list[str]:
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def stack(name: str) -> list[str]:
    """The command line that reads a file, and before it what it is laid over."""
    return [part for file in (*OVERLAYS.get(name, []), name) for part in ("--config", str(CONFIGS / file))]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    with pytest.raises(SystemExit) as end:
        TrainingCLI([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    resolved: dict[str, dict[str, object]] = yaml.safe_load(capsys.readouterr().out)
    return resolved


def test_metrics_come_on_top_of_a_stages_own_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    def callbacks(*names: str) -> list[object]:
        files = [part for name in names for part in ("--config", str(CONFIGS / name))]
        listed = printed(files, capsys)["trainer"]["callbacks"]
        assert isinstance(listed, list)
        return listed

    own = callbacks("sdxl/distill.yaml")
    both = callbacks("sdxl/distill.yaml", "metrics/coco2014.yaml", "sdxl/distill_8gpu.yaml")
    assert both[: len(own)] == own and len(own) > 4
    added = [callback["class_path"].rpartition(".")[2] for callback in both[len(own) :]]  # type: ignore[index]
    assert added == ["ImageMetrics", "SampleGrids", "BestCheckpoint"]


def test_overlays_merge_field_by_field(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*stack("sd15/distill_gan.yaml"), "--config", str(CONFIGS / "hardware/one_gpu.yaml")]
    resolved = printed([*arguments, "--seed_everything", "7"], capsys)
    model = resolved["model"]["init_args"]
    assert isinstance(model, dict)
    optimizer = model["student"]["init_args"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["fused"]) == (5e-7, 0.01, True)
    assert model["adversarial"]["init_args"]["student_weight"] == 1e-3
    assert model["real_score_dtype"] == "bfloat16"
    assert model["update_schedule"]["fake_score_updates_per_student_update"] == 10
    assert resolved["trainer"]["precision"] == "bf16-mixed"
    # Interpolations follow the flag that came after the files.
    data = resolved["data"]["init_args"]
    assert isinstance(data, dict)
    assert (model["seed"], data["seed"]) == (7, 7)


Flags = dict[str, object]


def tiny(name: str, folder: Path) -> Flags:
    """What makes any stage small: a tiny base, few samples, batches of two."""
    flags: Flags = {
        "model.init_args.family.init_args.base": tiny_base(name, folder),
        "data.init_args.batch_size": 2,
        "trainer.default_root_dir": folder / name.replace("/", "-"),
        "trainer.enable_model_summary": False,
    }
    if name.startswith(("toy", "quickstart")):
        return flags | {"data.init_args.train_images": 64, "data.init_args.cache": folder / "rendered"}
    return flags | {"data.init_args.num_workers": 0, "data.init_args.shards": save_shards(folder / "shards")}


def tiny_base(name: str, folder: Path) -> Path:
    """The base that a config runs on: of two stages, except for those that take one out."""
    kind = "sdxl-epsilon" if name.startswith(("sdxl", "toy_sdxl")) else "sd-epsilon"
    if name.endswith("miniaturise.yaml"):
        return save_base(kind, folder)
    return save_base(kind, folder / "two_stages", stages=2)


def tiny_distill(name: str, folder: Path) -> Flags:
    flags = tiny(name, folder) | {
        "model.init_args.student.init_args.weights": "null",  # what an earlier stage would have left
        "model.init_args.update_schedule.max_student_updates": 1,
        "model.init_args.update_schedule.fake_score_updates_per_student_update": 1,
        "model.init_args.accumulate_grad_batches": 1,
    }
    if name.startswith(("toy", "quickstart")):
        flags |= {
            "model.init_args.update_schedule.fake_score_only_iterations": 0,
            # What measures needs the real toy base, and is tested with the evaluation.
            "trainer.callbacks": "null",
            "trainer.enable_checkpointing": False,
        }
    arguments = read_arguments(stack(name)).settings["model"]["init_args"]
    if arguments["update_schedule"].get("warmup_updates"):
        flags |= {
            "model.init_args.update_schedule.warmup_updates": 1,
            "model.init_args.update_schedule.max_student_updates": 2,
            "model.init_args.pairs.count": 4,
            "model.init_args.pairs.sampler_steps": 2,
        }
    return flags


def tiny_warmup(name: str, folder: Path) -> Flags:
    pairs = {"source": "memory", "count": 4, "sampler_steps": 2}
    flags = tiny_distill(name, folder) | {
        "model.init_args.update_schedule.warmup_updates": 1,
        "model.init_args.update_schedule.max_student_updates": 1,
        "model.init_args.pairs": json.dumps(pairs),
    }
    return flags if name.startswith("toy") else flags | {"data.init_args.contents": "[latents]"}


def tiny_segmented(name: str, folder: Path) -> Flags:
    return tiny_distill(name, folder) | {"model.init_args.pairs.sampler_steps": 1}


def tiny_finish(name: str, folder: Path) -> Flags:
    flags = tiny_distill(name, folder)
    if name.startswith("toy"):
        return flags
    return flags | {
        "model.init_args.pixel_adversarial.decoder": "null",
        "model.init_args.image_features.init_args.folder": save_dinov2(folder / "dinov2"),
        "model.init_args.image_features.init_args.layers": "[0, 1]",
        "model.init_args.image_features.init_args.size_px": 32,
    }


def tiny_lora(name: str, folder: Path) -> Flags:
    flags = tiny_distill(name, folder) | {
        "model.init_args.update_schedule.fake_score_only_iterations": 0,
        "model.init_args.style.path": save_style(folder, "sdxl" if name.startswith("sdxl") else "sd"),
    }
    if name.startswith("toy"):  # begins from its style
        flags |= {
            "model.init_args.student.init_args.lora.weights": flags["model.init_args.style.path"],
            "model.init_args.fake_score.init_args.weights": "null",
        }
    return flags | ({"model.init_args.pairs.sampler_steps": 1} if "segmented" in name else {})


def tiny_style_lora(name: str, folder: Path) -> Flags:
    flags = tiny(name, folder) | {"trainer.max_steps": 1}
    return flags | ({} if name.startswith("toy") else {"data.init_args.contents": "[latents]"})


def save_style(folder: Path, kind: str) -> Path:
    """A LoRA of the tiny base."""
    path = folder / f"style-{kind}"
    if not path.exists():
        path.mkdir()
        unet = tiny_sdxl_unet(stages=2) if kind == "sdxl" else tiny_sd_unet(stages=2)
        move(add_lora(unet, LoRA(rank=2)), 0.1)
        write_lora(path, live_adapters(unet.state_dict(), None))
    return path


def tiny_miniaturise(name: str, folder: Path) -> Flags:
    flags = tiny(name, folder) | {"trainer.max_steps": 1, "trainer.accumulate_grad_batches": 1}
    if name.startswith("sdxl"):  # the preset's Transformers are deeper than the tiny base's
        flags["model.init_args.topology"] = '{"stages": [{}, {}, {}], "mid_block": "resnet"}'
    return flags


def tiny_control_training(name: str, folder: Path) -> Flags:
    flags = tiny(name, folder) | {"trainer.max_steps": 1, "trainer.accumulate_grad_batches": 1}
    if name.startswith("toy"):
        flags |= {"trainer.callbacks": "null", "trainer.enable_checkpointing": False}
    if name.endswith("control_reader.yaml"):
        return flags | {"model.init_args.widths": "[4, 4]"}
    if name.endswith("fitting.yaml"):
        controlnet = save_controlnet_of(name, folder)
        flags |= {"model.init_args.weights": "null", "model.init_args.base_controlnet": controlnet}
    return flags | {"model.init_args.controlnet.stem_widths": "[4, 4]"}


def tiny_controlnet(name: str, folder: Path) -> Flags:
    reader = {"class_path": "sdxs_lightning.networks.condition_readers.SoftEdgeReader"}
    term = "model.init_args.objectives.condition_consistency.init_args"
    flags = tiny_distill(name, folder)
    flags["model.init_args.update_schedule.fake_score_only_iterations"] = 0
    if name.endswith("joint.yaml"):
        flags = {key: value for key, value in flags.items() if ".pairs." not in key}
        return flags | {
            f"{term}.reader": json.dumps(reader),
            f"{term}.decoder": "null",
            "model.init_args.student.init_args.controlnet.stem_widths": "[4, 4]",
            "model.init_args.fake_score.init_args.controlnet.stem_widths": "[4, 4]",
        }
    controlnet = save_controlnet_of(name, folder)
    return flags | {
        "model.init_args.student.init_args.controlnet.weights": controlnet,
        "model.init_args.fake_score.init_args.controlnet.weights": controlnet,
        "model.init_args.control.base_controlnet": controlnet,
        "model.init_args.pairs.sampler_steps": 2,
    }


def save_controlnet_of(name: str, folder: Path) -> Path:
    """A ControlNet of the tiny base that a config runs on, made once."""
    base = tiny_base(name, folder)
    path = folder / f"controlnet-{base.name}"
    if not path.exists():
        unet = family_of(base).load_unet()
        save_controlnet(controlnet_from_unet(unet, (4, 4)), path)
    return path


STAGES: dict[str, Callable[[str, Path], Flags]] = {
    "quickstart.yaml": tiny_distill,
    "distill.yaml": tiny_distill,
    "warmup.yaml": tiny_warmup,
    "distill_segmented.yaml": tiny_segmented,
    "finish.yaml": tiny_finish,
    "distill_4step.yaml": tiny_distill,
    "miniaturise.yaml": tiny_miniaturise,
    "control_reader.yaml": tiny_control_training,
    "controlnet_denoising.yaml": tiny_control_training,
    "controlnet_fitting.yaml": tiny_control_training,
    "controlnet_joint.yaml": tiny_controlnet,
    "controlnet_pretrained.yaml": tiny_controlnet,
    "lora.yaml": tiny_lora,
    "lora_segmented.yaml": tiny_lora,
    "style_lora.yaml": tiny_style_lora,
}
"""Name of a stage's files -> the flags under which it takes a step at tiny size."""


def staged() -> list[str]:
    """What runs: every stage on the toy, as SDXL and as Stable Diffusion.

    SD-1.5 and SD-2.1 are one kind at tiny size. A file of theirs does not run where its model differs from one that runs in
    numbers and names of weights only: from the other of the two, or from SDXL's where the toy's, of their kind, runs too.
    """
    files = [name for name in names() if name.rpartition("/")[2] in STAGES]
    running = [name for name in files if not name.startswith(("sd15/", "sd21/"))]
    for name in (name for name in files if name not in running):
        stage = name.rpartition("/")[2]
        others = [f"sd15/{stage}", *([f"sdxl/{stage}"] if f"toy/{stage}" in running else [])]
        if not any(other in running and parts_of(other) == parts_of(name) for other in others):
            running.append(name)
    return running


@functools.cache
def parts_of(name: str, whole: bool = False) -> str:
    """What a configuration consists of: its keys, classes, switches and choices, without numbers and paths.

    Args:
        name: of the file.
        whole: all of it with the types of numbers; otherwise of the model what is neither its family nor names of weights.
    """

    def part(value: object) -> object:
        if isinstance(value, dict):
            kept = {key: part(one) for key, one in value.items() if whole or key not in ("family", "weights")}
            return {key: one for key, one in kept.items() if whole or one is not None}
        if isinstance(value, list):
            return [part(one) for one in value]
        if isinstance(value, str):
            return "path" if "/" in value and "${" not in value else value
        return value if isinstance(value, bool) or value is None else type(value).__name__

    settings = read_arguments(stack(name)).settings
    return json.dumps(part(settings if whole else settings["model"]), sort_keys=True)


def parsed() -> list[str]:
    """What is parsed as it is: the toy's files, whose runs leave parts out, and what does not run; files that differ in numbers
    and paths only once."""
    running = [name for name in staged() if name.startswith(("sd15", "sd21", "sdxl"))]
    names_of = {parts_of(name, whole=True): name for name in reversed([*running, *names()])}
    return sorted(name for name in names_of.values() if name not in running)


def command_line(name: str, folder: Path) -> list[str]:
    """A stage at tiny size."""
    flags = STAGES[name.rpartition("/")[2]](name, folder)
    overrides = [f"--{key}={value}" for key, value in flags.items()]
    return [*stack(name), "--config", str(CONFIGS / "hardware/cpu.yaml"), *overrides]


@pytest.mark.parametrize("name", parsed())
def test_a_shipped_file_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = printed(stack(name), capsys)
    assert "class_path" in resolved["model"]
    assert resolved["trainer"]["default_root_dir"]


@pytest.mark.parametrize("name", staged())
def test_a_stage_runs_at_tiny_size(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert main(command_line(name, folder)) == 0
    run = folder / name.replace("/", "-")
    assert (run / "config.yaml").is_file() and (run / "origin.json").is_file()
    start = json.loads((run / "starts.jsonl").read_text())
    assert (start["world_size"], start["hosts"], start["resumed_from"]) == (1, [socket.gethostname()], None)
    assert start["commit"] == json.loads((run / "origin.json").read_text())["commit"]
    assert (run / "unet" / "config.json").is_file() == name.endswith("miniaturise.yaml")


@pytest.mark.parametrize(
    "name", [name for name in parsed() if Path(name).name in STAGES and name not in staged()]
)
def test_the_numbers_of_a_stage_that_does_not_run_are_accepted(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cli = TrainingCLI(command_line(name, tmp_path_factory.getbasetemp()))
    assert cli.model.hparams is not None and cli.datamodule is not None


@pytest.mark.parametrize(
    ("name", "methods", "ratio"),
    [
        (
            "toy/distill.yaml",
            ("decoupled_guidance", "guidance_input", "small_fake_score_batch", "alignment"),
            1,
        ),
        ("sdxl/distill.yaml", ("score_identity", "half_the_work"), 5),
        ("sd15/distill.yaml", ("plain_dmd", "long_and_short_guidance", "rescaled_guidance"), 1),
        ("toy/warmup.yaml", ("gan_in_warmup",), 1),
    ],
)
def test_methods_go_on_top_of_a_stage_and_together(
    name: str, methods: tuple[str, ...], ratio: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    flags = STAGES[name.rpartition("/")[2]](name, folder)
    flags["model.init_args.update_schedule.fake_score_updates_per_student_update"] = ratio
    flags["trainer.default_root_dir"] = folder / methods[0]
    if "plain_dmd" in methods:
        flags["model.init_args.pairs.sampler_steps"] = 1
    overlays = [
        part for method in methods for part in ("--config", str(CONFIGS / "methods" / f"{method}.yaml"))
    ]
    overrides = [f"--{key}={value}" for key, value in flags.items()]
    assert main([*stack(name), *overlays, "--config", str(CONFIGS / "hardware/cpu.yaml"), *overrides]) == 0
