"""f-divergence weighting in the step of real U-Nets, of SD and SDXL kind, and in a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxs_lightning.cli import main
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.f_divergence import Divergence, FDivergence, divergence_weight
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from tests.helpers.tiny_distillation import KINDS, built, distillation, fit, moved, sample_of, weights
from tests.helpers.tiny_run import tiny_config, write_config

Base = Callable[[str], Path]
MATCHING = DistributionMatching(f_divergence=FDivergence("forward_kl"))


def with_loud_head(module: OneStepDistillation) -> OneStepDistillation:
    """A fresh head says nearly the same of every sample; a louder one tells them apart."""
    read_out = module.get_submodule("discriminator.head")[-1]  # type: ignore[index]
    with torch.no_grad():
        read_out.weight.mul_(30)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_weighted_by_the_ratio_that_the_discriminator_says(base: Base, kind: str) -> None:
    module = with_loud_head(built(distillation(base(kind), distribution_matching=MATCHING)))
    sample, context = sample_of(module), module.context
    assert context.fake_score is not None and context.discriminator is not None
    calls: list[int] = []
    unet = context.fake_score.denoiser.unet
    unet.register_forward_hook(lambda *_: calls.append(1))
    loss, _ = MATCHING(sample, context)
    assert len(calls) == 1  # features of the pass that is made anyway
    (weighted,) = torch.autograd.grad(loss, sample.latents, retain_graph=True)
    loss, _ = DistributionMatching()(sample, context)
    (plain,) = torch.autograd.grad(loss, sample.latents)

    noisy = sample.renoise(context.schedule, MATCHING.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
    with torch.no_grad():
        features = context.fake_score.features(noisy.latents, noisy.timesteps, sample.conditioning)
        ratio = context.discriminator(features).double().exp().clamp(0.1, 20)
    expected = divergence_weight(ratio, "forward_kl") / ratio.mean()
    assert expected.std().item() > 0.1
    # x - (x - g) of the loss rounds at the size of x: 5e-9 is a two-thousandth of the largest element.
    wanted = plain.double() * expected.view(-1, 1, 1, 1)
    torch.testing.assert_close(weighted.double(), wanted, rtol=1e-3, atol=5e-9)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_trains(base: Base, shards: Path, precision: str) -> None:
    module = with_loud_head(built(distillation(base("sdxl-epsilon"), distribution_matching=MATCHING)))
    before = weights(module)
    fit(module, shards, 2, precision=precision)
    assert module.student_updates == 2
    for role in ("student", "fake_score", "discriminator"):
        assert moved(before, module, role) > 0.9
    assert all(bool(tensor.isfinite().all()) for tensor in module.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gan": False},
            r"adversarial must be set, on features of the fake_score, got null",
        ),
        (
            {"adversarial": DiffusionAdversarial(features="real_score")},
            r"got features of the real_score; change adversarial, or set f_divergence to null",
        ),
        (
            {
                "adversarial": DiffusionAdversarial(timesteps=TimestepRange(0, 500)),
                "denoising": Denoising(timesteps=TimestepRange(0, 500)),
            },
            r"distribution_matching.timesteps are 20 to 980, and the fake score, which it reads there, learns at "
            r"denoising.timesteps 0 to 500 only",
        ),
    ],
)
def test_it_is_refused_without_the_discriminator_that_it_reads(
    base: Base, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distillation(base("sd-epsilon"), distribution_matching=MATCHING, **settings)


@pytest.mark.parametrize(
    ("divergence", "message"),
    [("hellinger", ""), ("total_variation", "divergence is 'total_variation'")],
)
def test_a_configuration_names_it(
    divergence: Divergence, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, max_student_updates=1)
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    networks, objectives = "sdxs_lightning.networks", "sdxs_lightning.objectives"
    config["model"]["init_args"] |= {
        "discriminator": {
            "class_path": f"{networks}.discriminator.Discriminator",
            "init_args": {"optimizer": sgd},
        },
        "adversarial": {"class_path": f"{objectives}.adversarial.DiffusionAdversarial"},
        "distribution_matching": {"f_divergence": {"divergence": divergence}},
    }
    code = main(["--config", str(write_config(tmp_path / "tiny.yaml", config))])
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == (2 if message else 0), errors
    assert len(errors) == (1 if message else 0)
    assert message in "".join(errors)
