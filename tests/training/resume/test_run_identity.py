"""What a resumed run must share with its checkpoint, and what may change and is listed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from data.conditions import Canny, Sketch
from data.shards.datamodule import ShardDataModule
from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.run_identity import compare_settings, compare_weights, identity_of
from sdxs_lightning.core.image_condition import ImageCondition
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.networks.image_features import Dinov2Features
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.matched_features import PixelFeatures
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.resumed_run import checkpoints, written
from tests.helpers.tiny_decoding import save_dinov2
from tests.helpers.tiny_distillation import built, distillation


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


def test_what_makes_condition_images_is_compared(base: Callable[[str], Path]) -> None:
    stage: Any = built(distillation(base("sd-epsilon"), gan=False))
    contents: Any = ["images", "control_images"]

    def found(condition: ImageCondition | None) -> Any:
        data = ShardDataModule("shards", 4, contents=contents, condition=condition)
        stage._trainer = SimpleNamespace(datamodule=data)
        return identity_of(stage).get("condition images by")

    canny = found(Canny(low=50))
    assert canny == "Canny(low=50, high=200, vary=0.0)" == found(Canny(low=50))
    assert found(None) == "nobody, since the shards bring them"
    stage.condition = Canny(low=70)  # of pairs
    assert (found(None), found(Canny(low=50))) == ("Canny(low=70, high=200, vary=0.0)", canny)
    assert len({canny, found(Canny(low=60)), found(Sketch())}) == 3


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


def test_fingerprints_of_an_older_version_are_not_compared_which_is_said() -> None:
    saved = {"frozen weights": {"teacher": "float32:0123456789abcdef"}}
    now = {"frozen weights": {"teacher": "float32:2:0123456789abcdef"}}
    assert compare_weights(saved, now) == (
        None,
        ["teacher weights (the checkpoint is of an older version, so they were not compared)"],
    )


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
