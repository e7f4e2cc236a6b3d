"""Style LoRAs: trained by denoising for the base, and brought to a frozen one-step student by score distillation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lightning.pytorch import Trainer
from torch import Tensor

from data.shards.datamodule import ShardDataModule
from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import add_noise, target_of
from sdxs_lightning.core.seeding import Stream, normal, uniform
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.memory_plan.hardware import read_hardware
from sdxs_lightning.memory_plan.planner import Planner
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.lora_files import LowRank, add_to_weights, live_adapters, read_lora, write_lora
from sdxs_lightning.networks.network import frozen_fingerprint
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.matched_features import EncoderFeatures
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.data_sample import without_prompts
from sdxs_lightning.stages.denoising_lora import DenoisingLoRA
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.stages.lora import StyleDistillation, StyleLoRA
from sdxs_lightning.surgery.pruning import prune
from sdxs_lightning.surgery.topology import Topology
from tests.helpers.planned import ONE_CPU
from tests.helpers.ranks.distributed_worker import strategy_of
from tests.helpers.ranks.processes import in_ranks
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import built, family_of, fit, weights
from tests.networks.test_lora import move

Base = Callable[[str], Path]
FEW = ("to_q", "ff.net.2", "conv1")
SGD = partial(torch.optim.SGD, lr=1.0)
"""For comparisons of processes: Adam would make of a gradient that is rounding an update of full size."""
ADAMW = partial(torch.optim.AdamW, lr=1e-2, eps=1e-8, weight_decay=0)
ALWAYS = Regression(phase="always")
RATIO_1 = UpdateSchedule(max_student_updates=10**6, fake_score_updates_per_student_update=1)


@pytest.fixture(scope="module")
def style(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a LoRA for the base of a kind."""
    folder = tmp_path_factory.mktemp("styles")

    def written(kind: str) -> Path:
        path = folder / kind
        if not path.exists():
            path.mkdir()
            unet = DenoisingLoRA(family_of(base(kind)), ADAMW, lora=LoRA(rank=2))
            unet.configure_model()
            move(unet.denoiser.unet, 0.3)
            write_lora(path, live_adapters(unet.denoiser.unet.state_dict(), None), dtype=torch.float32)
        return path

    return written


def stage(base: Path, style: Path, optimizer: Any = ADAMW, **settings: Any) -> StyleDistillation:
    settings.setdefault("student", StudentGenerator(optimizer, lora=LoRA(rank=2, targets=FEW)))
    settings.setdefault("fake_score", FakeScore(optimizer))
    settings.setdefault("update_schedule", RATIO_1)
    settings.setdefault("style", StyleLoRA(str(style), scale=settings.pop("scale", 1.0)))
    return StyleDistillation(family=family_of(base), ema_decay=0.5, **settings)


def output_of(unet: UNet2DConditionModel, conditioning: Conditioning) -> Tensor:
    noisy = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Frozen, since torch rounds products by a weight that learns otherwise.
        unet = unet.eval().requires_grad_(False)
        output: Tensor = unet(noisy, torch.tensor([999, 9]), **conditioning.unet_kwargs()).sample
    return output


# ------------------------------------------------------------------------------------------------------ stage `lora`


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_the_style_is_in_the_real_score_only(base: Base, style: Callable[[str], Path], kind: str) -> None:
    module = built(stage(base(kind), style(kind), scale=0.5))
    plain = module.family.load_unet().eval()
    conditioning = module.family.encode_prompts(["a red circle", "a cat"])
    styled = module.family.load_unet().eval()
    add_to_weights(styled, read_lora(style(kind), styled).adapters, 0.5)
    assert module.real_score is not None and module.fake_score is not None
    real, fake = module.real_score.module.unet, module.fake_score.denoiser.unet.eval()
    assert torch.equal(output_of(real, conditioning), output_of(styled, conditioning))
    assert torch.equal(output_of(fake, conditioning), output_of(plain, conditioning))
    assert torch.equal(
        output_of(module.student.denoiser.unet.eval(), conditioning), output_of(plain, conditioning)
    )
    assert (output_of(real, conditioning) - output_of(plain, conditioning)).abs().max() > 0.01


def test_a_fake_score_of_adapters_shares_no_weights_with_the_style(
    base: Base, style: Callable[[str], Path]
) -> None:
    kind = "sd-epsilon"
    module = built(stage(base(kind), style(kind), fake_score=FakeScore(ADAMW, lora=LoRA(rank=2))))
    assert module.real_score is not None and module.fake_score is not None
    assert module.real_score.module.unet is not module.fake_score.denoiser.unet
    plain, conditioning = module.family.load_unet().eval(), module.family.encode_prompts(["a cat", ""])
    assert torch.equal(
        output_of(module.fake_score.denoiser.unet.eval(), conditioning), output_of(plain, conditioning)
    )


def test_only_adapters_of_the_student_learn_and_a_stock_pipeline_loads_them(
    base: Base, shards: Path, style: Callable[[str], Path], tmp_path: Path
) -> None:
    kind = "sd-epsilon"
    module = built(stage(base(kind), style(kind)))
    before = weights(module)
    trainer = fit(module, shards, batches=2)
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    of_student = {name for name in changed if name.startswith("student")}
    assert of_student == {name for name in before if name.startswith("student") and ".lora_" in name}
    assert any(name.startswith("fake_score") for name in changed)
    export = Export(str(tmp_path / "lora"), dtype="float32")
    export.setup(trainer, module, "fit")
    export.on_train_end(trainer, module)
    pipeline = StableDiffusionPipeline.from_pretrained(base(kind), safety_checker=None)
    conditioning = module.family.encode_prompts(["a cat", "a red circle"])
    plain = output_of(pipeline.unet, conditioning)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert module.ema is not None
    with module.ema.applied():
        expected = output_of(module.student.denoiser.unet.eval(), conditioning)
    torch.testing.assert_close(output_of(pipeline.unet, conditioning), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_without_a_style_the_first_gradient_is_zero(
    base: Base, tmp_path: Path, shards: Path, style: Callable[[str], Path]
) -> None:
    """The fake score starts as the base, so what moves the student at first is the style alone."""
    kind, norms = "sd-epsilon", []
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    given = read_lora(style(kind), family_of(base(kind)).load_unet()).adapters
    # Too small to change any weight; a LoRA of zeros is refused.
    write_lora(
        nothing,
        {name: LowRank(a.down, 1e-20 * a.up, a.alpha) for name, a in given.items()},
        dtype=torch.float32,
    )
    for source in (nothing, style(kind)):
        # Guidance 1 in both scores, so that they are equal without a style.
        module = built(
            stage(base(kind), source, distribution_matching=DistributionMatching(guidance_scale=1.0))
        )
        batch = tiny_batch(3)
        sample = module._sample(batch, module.terms.distillation)
        noted: dict[str, Any] = {}
        module.note = lambda prefix="", noted=noted, **scalars: noted.update(scalars)  # type: ignore[method-assign]
        module.accumulate = lambda loss, roles, last=None: loss.backward()  # type: ignore[method-assign]
        module._student_backward(sample, module.terms.distillation)
        norms.append(float(noted["gradient_norm_distribution_matching"]))
    assert norms[0] < 1e-6 < 1e-3 < norms[1]


def test_segmented_needs_no_warm_up_and_its_pairs_have_the_style(
    base: Base, shards: Path, style: Callable[[str], Path]
) -> None:
    kind = "sd-epsilon"
    module = built(
        stage(
            base(kind),
            style(kind),
            segmented=SegmentedScoreDistillation(),
            pairs=PairSettings(source="on_the_fly", sampler_steps=2, guidance_scale=1.0),
            feature_matching=FeatureMatching(),
            features=EncoderFeatures(),
        )
    )
    fit(module, shards, batches=1)
    assert module.student_updates == 1 and module.pairs is not None and module.real_score is not None
    module.pairs.start(module.real_score.module, None)
    batch = tiny_batch(2)
    styled = module.pairs.pick(batch).target
    other = built(stage(base(kind), style(kind), scale=1e-9))
    assert other.real_score is not None
    module.pairs.start(other.real_score.module, None)
    assert (styled - module.pairs.pick(batch).target).abs().max() > 1e-3


def test_a_target_sampler_of_its_own_gets_the_style_if_it_fits(
    base: Base, style: Callable[[str], Path], tmp_path: Path
) -> None:
    kind = "sd-epsilon"
    other = family_of(base(kind)).load_unet()
    torch.nn.init.normal_(other.conv_out.weight)
    other.save_pretrained(tmp_path / "few_step")
    prune(family_of(base(kind)).load_unet(), Topology(mid_block="none"))[0].save_pretrained(
        tmp_path / "pruned"
    )

    def sampler(weights: str) -> UNet2DConditionModel:
        settings = {
            "pairs": PairSettings(source="on_the_fly", weights=str(tmp_path / weights)),
            "regression": ALWAYS,
        }
        module = built(stage(base(kind), style(kind), **settings))
        assert module.pairs is not None and module.pairs.own is not None
        return module.pairs.own.module.unet

    add_to_weights(other, read_lora(style(kind), other).adapters)
    conditioning = family_of(base(kind)).encode_prompts(["a cat", ""])
    assert torch.equal(output_of(sampler("few_step"), conditioning), output_of(other.eval(), conditioning))
    with pytest.warns(UserWarning, match="stays without the style: .* it was trained for another base"):
        sampler("pruned")


def test_a_resumed_run_is_the_uninterrupted_one(
    base: Base, shards: Path, style: Callable[[str], Path], tmp_path: Path
) -> None:
    kind = "sd-epsilon"
    straight, cut, resumed = (stage(base(kind), style(kind)) for _ in range(3))
    fit(straight, shards, batches=4)
    fit(cut, shards, batches=2).save_checkpoint(tmp_path / "cut.ckpt")
    fit(resumed, shards, batches=4, ckpt_path=str(tmp_path / "cut.ckpt"))
    for name, value in weights(straight).items():
        assert torch.equal(value, dict(resumed.named_parameters())[name]), name
    state = torch.load(tmp_path / "cut.ckpt", weights_only=False)["state_dict"]
    assert all(".lora_" in n.replace("/", ".") for n in state if n.startswith(("student", "ema")))
    assert not any(name.startswith("real_score") for name in state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": StudentGenerator(ADAMW)}, "set student.init_args.lora"),
        (
            {"update_schedule": UpdateSchedule(max_student_updates=9, warmup_updates=2)},
            "warmup_updates is 2, and stage `lora` has no warm-up",
        ),
    ],
)
def test_refusals(base: Base, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        stage(base("sd-epsilon"), tmp_path, **settings)


def test_a_missing_style_is_named_when_the_run_starts(base: Base, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="style.path: there is no file or folder"):
        built(stage(base("sd-epsilon"), tmp_path / "none"))
    with pytest.raises(ValueError, match="style.scale is 0"):
        StyleLoRA("style", scale=0)
    with pytest.raises(ValueError, match="style.scale is nan"):
        StyleLoRA("style", scale=float("nan"))


# -------------------------------------------------------------------------------------------- the base's LoRA, denoising


def denoising(base: Path, optimizer: Any = ADAMW, **settings: Any) -> DenoisingLoRA:
    settings.setdefault("lora", LoRA(rank=2, targets=FEW))
    return DenoisingLoRA(family_of(base), optimizer, seed=3, **settings)


def train(
    module: DenoisingLoRA,
    shards: Path,
    steps: int,
    ckpt: Path | None = None,
    batch_size: int = 4,
    **settings: Any,
) -> Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | settings,
    )
    trainer.fit(
        module, ShardDataModule(str(shards), batch_size), ckpt_path=None if ckpt is None else str(ckpt)
    )
    return trainer


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_the_loss_is_plain_denoising(base: Base, kind: str) -> None:
    module, batch = denoising(base(kind), caption_dropout=0.5), tiny_batch(6)
    module.configure_model()
    move(module.denoiser.unet, 0.1)
    module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign]
    assert batch.latents is not None
    family = module.family
    latents = family.scale_latents(batch.latents)
    noise = normal(3, Stream.TEACHER_NOISE, batch.positions, latents.shape[1:])
    timesteps = TimestepRange(0, 999).draw(3, Stream.TEACHER_TIMESTEP, batch.positions)
    noisy = add_noise(latents, noise, timesteps, family.schedule)
    dropped = uniform(3, Stream.DROPOUT, batch.positions) < 0.5
    assert 0 < dropped.sum() < 6
    conditioning = family.encode_prompts(batch.captions, batch.original_sizes, batch.crops)
    conditioning = without_prompts(conditioning, dropped)
    output = module.denoiser.unet(noisy, timesteps, **conditioning.unet_kwargs()).sample
    target = target_of(family.prediction_type, latents, noise, timesteps, family.schedule)
    expected = (output.double() - target.double()).square().mean()
    assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_adapters_learn_and_are_saved_and_exported(base: Base, shards: Path, tmp_path: Path) -> None:
    kind = "sd-epsilon"
    module = denoising(base(kind))
    module.configure_model()
    before = weights(module)
    trainer = train(module, shards, 3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name.replace("/", ".")}
    state = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"]
    assert set(state) == changed
    Export(str(tmp_path / "lora"), dtype="float32").on_train_end(trainer, module)
    unet = module.family.load_unet().eval()
    add_to_weights(unet, read_lora(tmp_path / "lora", unet).adapters)
    conditioning = module.family.encode_prompts(["a cat", "a red circle"])
    assert module.ema is not None
    with module.ema.applied():
        expected = output_of(module.denoiser.unet.eval(), conditioning)
    torch.testing.assert_close(output_of(unet, conditioning), expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_denoising_is_the_uninterrupted_one(base: Base, shards: Path, tmp_path: Path) -> None:
    kind = "sd-epsilon"
    straight, cut, resumed = (denoising(base(kind)) for _ in range(3))
    train(straight, shards, 4)
    train(cut, shards, 2).save_checkpoint(tmp_path / "cut.ckpt")
    train(resumed, shards, 4, tmp_path / "cut.ckpt")
    for name, value in weights(straight).items():
        assert torch.equal(value, dict(resumed.named_parameters())[name]), name
    content = torch.load(tmp_path / "cut.ckpt", weights_only=False)
    own = content["frozen_weights"]["lora"]
    values = cut.denoiser.unet.conv_out.weight.detach().view(-1)
    values[-2:] = values[-2:].flip(0)  # far from the beginning, two values change places
    content["frozen_weights"]["lora"] = frozen_fingerprint(cut.denoiser)
    with pytest.raises(
        ValueError, match=f"fingerprint float32:2:[0-9a-f]+, and this run loaded weights with {own}"
    ):
        resumed.on_load_checkpoint(content)
    content["frozen_weights"]["lora"] = own.rpartition(":")[2]
    with pytest.warns(UserWarning, match="lora were not compared .* older version"):
        resumed.on_load_checkpoint(content)


# ----------------------------------------------------------------------------------------------------- plan, processes


def test_the_plan_counts_adapters_and_needs_no_style_file(base: Base, tmp_path: Path) -> None:
    count = sum(parameter.numel() for parameter in family_of(base("sd-epsilon")).load_unet().parameters())
    for module in (stage(base("sd-epsilon"), tmp_path / "not there"), denoising(base("sd-epsilon"))):
        networks = {one.name: one for one in Planner(module, read_hardware(ONE_CPU), 2).plan().networks}
        adapted = networks.get("student") or networks["denoiser"]
        assert 0 < adapted.trainable == adapted.parameters - count
        assert adapted.optimizer == 8 * adapted.trainable
        if "real_score" in networks:  # its own copy, not the fake score's
            assert networks["real_score"].parameters == networks["fake_score"].parameters == count


def two_ranks(base: Path, shards: Path, style: Path, out: Path) -> None:
    """In each of two processes: both stages, sharded, with their exports."""
    two: dict[str, Any] = {"batch_size": 2, "devices": 2, "strategy": strategy_of("fsdp2")}
    module = stage(base, style, SGD)
    trainer = fit(module, shards, 2, **two)
    Export(str(out / "two-style"), dtype="float32").on_train_end(trainer, module)
    other = denoising(base, SGD)
    two["strategy"] = strategy_of("fsdp2")
    trainer = train(other, shards, 2, use_distributed_sampler=False, **two)
    Export(str(out / "two-denoising"), dtype="float32").on_train_end(trainer, other)


@pytest.mark.timeout(600)
def test_two_processes_export_what_one_does(
    base: Base, shards: Path, style: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, styled = base("sd-epsilon"), style("sd-epsilon")
    ended = in_ranks(two_ranks, (folder, shards, styled, tmp_path), tmp_path)
    assert [rank.code for rank in ended] == [0, 0], [rank.said[-3000:] for rank in ended]
    one, other = stage(folder, styled, SGD), denoising(folder, SGD)
    Export(str(tmp_path / "one-style"), dtype="float32").on_train_end(fit(one, shards, 2), one)
    Export(str(tmp_path / "one-denoising"), dtype="float32").on_train_end(train(other, shards, 2), other)
    unet = family_of(folder).load_unet()
    for name in ("style", "denoising"):
        expected, found = (read_lora(tmp_path / f"{count}-{name}", unet).adapters for count in ("one", "two"))
        assert found.keys() == expected.keys()
        for layer, update in expected.items():
            size = float(update.delta().abs().max())
            assert size > 1e-8, (name, layer)
            # Halves of a batch are summed in another order: rounding of float32, relative to the whole layer's update.
            assert float((found[layer].delta() - update.delta()).abs().max()) < 1e-3 * size, (name, layer)
