"""Feature matching and segmented score distillation in the step: identities, balance, which networks move, resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sdxs_lightning.networks.image_features import Dinov2Features
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.matched_features import EncoderFeatures, PixelFeatures
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.objectives.term import Balance, LatentSample, balanced, compare_gradients, term_gradients
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny_decoding import save_dinov2
from tests.helpers.tiny_distillation import KINDS, built, distillation, fit, moved, sample_of, weights

Base = Callable[[str], Path]

PAIRS = PairSettings(count=8, sampler_steps=2, sampler_batch_size=4)
PLAIN = SegmentedScoreDistillation(alpha_start=1.0, alpha_end=1.0, lambda_start=0.0, lambda_end=0.0)


def segmented(base: Path, **settings: Any) -> OneStepDistillation:
    """The segmented mode on encoder features, without a GAN."""
    defaults: dict[str, Any] = {
        "gan": False,
        "segmented": SegmentedScoreDistillation(),
        "pairs": PAIRS,
        "feature_matching": FeatureMatching(),
        "features": EncoderFeatures(),
    }
    return distillation(base, **defaults | settings)


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_one_and_lambda_zero_are_plain_score_distillation(base: Base, shards: Path, kind: str) -> None:
    plain = distillation(base(kind), gan=False)
    whole = distillation(base(kind), gan=False, segmented=PLAIN)
    for module in (plain, whole):
        fit(module, shards, batches=3)
    after = weights(whole)
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_the_segment_and_the_balance_follow_the_student_updates(base: Base, shards: Path, kind: str) -> None:
    ramp = SegmentedScoreDistillation(alpha_start=0.4, alpha_end=0.1, lambda_start=2.0, lambda_end=0.5)
    update_schedule = UpdateSchedule(max_student_updates=3, fake_score_updates_per_student_update=1)
    module = segmented(base(kind), segmented=ramp, update_schedule=update_schedule)
    seen = _Segments()
    fit(module, shards, batches=3, callbacks=[seen])
    assert module.student_updates == 3
    assert seen.progress == [0.0, 0.5, 1.0]
    for high, timesteps in zip([400, 250, 100], seen.timesteps, strict=True):
        assert timesteps.min() >= 20 and timesteps.max() <= high
    assert seen.ratios == pytest.approx([2.0, 1.25, 0.5], rel=1e-5)


class _Segments(Callback):
    """Which timesteps the real score was called at, and how the two gradients of each iteration compare."""

    def __init__(self) -> None:
        self.timesteps: list[Tensor] = []
        self.progress: list[float] = []
        self.ratios: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, OneStepDistillation) and pl_module.real_score is not None
        denoiser, pair = pl_module.real_score.module, pl_module.real_score.module.unguided_pair

        def spy(latents: Tensor, timesteps: Tensor, conditioning: Any) -> Any:  # of score distillation alone
            self.timesteps.append(timesteps)
            self.progress.append(pl_module.progress)
            return pair(latents, timesteps, conditioning)

        denoiser.unguided_pair = spy  # type: ignore[method-assign,assignment]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        logged = trainer.callback_metrics
        one, other = (
            float(logged[f"student/gradient_norm_{name}"])
            for name in ("feature_matching", "distribution_matching")
        )
        self.ratios.append(one / other)


def test_a_segmented_iteration_moves_student_and_fake_score(base: Base, shards: Path) -> None:
    module = built(segmented(base("sd-epsilon")))
    before = weights(module)
    fit(module, shards, batches=1)
    assert {role: moved(before, module, role) for role in ("student", "fake_score")} == pytest.approx(
        {"student": 1.0, "fake_score": 1.0}, abs=0.01
    )


@pytest.mark.parametrize("pixels", [False, True], ids=["encoder", "pixels"])
def test_warmup_by_feature_matching_alone(base: Base, shards: Path, tmp_path: Path, pixels: bool) -> None:
    features: Any = EncoderFeatures()
    if pixels:
        features = PixelFeatures(Dinov2Features(str(save_dinov2(tmp_path / "dinov2")), [0, 1], 32))
    module = segmented(
        base("sd-v_prediction"),
        segmented=None,
        distribution_matching=None,
        fake_score=None,
        features=features,
        update_schedule=UpdateSchedule(max_student_updates=12, warmup_updates=12),
    )
    losses = _Logged("student/feature_matching")
    fit(module, shards, batches=12, batch_size=8, callbacks=[losses])
    assert sum(losses.values[-3:]) < 0.97 * sum(losses.values[:3])
    assert list(module.networks) == ["student"] and module.fake_score is None


class _Logged(Callback):
    def __init__(self, name: str) -> None:
        self.name, self.values = name, list[float]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics[self.name]))


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_features_are_the_blocks_outputs(base: Base, kind: str) -> None:
    module = built(segmented(base(kind)))
    sample = sample_of(module)
    assert module.real_score is not None
    kept: list[Tensor] = []

    def keep(_block: Any, _inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    unet = module.real_score.module.unet
    handles = [block.register_forward_hook(keep) for block in [*unet.down_blocks, unet.mid_block]]
    with torch.no_grad():
        unet(sample.latents, torch.zeros(3, dtype=torch.int64), **sample.conditioning.unet_kwargs())
    for handle in handles:
        handle.remove()
    found = EncoderFeatures()(sample.latents, sample.conditioning, module.context)
    assert list(found) == ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"]
    for features, expected in zip(found.values(), kept, strict=True):
        torch.testing.assert_close(features, expected)
        assert features.requires_grad
    chosen = EncoderFeatures(["down_blocks.1"])(sample.latents, sample.conditioning, module.context)
    torch.testing.assert_close(chosen["down_blocks.1"], kept[1])
    with pytest.raises(ValueError, match="no block 'up_blocks.0'"):
        EncoderFeatures(["up_blocks.0"])(sample.latents, sample.conditioning, module.context)


def test_terms_are_differentiated_one_by_one_and_their_sum_is_the_total(base: Base) -> None:
    module = built(distillation(base("sd-epsilon")))
    sample = sample_of(module)
    gradients, scalars = term_gradients(module.terms.distillation, sample, module.context)
    assert set(gradients) == {"distribution_matching", "adversarial"} and "score_gap" in scalars
    total = sum(
        (term(sample, module.context)[0] for term in module.terms.distillation.values()), torch.zeros(())
    )
    (whole,) = torch.autograd.grad(total, sample.latents)
    torch.testing.assert_close(sum(gradients.values()), whole)


def test_comparison_and_balance_of_gradients() -> None:
    one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    gradients = {"a": one, "b": other}
    compared = {name: round(value.item(), 5) for name, value in compare_gradients(gradients).items()}
    assert compared == {"gradient_norm_a": 3.0, "gradient_norm_b": 5.0, "cosine_a_b": 0.6}
    scaled = balanced(gradients, "b", Balance("a", 0.5))
    torch.testing.assert_close(scaled["b"], other * 0.3)
    assert scaled["a"] is one and gradients["b"] is other
    nothing = balanced({"a": one, "b": torch.zeros(1, 2)}, "b", Balance("a", 1.0))
    assert torch.equal(nothing["b"], torch.zeros(1, 2))


def test_pairs_bring_their_own_prompts_and_the_data_keep_theirs(base: Base, shards: Path) -> None:
    module = segmented(base("sd-epsilon"), gan=True)
    shown: list[tuple[Tensor, Tensor]] = []

    class Spy(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert module.gan is not None
            loss = module.gan.discriminator_loss

            def spy(fake: LatentSample, real: Any, *rest: Any) -> Any:
                own = module.family.encode_prompts(real.batch.captions).prompt_embeds
                shown.append((real.conditioning.prompt_embeds, own))
                return loss(fake, real, *rest)

            module.gan.discriminator_loss = spy  # type: ignore[method-assign,assignment]

    fit(module, shards, batches=1, callbacks=[Spy()])
    torch.testing.assert_close(*shown[0])
