"""Objectives of a user's own file, and subclasses of the project's classes, through the real command line."""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.cli import _build, main
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.networks.network import no_param_grad
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.term import term_gradients
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from tests.helpers.tiny_distillation import built, sample_of
from tests.helpers.tiny_run import tiny_config, write_config

USER_FILE = '''
from dataclasses import dataclass

from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.term import StudentTerm
from sdxs_lightning.stages.distillation.step import OneStepDistillation


def score_identity(settings, alpha, sample, context):
    """SiD, arXiv:2404.04057, in latents and without its weighting: gradients through both scores and the re-noised sample."""
    noisy = sample.renoise(context.schedule, settings.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
    scale = settings.guidance_scale
    real = context.real_score.guided(noisy.latents, noisy.timesteps, sample.conditioning, scale).pred_x0
    fake = context.fake_score.predict(noisy.latents, noisy.timesteps, sample.conditioning).pred_x0
    loss = ((real - fake) * (real - sample.latents - alpha * (real - fake))).mean()
    return settings.weight * loss


@dataclass(frozen=True)
class ScoreIdentity(StudentTerm):
    """A term of its own."""

    weight: float = 1.0
    alpha: float = 1.2
    guidance_scale: float = 1.5
    timesteps: TimestepRange = TimestepRange(20, 980)

    needs_real_score = True
    needs_fake_score = True

    def __call__(self, sample, context):
        loss = score_identity(self, self.alpha, sample, context)
        return loss, {"sid": loss}


@dataclass(frozen=True)
class Sid(DistributionMatching):
    """The same in the place of distribution matching."""

    alpha: float = 1.2

    def __call__(self, sample, context):
        loss = score_identity(self, self.alpha, sample, context)
        return loss, {"sid": loss}


@dataclass(frozen=True)
class Shrink(StudentTerm):
    """Needs nothing."""

    weight: float = 0.1
    phase: str = "distillation"

    def __call__(self, sample, context):
        loss = self.weight * sample.latents.square().mean()
        return loss, {"shrink": loss}


class ImageMean(Shrink):
    """Needs images."""

    needs_images = True


class MyStage(OneStepDistillation):
    """A stage with an option more."""

    def __init__(self, shrink: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.shrink = shrink
'''

SID = {"class_path": "mine.ScoreIdentity", "init_args": {"alpha": 1.0}}
SHRINK = {"class_path": "mine.Shrink"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_config(tmp_path_factory.mktemp("tiny"), max_student_updates=2)


@pytest.fixture
def config(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """The tiny run, with a user's file `mine.py` in the working folder and rows of metrics for every batch."""
    (tmp_path / "mine.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    changed = copy.deepcopy(plain)
    changed["trainer"] |= {
        "default_root_dir": str(tmp_path / "run"),
        "log_every_n_steps": 1,
        "logger": {
            "class_path": "sdxs_lightning.training.csv_log.RunCSVLogger",
            "init_args": {"save_dir": str(tmp_path)},
        },
    }
    yield changed
    sys.modules.pop("mine", None)


def arguments_of(config: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = config["model"]["init_args"]
    return arguments


def files(*configs: dict[str, Any]) -> list[str]:
    """Command line of several configuration files."""
    paths = [write_config(Path(f"{index}.yaml"), config) for index, config in enumerate(configs)]
    return ["--trust=mine", *(part for path in paths for part in ("--config", str(path)))]


def overlay(**arguments: Any) -> dict[str, Any]:
    return {"model": {"init_args": arguments}}


def stage(*configs: dict[str, Any], flags: tuple[str, ...] = ()) -> OneStepDistillation:
    """What the command line builds."""
    model = _build([*files(*configs), *flags]).model
    assert isinstance(model, OneStepDistillation)
    return model


def rows(folder: Path = Path()) -> list[dict[str, str]]:
    """Of the log."""
    with (folder / "logs" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights_of_newest(folder: Path) -> dict[str, torch.Tensor]:
    newest = folders.newest_complete_checkpoint(folder / "checkpoints")
    assert newest is not None
    loaded: dict[str, torch.Tensor] = torch.load(newest / folders.STATE, weights_only=True)["state_dict"]
    return loaded


def test_a_term_of_a_users_file_trains_beside_the_others(config: dict[str, Any]) -> None:
    assert main(files(config, overlay(objectives={"sid": SID}))) == 0
    for row in rows():
        assert abs(float(row["student/sid"])) > 0 and float(row["student/gradient_norm_sid"]) > 0
        assert -1 <= float(row["student/cosine_distribution_matching_sid"]) <= 1
    assert len(rows()) == 2


def test_sid_replaces_the_score_difference(config: dict[str, Any]) -> None:
    changes = overlay(objectives={"sid": SID}, distribution_matching=None)
    module = built(stage(config, changes))
    sid: Any = module.terms.distillation["sid"]
    assert list(module.terms.distillation) == ["sid"] and module.real_score is not None
    with torch.no_grad():  # a fake score that differs from the real one
        module.get_submodule("fake_score.denoiser.unet").conv_in.weight.mul_(1.2)  # type: ignore[union-attr,operator]
    sample, context = sample_of(module), module.context
    with no_param_grad(module.fake_score):
        found = term_gradients(module.terms.distillation, sample, context)[0]["sid"]
    noisy = sample.renoise(context.schedule, sid.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
    assert context.real_score is not None and context.fake_score is not None
    real = context.real_score.guided(noisy.latents, noisy.timesteps, sample.conditioning, 1.5).pred_x0
    fake = context.fake_score.predict(noisy.latents, noisy.timesteps, sample.conditioning).pred_x0
    difference = real - fake
    loss = (difference * (real - sample.latents - difference)).mean()
    (expected,) = torch.autograd.grad(loss, sample.latents, retain_graph=True)
    torch.testing.assert_close(found, expected)
    # With the scores held constant only -(real - fake) / elements is left: the rest came through both networks.
    assert (expected + difference.detach() / difference.numel()).norm() > 0.1 * expected.norm()
    assert main(files(config, changes)) == 0
    assert "student/distribution_matching" not in rows()[0] and float(rows()[1]["student/gradient_norm"]) > 0


def test_entries_merge_over_files_and_null_removes_one(config: dict[str, Any]) -> None:
    first = overlay(objectives={"sid": SID, "shrink": SHRINK})
    second = overlay(objectives={"sid": {"init_args": {"weight": 0.25}}, "more": SHRINK})
    module = stage(config, first, second)
    assert list(module.terms.distillation) == ["distribution_matching", "sid", "shrink", "more"]
    sid: Any = module.terms.distillation["sid"]
    assert (sid.weight, sid.alpha, sid.timesteps) == (0.25, 1.0, TimestepRange(20, 980))
    assert module.terms.warmup == {}
    third = overlay(objectives={"shrink": None})
    flags = (
        "--model.init_args.objectives.sid.init_args.alpha",
        "0.5",
        "--model.init_args.objectives.more",
        "null",
    )
    module = stage(config, first, second, third, flags=flags)
    sid = module.terms.distillation["sid"]
    assert list(module.terms.distillation) == ["distribution_matching", "sid"]
    assert (sid.weight, sid.alpha) == (0.25, 0.5)


def test_a_subclass_of_settings_takes_their_place(config: dict[str, Any]) -> None:
    fields = overlay(distribution_matching={"guidance_scale": 3.0, "timesteps": {"low": 10, "high": 900}})
    named = overlay(distribution_matching={"class_path": "mine.Sid", "init_args": {"alpha": 0.7}})
    module = stage(config, fields, named, overlay(distribution_matching={"weight": 0.5}))
    term: Any = module.terms.distillation["distribution_matching"]
    assert type(term).__name__ == "Sid" and DistributionMatching in type(term).__mro__
    assert (term.alpha, term.guidance_scale, term.weight) == (0.7, 3.0, 0.5)
    assert term.timesteps == TimestepRange(10, 900)
    assert main(files(config, named)) == 0
    assert float(rows()[0]["student/sid"]) != 0
    # The saved configuration resolves to the same stage.
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    again: Any = stage(saved).terms.distillation["distribution_matching"]
    assert (type(again).__name__, again.alpha) == ("Sid", 0.7)


def test_an_overlay_of_the_class_alone_keeps_the_arguments(config: dict[str, Any]) -> None:
    arguments_of(config)["ema_decay"] = 0.25
    module: Any = stage(config, {"model": {"class_path": "mine.MyStage"}})
    assert type(module).__name__ == "MyStage" and (module.shrink, module.ema_decay) == (0.5, 0.25)
    module = stage(config, {"model": {"class_path": "mine.MyStage", "init_args": {"shrink": 2.0}}})
    assert (module.shrink, module.ema_decay) == (2.0, 0.25)


def test_a_resumed_run_equals_an_uninterrupted_one(config: dict[str, Any], tmp_path: Path) -> None:
    arguments = arguments_of(config)
    arguments["objectives"] = {"sid": SID, "shrink": SHRINK}
    assert main(files(config)) == 0
    arguments["update_schedule"]["max_student_updates"] = 4
    assert main([*files(config), "--ckpt_path", "last"]) == 0
    resumed, resumed_rows = weights_of_newest(Path("run")), rows()
    config["trainer"]["default_root_dir"] = str(tmp_path / "whole")
    assert main(files(config)) == 0
    whole = weights_of_newest(Path("whole"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    # One curve: the log of both starts is that of one, and the new run did not write over it.
    assert len(resumed_rows) == 4 and resumed_rows == rows()
    assert Path("logs/metrics-1.csv").is_file()


def test_the_memory_plan_runs_it(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments_of(config)["objectives"] = {"sid": SID}
    assert main([*files(config), "--plan", "--plan_gpu_gb", "80"]) == 0
    assert "student's iteration" in capsys.readouterr().out


def test_plain_dmd_is_a_configuration(config: dict[str, Any]) -> None:
    """DMD, arXiv:2311.18828: the score difference and the regression side by side, without a warm-up."""
    pairs = {"count": 4, "sampler_steps": 2, "sampler_batch_size": 4}
    dmd = overlay(pairs=pairs, regression={"weight": 0.25, "phase": "distillation"})
    module = stage(config, dmd)
    assert list(module.terms.distillation) == ["distribution_matching", "regression"]
    assert module.terms.warmup == {} and module.pairs_are_needed
    assert main(files(config, dmd)) == 0
    for row in rows():
        assert float(row["student/regression"]) > 0 and float(row["student/gradient_norm_regression"]) > 0
        assert float(row["student/gradient_norm_distribution_matching"]) > 0
    always = stage(
        config, dmd, overlay(regression={"phase": "always"}, update_schedule={"warmup_updates": 1})
    )
    assert isinstance(always.terms.warmup["regression"], Regression)
    assert always.terms.warmup["regression"] is always.terms.distillation["regression"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"regression": {"phase": "distillation"}},
            "objective regression needs pairs: set model.init_args.pairs, or regression to null",
        ),
        (
            {
                "objectives": {"regression": SHRINK},
                "regression": {"phase": "distillation"},
                "pairs": {"count": 4},
            },
            "objectives.regression has the name of a built-in objective that is set",
        ),
        (
            {"objectives": {"shrink": SHRINK | {"init_args": {"phase": "later"}}}},
            "phase of objective shrink is 'later', accepted are 'warmup', 'distillation' and 'always'",
        ),
        ({"objectives": {"shrink": {"class_path": "mine.Shrnk"}}}, "Shrnk"),
        ({"objectives": {"shrink": SHRINK | {"init_args": {"wieght": 1}}}}, "wieght"),
        ({"distribution_matching": {"wieght": 1}}, "wieght is not an option (did you mean weight?)"),
        (
            {"objectives": {"mean": {"class_path": "mine.ImageMean"}}},
            "objective mean needs images, and the batch has none: let data.contents name images, or set mean to null",
        ),
    ],
)
def test_what_is_missing_is_refused_in_a_sentence(
    config: dict[str, Any], capfd: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    code = main(files(config, overlay(**arguments)))
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], errors


def test_a_row_of_the_log_holds_what_was_computed_since_the_row_before(config: dict[str, Any]) -> None:
    """Two warm-up updates, an iteration without the student, then the student on every second iteration."""
    arguments = arguments_of(config)
    arguments["update_schedule"] |= {
        "max_student_updates": 4,
        "warmup_updates": 2,
        "fake_score_only_iterations": 1,
        "fake_score_updates_per_student_update": 2,
    }
    arguments |= {"pairs": {"count": 4, "sampler_steps": 2, "sampler_batch_size": 4}, "regression": {}}
    assert main(files(config)) == 0
    filled = {
        name: [bool(row[f"{name}"]) for row in rows()]
        for name in (
            "student/regression",
            "student/gradient_norm",
            "student/lr",
            "student/distribution_matching",
            "fake_score/loss",
            "student/std",
        )
    }
    student = [True, True, False, True, False, True]
    assert filled == {
        "student/regression": [True, True, False, False, False, False],
        "student/gradient_norm": student,
        "student/lr": student,
        "student/distribution_matching": [False, False, False, True, False, True],
        "fake_score/loss": [False, False, True, True, True, True],
        "student/std": [True] * 6,
    }
    config["trainer"] |= {"log_every_n_steps": 3, "default_root_dir": "sparse"}
    config["trainer"]["logger"]["init_args"]["save_dir"] = "sparse"
    assert main(files(config)) == 0
    sparse = rows(Path("sparse"))
    assert [row["student/regression"] for row in sparse] == [rows()[1]["student/regression"], ""]
    assert [row["student/gradient_norm"] for row in sparse] == [
        rows()[1]["student/gradient_norm"],
        rows()[5]["student/gradient_norm"],
    ]
