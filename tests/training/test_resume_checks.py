"""What a resumed run must share with its checkpoint, what may change and is then applied and said, and what a disk may do."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks import run_folder
from sdxs_lightning.callbacks.checkpoint_choice import chosen_checkpoint
from sdxs_lightning.callbacks.optimizer_settings import apply_settings, settings_of
from sdxs_lightning.callbacks.resume import read_state
from sdxs_lightning.callbacks.run_folder import LOCK, RunLock
from sdxs_lightning.callbacks.run_identity import compare_settings, compare_weights, identity_of
from sdxs_lightning.cli import main
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.networks.image_features import Dinov2Features
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.matched_features import PixelFeatures
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny_decoding import save_dinov2
from tests.helpers.tiny_distillation import built, distillation
from tests.helpers.tiny_run import tiny_config, write_config

ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
SCHEDULE = {
    "class_path": "sdxs_lightning.training.lr_schedules.TwoPhaseLR",
    "init_args": {"total_updates": 10, "final_factor": 0.5},
}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two student updates, with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, max_student_updates=2)
    config["trainer"]["callbacks"][1]["init_args"]["every_n_student_updates"] = 1
    for role in ("student", "fake_score"):
        settings = {"optimizer": copy.deepcopy(ADAM), "lr_scheduler": copy.deepcopy(SCHEDULE)}
        config["model"]["init_args"][role]["init_args"] |= settings
    assert main(["--config", str(write_config(folder / "tiny.yaml", config))]) == 0
    return folder, config


@pytest.fixture
def resume(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Resumes a copy of the run, to three updates, after a change; returns exit code and what it said."""
    folder, config = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "sd-epsilon", tmp_path / "base")

    def call(change: Change | None = None, *arguments: str, updates: int = 3) -> tuple[int, str]:
        changed = copy.deepcopy(config)
        changed["trainer"]["default_root_dir"] = str(tmp_path / "run")
        model = changed["model"]["init_args"]
        model["family"]["init_args"]["base"] = str(tmp_path / "base")
        model["update_schedule"]["max_student_updates"] = updates
        if change is not None:
            change(changed)
        file = write_config(tmp_path / "tiny.yaml", changed)
        code = main(["--config", str(file), "--ckpt_path", *(arguments or ("last",))])
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return code, said

    return call


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in folders.complete_checkpoints(folder / "run" / "checkpoints")]


def written(folder: Path) -> dict[str, bytes]:
    """Contents of the small files of a run."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".ckpt")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused_beside_logs(resume: Callable[..., tuple[int, str]], folder: Path) -> bool:
    """Whether a new start is refused before it sets the logs aside that are in the run's folder."""
    run = folder / "run"
    (run / "logs").mkdir()
    (run / "logs" / "metrics.csv").write_text("step,loss\n1,2\n")
    before = written(run)

    def logged(config: dict[str, Any]) -> None:
        logger = {"class_path": "sdxs_lightning.training.csv_log.RunCSVLogger"}
        config["trainer"]["logger"] = [logger | {"init_args": {"save_dir": str(run)}}]

    code, _ = resume(logged, "null")
    return code == 2 and written(run) == before


def saved(folder: Path) -> dict[str, Any]:
    newest = folders.newest_complete_checkpoint(folder / "run" / "checkpoints")
    assert newest is not None
    loaded: dict[str, Any] = torch.load(newest / folders.STATE, weights_only=True)
    return loaded


# -------------------------------------------------------------------------------------------------------------- identity


def test_an_unchanged_run_resumes_and_mentions_only_what_changed(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, said = resume()
    assert code == 0
    assert checkpoints(tmp_path) == ["update_00000002-batch_00000002", "update_00000003-batch_00000003"]
    lines = said.split("changed since the checkpoint was written:\n")[1].splitlines()
    listed = {line.split(":")[0].strip() for line in lines if " -> " in line}
    assert listed == {
        "model.init_args.family.init_args.base",
        "model.init_args.update_schedule.max_student_updates",
        "trainer.default_root_dir",
    }
    assert "applied to" not in said


def other_weights(name: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        file = next((base / name).glob("*.safetensors"))
        tensors = load_file(file)
        last = sorted(tensors)[-1]
        tensors[last].view(-1)[-1] += 0.125  # a single value
        save_file(tensors, file, {"format": "pt"})

    return change


def other_scheduler(**settings: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        file = base / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def other_setting(file: str, **settings: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | settings))

    return change


def other_ids(base: Path) -> None:
    """Swaps the ids of two letters in the vocabulary."""
    file = base / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights("unet"), "real_score weights float32:"),
        (other_weights("text_encoder"), "family.text_encoders.0 weights float32:"),
        (
            other_scheduler(prediction_type="v_prediction"),
            "prediction_type epsilon, and this run has v_prediction",
        ),
        (other_scheduler(beta_end=0.013), "noise schedule "),
        (other_setting("unet/config.json", freq_shift=1), "freq_shift 0 of ema"),
    ],
    ids=["U-Net", "text encoder", "prediction type", "schedule", "setting"],
)
def test_another_base_is_refused(
    resume: Callable[..., tuple[int, str]], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    change(tmp_path / "base")
    before = written(tmp_path / "run")
    code, said = resume()
    assert code == 2
    assert f"the checkpoint was written with {message}" in said
    assert "Set back the " in said
    assert written(tmp_path / "run") == before  # config.yaml too is still that of the run


@pytest.mark.parametrize("place", ["family", "student"])
def test_another_conditioning_timestep_is_refused(resume: Callable[..., tuple[int, str]], place: str) -> None:
    def change(config: dict[str, Any]) -> None:
        config["model"]["init_args"][place]["init_args"]["conditioning_timestep"] = 399

    code, said = resume(change)
    assert code == 2
    assert "written with timesteps [999], and this run has [399]" in said


def test_guidance_may_change_and_is_listed(resume: Callable[..., tuple[int, str]]) -> None:
    def change(config: dict[str, Any]) -> None:
        config["model"]["init_args"]["distribution_matching"] = {"guidance_scale": 2.5}

    code, said = resume(change)
    assert code == 0
    assert "model.init_args.distribution_matching.init_args.guidance_scale: " in said
    assert " -> 2.5" in said


def test_other_networks_are_refused_in_a_sentence(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    def sgd(config: dict[str, Any]) -> None:
        config["model"]["init_args"]["student"]["init_args"]["optimizer"] = {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.1},
        }

    code, said = resume(sgd)
    assert code == 2
    assert (
        "optimizers are student AdamW, fake_score AdamW, and this run's are student SGD, fake_score AdamW"
        in said
    )

    def constant(config: dict[str, Any]) -> None:
        del config["model"]["init_args"]["fake_score"]["init_args"]["lr_scheduler"]

    code, said = resume(constant)
    assert code == 2
    assert (
        "learning rate schedules are student TwoPhaseLR, fake_score TwoPhaseLR, and this run's are student TwoPhaseLR, "
        "fake_score none" in said
    )

    code, said = resume(partial(narrow, folder=tmp_path))
    assert code == 2
    assert "was written with block_out_channels [8, 8] of" in said and "and this run has [4, 4]" in said


def narrow(config: dict[str, Any], folder: Path) -> None:
    """A student of half the base's width."""
    settings = json.loads((folder / "base" / "unet" / "config.json").read_text())
    widths = [width // 2 for width in settings["block_out_channels"]]
    settings |= {"block_out_channels": widths, "norm_num_groups": settings["norm_num_groups"] // 2 or 1}
    UNet2DConditionModel.from_config(settings).save_pretrained(folder / "narrow")
    config["model"]["init_args"]["student"]["init_args"]["weights"] = str(folder / "narrow")


def test_a_checkpoint_without_average_is_refused_and_one_without_identity_resumes(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    newest = folders.newest_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    original = torch.load(newest / folders.STATE, weights_only=True)
    old = {name: value for name, value in original.items() if name != "run"}
    torch.save(old, tmp_path / "run" / "old.ckpt")
    assert resume(None, str(tmp_path / "run" / "old.ckpt"))[0] == 0
    code, said = resume(partial(narrow, folder=tmp_path), str(tmp_path / "run" / "old.ckpt"))
    assert code == 2 and "has another architecture: " in said
    old["state_dict"] = {name: one for name, one in old["state_dict"].items() if not name.startswith("ema.")}
    torch.save(old, tmp_path / "run" / "no_ema.ckpt")
    code, said = resume(None, str(tmp_path / "run" / "no_ema.ckpt"), updates=9)
    assert code == 2
    assert "the checkpoint holds no ema (but fake_score, student)" in said


@pytest.mark.parametrize("network", ["text encoder", "VAE", "feature network of a term"])
def test_networks_of_terms_and_those_that_load_on_first_use_are_compared(
    base: Callable[[str], Path], tmp_path: Path, network: str
) -> None:
    """What was in use when the checkpoint was written is in its identity, and is loaded to compare it."""
    folder, dinov2 = tmp_path / "base", save_dinov2(tmp_path / "dinov2")
    shutil.copytree(base("sd-epsilon"), folder)

    def stage() -> OneStepDistillation:
        features = PixelFeatures(Dinov2Features(str(dinov2), [0, 1], 32))
        settings = {
            "feature_matching": FeatureMatching(),
            "features": features,
            "pairs": PairSettings(count=2),
        }
        schedule = UpdateSchedule(max_student_updates=9, warmup_updates=2)
        return built(distillation(folder, gan=False, update_schedule=schedule, **settings))

    used = stage()
    used.family.decode(torch.zeros(1, *used.family.latent_shape()))
    used.family.encode_prompts([""])
    names = {
        "text encoder": "family.text_encoders.0",
        "VAE": "family.vae",
        "feature network of a term": "terms.warmup.feature_matching.features.image_features.network",
    }
    before = identity_of(used)["frozen weights"]
    assert before.keys() == {"real_score", *names.values()}
    assert identity_of(stage(), frozen_like=before)["frozen weights"] == before
    if network == "feature network of a term":
        other_weights("dinov2")(tmp_path)
    else:
        other_weights(network.lower().replace(" ", "_"))(folder)
    now = identity_of(stage(), frozen_like=before)["frozen weights"]
    assert {name for name in before if now[name] != before[name]} == {names[network]}


def test_what_weights_do_not_tell_is_compared(base: Callable[[str], Path], tmp_path: Path) -> None:
    """Heads, activations, the scale of latents and token ids: with the same weights the base is another one."""
    folder = tmp_path / "base"
    shutil.copytree(base("sd-epsilon"), folder)

    def identity(like: dict[str, Any]) -> dict[str, Any]:
        stage = built(distillation(folder, gan=False))
        if not like:
            assert "tokenizers" not in identity_of(stage)  # which no prompt has needed yet
            stage.family.encode_prompts([""])
        return identity_of(stage, like.get("frozen weights", ()), with_tokenizers=bool(like))

    before = identity({})
    assert identity(before) == before
    changes: dict[str, dict[str, Any]] = {
        "unet": {"attention_head_dim": 1, "freq_shift": 1},
        "text_encoder": {"hidden_act": "relu"},
        "vae": {"scaling_factor": 7.5},
    }
    for name, settings in changes.items():
        other_setting(f"{name}/config.json", **settings)(folder)
    other_ids(folder)
    now = identity(before)
    changed = {name for name in before if now[name] != before[name]}
    assert changed == {"network settings", "latent scale", "tokenizers"}
    own, others = before["network settings"], now["network settings"]
    found = {name: {key for key in own[name] if own[name][key] != others[name][key]} for name in own}
    heads = set(changes["unet"])
    assert found == {
        "real_score.unet": heads,
        "student.denoiser.unet": heads,
        "fake_score.denoiser.unet": heads,
        "ema.denoiser.unet": heads,
        "family.text_encoders.0": {"hidden_act"},
    }
    message = compare_settings(own, others)
    assert message == "attention_head_dim 2 of ema.denoiser.unet, and this run has 1"
    # What only one side has is a setting of another version of a library.
    assert compare_settings({"a": {"x": 1, "old": 2}}, {"a": {"x": 1, "new": 3}, "b": {}}) is None


def test_tokenizers_are_told_apart_by_ids_and_lengths(base: Callable[[str], Path], tmp_path: Path) -> None:
    digests = []
    for number, change in enumerate(
        (None, other_ids, other_setting("tokenizer/tokenizer_config.json", model_max_length=5))
    ):
        folder = shutil.copytree(base("sd-epsilon"), tmp_path / str(number))
        if change is not None:
            change(folder)
        digests.append(StableDiffusion(str(folder)).tokenizer_digest(load=True))
    assert len(set(digests)) == 3


@pytest.mark.parametrize("changed", [False, True])
def test_weights_in_bfloat16_are_compared_with_those_in_float32(
    base: Callable[[str], Path], tmp_path: Path, changed: bool
) -> None:
    """Text encoders are loaded in the run's precision in training, and before it is known when a run resumes."""
    folder = tmp_path / "base"
    shutil.copytree(base("sd-epsilon"), folder)

    def identity(dtype: torch.dtype, like: Any = ()) -> dict[str, Any]:
        stage = built(distillation(folder, gan=False))
        stage.family.to("cpu", dtype)
        if not like:
            stage.family.encode_prompts([""])
        return identity_of(stage, like)

    saved = identity(torch.bfloat16)
    if changed:
        other_weights("text_encoder")(folder)
    now = identity(torch.float32, saved["frozen weights"])
    difference, lines = compare_weights(saved, now)
    assert not lines and (difference is not None) == changed
    if changed:
        assert difference is not None
        assert (
            difference.startswith("family.text_encoders.0 weights bfloat16:")
            and "loaded float32:" in difference
        )
        return
    for other in (saved | {"frozen weights in bfloat16": {}}, identity(torch.float16)):
        found, lines = compare_weights(other, now)
        dtype = other["frozen weights"]["family.text_encoders.0"].split(":")[0]
        assert found is None
        assert lines == [
            f"family.text_encoders.0 weights: {dtype} -> float32 (other bits, so they were not compared)"
        ]


# -------------------------------------------------------------------------------------------------------------- settings


def test_new_learning_rates_and_schedules_are_applied_and_said(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        arguments = config["model"]["init_args"]
        arguments["student"]["init_args"]["optimizer"]["init_args"] = {"lr": 5e-4, "weight_decay": 0.3}
        arguments["fake_score"]["init_args"]["lr_scheduler"]["init_args"]["total_updates"] = 4

    code, said = resume(change)
    assert code == 0
    assert "student: lr 0.001 -> 0.0005" in said
    assert "student: weight_decay 0.01 -> 0.3" in said
    assert "fake_score: lr by the schedule, now " in said
    student, fake_score = (state["param_groups"][0] for state in saved(tmp_path)["optimizer_states"])
    # After three updates, half a cosine from lr to lr / 2 over 10 updates (student), over 4 (fake score).
    assert student["lr"] == pytest.approx(5e-4 * 0.896947, rel=1e-5)
    assert student["weight_decay"] == 0.3
    assert fake_score["lr"] == pytest.approx(1e-3 * 0.573223, rel=1e-5)


class _Trainer:
    """Of a Trainer what `settings_of` reads."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.optimizers = [optimizer]
        self.lr_scheduler_configs = (
            [] if scheduler is None else [type("Config", (), {"scheduler": scheduler})]
        )


@pytest.mark.parametrize("kind", ["none", "lambda", "cosine", "step"])
@pytest.mark.parametrize("old_version", [False, True])
def test_a_restored_schedule_goes_on_as_if_begun_with_the_new_rate(kind: str, old_version: bool) -> None:
    def build(lr: float, gamma: float = 0.1, period: int = 10) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=lr)
        schedulers: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "lambda": lambda: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            "cosine": lambda: CosineAnnealingLR(optimizer, T_max=period),
            "step": lambda: StepLR(optimizer, step_size=2, gamma=gamma),
        }
        return optimizer, schedulers[kind]()

    def steps(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> float:
        for _ in range(count):
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return float(optimizer.param_groups[0]["lr"])

    old, old_schedule = build(1e-3)
    (before,) = settings_of(_Trainer(old, old_schedule))  # type: ignore[arg-type]
    steps(old, old_schedule, 3)
    changed: dict[str, Any] = {} if old_version else {"gamma": 0.5, "period": 8}
    new, new_schedule = build(2e-4, **changed)
    (now,) = settings_of(_Trainer(new, new_schedule))  # type: ignore[arg-type]
    new.load_state_dict(old.state_dict())
    if new_schedule is not None:
        new_schedule.load_state_dict(old_schedule.state_dict())
    if old_version:
        before = {"groups": [{k: v for k, v in old.param_groups[0].items() if k != "params"}]}
    assert apply_settings(new, new_schedule, before, now)
    wanted = build(2e-4, **changed)
    assert steps(*wanted, 3) == pytest.approx(float(new.param_groups[0]["lr"]), rel=1e-9)
    assert steps(*wanted, 3) == pytest.approx(steps(new, new_schedule, 3), rel=1e-9)


# -------------------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("damage", ["bit", "zeros", "zeros without checksums"])
def test_a_changed_checkpoint_is_passed_over_for_an_older_one(
    resume: Callable[..., tuple[int, str]], tmp_path: Path, damage: str
) -> None:
    newest = folders.newest_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    content = bytearray((newest / folders.STATE).read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 4
    else:
        content = bytearray(len(content))
    (newest / folders.STATE).write_bytes(content)
    if "without" in damage:
        manifest = folders.read_manifest(newest)
        assert manifest is not None
        first_version = manifest._replace(checksums=None, own_checksum=None)._asdict()
        (newest / folders.MANIFEST).write_text(json.dumps(first_version))
    code, said = resume(None, str(newest))
    assert code == 2
    assert (
        f"the checkpoint {newest} has changed since it was written (state.ckpt cannot be read, or does not match its checksum)"
        in said
    )
    code, said = resume(None, "auto", updates=2)
    assert code == 0
    assert f"resume: resuming from {newest.with_name('update_00000001-batch_00000001')} instead." in said
    assert "nothing to do" not in said  # though it ends where the damaged checkpoint is
    assert checkpoints(tmp_path)[-1] == "update_00000002-batch_00000002"
    content[len(content) // 2] ^= 4
    (newest / folders.STATE).write_bytes(content)
    older = newest.with_name("update_00000001-batch_00000001") / folders.STATE
    older.write_bytes(bytes(len(older.read_bytes())))
    code, said = resume(None, "auto")
    assert code == 2
    assert "; every other one has too." in said


def test_a_clock_that_is_ahead_deletes_nothing(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    first = folder / "update_00000001-batch_00000001"
    manifest = folders.read_manifest(first)
    assert manifest is not None
    ahead = manifest._replace(saved_at=manifest.saved_at + 3600).with_checksum()
    (first / folders.MANIFEST).write_text(json.dumps(ahead._asdict()))

    def keep_one(config: dict[str, Any]) -> None:
        config["trainer"]["callbacks"][1]["init_args"]["keep"] = 1

    assert folders.newest_complete_checkpoint(folder) == folder / "update_00000002-batch_00000002"
    assert resume(keep_one)[0] == 0
    assert checkpoints(tmp_path) == ["update_00000003-batch_00000003"]


def test_a_run_that_went_back_keeps_what_it_writes_now(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """By counters alone the abandoned update 9 would be newer than the update 2 that follows update 1 anew."""
    folder = tmp_path / "run" / "checkpoints"
    (folder / "update_00000002-batch_00000002").rename(folder / "update_00000009-batch_00000009")
    abandoned = folder / "update_00000009-batch_00000009"
    manifest = folders.read_manifest(abandoned)
    assert manifest is not None
    later = manifest._replace(student_updates=9, iterations=9, batches=9).with_checksum()
    (abandoned / folders.MANIFEST).write_text(json.dumps(later._asdict()))
    assert resume(None, str(folder / "update_00000001-batch_00000001"), updates=2)[0] == 0
    assert checkpoints(tmp_path) == ["update_00000009-batch_00000009", "update_00000002-batch_00000002"]


def test_a_manifest_that_has_changed_is_no_manifest(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """One flipped bit in a counter of the older checkpoint would make it the newest, and `keep` would delete the other."""
    folder = shutil.copytree(trained[0] / "run" / "checkpoints", tmp_path / "checkpoints")
    older, newest = folders.complete_checkpoints(folder)
    file = older / folders.MANIFEST
    content = file.read_text()
    for name in ("starts", "batches", "student_updates", "saved_at"):
        digit = re.search(rf'"{name}": (\d)', content)
        assert digit is not None
        place = digit.start(1)
        file.write_text(content[:place] + chr(ord(content[place]) ^ 4) + content[place + 1 :])
        assert folders.complete_checkpoints(folder) == [newest]
        assert folders.incomplete_checkpoints(folder) == [older]
    file.write_text(content)
    assert folders.complete_checkpoints(folder) == [older, newest]


def test_a_checkpoint_with_a_missing_part_is_passed_over_and_said(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    newest = folders.newest_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    os.truncate(newest / folders.STATE, 1000)
    code, said = resume(updates=2)
    assert code == 0
    assert f"resume: not complete in '{newest.parent}' (a file is missing or shorter" in said
    assert (
        f"left there: {newest.name}; the newest complete checkpoint is update_00000001-batch_00000001."
        in said
    )
    assert "nothing to do" not in said


def test_checkpoints_of_another_run_are_not_mixed_with_its_own(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """With `keep` they would be deleted one after the other."""
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    other = tmp_path / "other" / "checkpoints" / "update_00000001-batch_00000001"
    before = checkpoints(tmp_path)
    code, said = resume(None, str(other))
    assert code == 2
    assert f"holds checkpoints of an earlier run (newest: {before[-1]}), and --ckpt_path '{other}" in said
    assert refused_beside_logs(resume, tmp_path)
    assert checkpoints(tmp_path) == before


def test_a_finished_run_says_so(resume: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, said = resume(updates=2)
    assert code == 0
    assert "nothing to do: the checkpoint" in said
    assert "(student update 2)" in said


# -------------------------------------------------------------------------------------------------------------- the lock


def test_two_runs_in_one_folder_are_refused(resume: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """The lock of a living process of this host: the one that started this test."""
    lock = tmp_path / "run" / LOCK
    assert not lock.exists()  # given back by the run that made the checkpoints
    owner = run_folder._this_process() | {
        "pid": os.getppid(),
        "started_at": run_folder._started_at(os.getppid()),
    }
    lock.write_text(json.dumps(owner))
    code, said = resume()
    assert code == 2
    assert f"is in use by another run (process {os.getppid()} on host {owner['host']}" in said
    assert lock.exists()
    assert refused_beside_logs(resume, tmp_path) and lock.exists()
    lock.write_text(json.dumps(owner | {"started_at": "1"}))  # the number was given to another process since
    code, said = resume()
    assert code == 0
    assert "is stale and was removed" in said
    assert not lock.exists()


def test_a_lock_of_another_host_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_folder, "WATCH_SECONDS", 0.6)
    alive = RunLock(tmp_path)
    assert alive.acquire() is None
    own = run_folder._this_process()
    monkeypatch.setattr(run_folder, "_this_process", lambda: own | {"host": "elsewhere"})
    problem = RunLock(tmp_path).acquire()
    assert problem is not None and f"process {os.getpid()} on host {own['host']}" in problem
    alive._released.set()  # killed: the file stays, and nobody touches it
    os.utime(tmp_path / LOCK, (2e9, 2e9))  # a clock that is ahead by years
    second = RunLock(tmp_path)
    assert second.acquire() is None
    alive.release()
    assert (tmp_path / LOCK).exists()  # it is not the first one's any more
    # An earlier start of the same SLURM job, on another node, is over.
    monkeypatch.setattr(
        run_folder, "_this_process", lambda: own | {"host": "third", "job": "7", "restart": "1"}
    )
    (tmp_path / LOCK).write_text(json.dumps(own | {"job": "7", "restart": "0"}))
    third = RunLock(tmp_path)
    assert third.acquire() is None
    second.release()
    third.release()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_container_of_this_host_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers may share the host's name and not its process ids: this process does not exist in the other one."""
    monkeypatch.setattr(run_folder, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_folder, "WATCH_SECONDS", 0.6)
    alive = RunLock(tmp_path)
    assert alive.acquire() is None
    own = run_folder._this_process()
    monkeypatch.setattr(run_folder, "_this_process", lambda: own | {"namespace": "pid:[1]", "pid": 1})
    monkeypatch.setattr(run_folder, "_started_at", lambda pid: None)
    problem = RunLock(tmp_path).acquire()
    assert problem is not None and f"process {os.getpid()}" in problem
    alive.release()


def test_a_lock_that_was_replaced_meanwhile_is_not_removed(tmp_path: Path) -> None:
    """Two starts find the same stale lock: the first replaces it, the second must not remove the first one's."""
    stale = {"host": "gone", "pid": 3}
    (tmp_path / LOCK).write_text(json.dumps({"host": "first", "pid": 7}))
    RunLock(tmp_path)._remove(stale)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert json.loads((tmp_path / LOCK).read_text()) == {"host": "first", "pid": 7}
    (tmp_path / LOCK).write_text(json.dumps(stale))
    RunLock(tmp_path)._remove(stale)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "1"}
            | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
            "the launcher started 2 processes, but trainer.num_nodes 1 x trainer.devices 1 are 1; start one process per device "
            "(sbatch --ntasks-per-node, torchrun --nproc-per-node), or change trainer.num_nodes and trainer.devices.",
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
            | {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "the launcher started 2 processes, but trainer.num_nodes 1 x trainer.devices 1 are 1; ",
        ),
    ],
    ids=["SLURM", "torchrun"],
)
def test_the_launcher_started_as_many_processes_as_the_configuration_has(
    resume: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    """Else each of them would train by itself, in one folder."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, said = resume()
    assert (code, message in said) == (2, True)


def test_what_is_no_checkpoint_is_told_from_one(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    folder = tmp_path / "checkpoints" / folders.checkpoint_name(1, 2)
    folders.partial_of(folder).mkdir(parents=True)
    torch.save(["no dict"], folders.partial_of(folder) / folders.STATE)
    folders.seal(folder, 1, 1, 2)
    (folder.parent / "lost+found").mkdir()
    # A manifest with an entry that a later version has added is complete.
    manifest = json.loads((folder / folders.MANIFEST).read_text()) | {"added_later": 1}
    manifest["own_checksum"] = folders.hash_of_entries(manifest)
    (folder / folders.MANIFEST).write_text(json.dumps(manifest))
    for wanted in ("auto", "last", str(folder), str(folder / folders.MANIFEST)):
        assert chosen_checkpoint(trainer, wanted) == str(folder / folders.STATE), wanted
    for wanted in (str(folder.parent), ""):
        with pytest.raises(UserError, match=r"is a folder, and not of a checkpoint; give one like 'update_"):
            chosen_checkpoint(trainer, wanted)
    for foreign in (folder / folders.STATE, folder / folders.MANIFEST):
        with pytest.raises(UserError, match=f"'{foreign}' is not a checkpoint of this program"):
            read_state(foreign)
    shutil.rmtree(folder)
    assert chosen_checkpoint(trainer, "auto") is None  # the other folder is no damaged checkpoint
