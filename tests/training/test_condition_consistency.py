"""Readers of conditions: what they read, how they are trained, and the student's term that uses them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.conditions import SoftEdge
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.latents import from_uint8
from sdxs_lightning.core.seeding import normal
from sdxs_lightning.networks.condition_readers import LearnedReader, ReaderNetwork, SoftEdgeReader
from sdxs_lightning.objectives.condition_consistency import ConditionConsistency, condition_distance
from sdxs_lightning.stages.controlnet.reader import ConditionReaderTraining
from tests.helpers.planned import teacher
from tests.helpers.tiny_distillation import (
    built,
    control_batch,
    family_of,
    fit,
    sample_of,
)
from tests.training.test_controlnet_training import CONTENTS, Base, joint


def test_the_soft_edge_reader_is_the_condition(base: Base) -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (4, 8, 8, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    read = SoftEdgeReader(1.5).load()(from_uint8(torch.from_numpy(coarse).permute(0, 3, 1, 2)))
    made = np.stack([SoftEdge(1.5)(one) for one in coarse])
    expected = torch.from_numpy(made).permute(0, 3, 1, 2).float() / 255
    assert (read - expected).abs().max() < 1.5 / 255  # the rounding to bytes
    assert expected.std() > 0.1


def test_a_blur_that_is_wider_than_the_image_has_a_sentence() -> None:
    for blur in (0.0, -1.0, 1001.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"a blur above 0 pixels and up to 1000, got {blur}"):
            SoftEdgeReader(blur)
    reader = SoftEdgeReader(2.0).load()
    assert reader(torch.zeros(1, 3, 9, 20)).shape == (1, 3, 9, 20)
    with pytest.raises(
        ValueError, match="a blur of 2 pixels reads images from 9 pixels on, got 8x20; give a"
    ):
        reader(torch.zeros(1, 3, 8, 20))


class ReaderOf:
    """Source of a network that exists already."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def load(self) -> torch.nn.Module:
        return self.network


@pytest.mark.parametrize("distance", ["mse", "cross_entropy"])
def test_a_step_against_the_gradient_of_condition_consistency_brings_the_image_nearer(
    base: Base, distance: str
) -> None:
    reader = SoftEdgeReader() if distance == "mse" else ReaderOf(ReaderNetwork(widths=(4, 4)))
    term = ConditionConsistency(reader, weight=2.0)
    module = built(joint(base("sd-v_prediction"), objectives={"condition": term}))
    assert term.distance == distance
    sample, controls = sample_of(module), control_batch(3).control_images.clone()
    controls[1] = 0.0  # dropped: no condition, no loss
    conditioning = replace(sample.conditioning, control_images=controls)

    def loss_at(latents: Tensor) -> Tensor:
        loss, scalars = term(replace(sample, latents=latents, conditioning=conditioning), module.context)
        assert float(loss.detach()) == pytest.approx(2 * float(scalars["condition_consistency"].detach()))
        return loss

    latents = sample.latents.detach().requires_grad_()
    loss = loss_at(latents)
    (gradient,) = torch.autograd.grad(loss, latents)
    read = term.read(replace(sample, latents=latents))
    per_sample = condition_distance(read, controls, term.distance).detach()
    assert float(loss.detach()) == pytest.approx(2 * float(per_sample[0] + per_sample[2]) / 3)
    assert gradient[1].abs().max() == 0 and gradient[0].abs().max() > 0 < gradient[2].abs().max()
    step = 1e-2 / float(gradient.norm())
    assert loss_at((latents - step * gradient).detach()) < loss.detach()


def test_a_reader_that_is_sure_and_wrong_gives_a_gradient(base: Base) -> None:
    wanted = torch.ones(2, 3, 32, 32)
    logits = torch.full_like(wanted, -60.0, requires_grad=True)  # its sigmoid is 0 in float32
    (gradient,) = torch.autograd.grad(condition_distance(logits, wanted, "cross_entropy").sum(), logits)
    torch.testing.assert_close(gradient, torch.full_like(wanted, -1 / wanted[0].numel()))


def test_distances_are_the_formulas() -> None:
    read, wanted = torch.tensor([[[[0.25, 0.9]]]]), torch.tensor([[[[0.0, 1.0]]]])
    entropy = -(np.log(0.75) + np.log(0.9)) / 2
    for distance, value in (("cross_entropy", entropy), ("mse", (0.0625 + 0.01) / 2), ("l1", 0.175)):
        given = read.logit() if distance == "cross_entropy" else read
        assert float(condition_distance(given, wanted, distance)) == pytest.approx(value, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_an_average_that_never_moves_is_refused(base: Base, decay: float) -> None:
    refused = rf"ema_decay must be in \[0, 1\), got {decay}; change model.init_args.ema_decay"
    with pytest.raises(ValueError, match=refused):
        ConditionReaderTraining(family_of(base("sd-v_prediction")), torch.optim.Adam, ema_decay=decay)
    with pytest.raises(ValueError, match=refused):
        teacher(base("sd-v_prediction"), ema_decay=decay)


def test_a_reader_learns_its_pairs_and_is_loaded_again(base: Base, shards: Path, tmp_path: Path) -> None:
    training = ConditionReaderTraining(
        family_of(base("sd-v_prediction")),
        partial(torch.optim.Adam, lr=1e-2),
        widths=(8, 8),
        noise=0.0,
        ema_decay=0.5,
    )
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
        ) -> None:
            losses.append(float(outputs["loss"]))

    fit(training, shards, 60, batch_size=8, contents=CONTENTS, callbacks=[Watch()])  # type: ignore[arg-type]
    training.write_export(tmp_path / "reader", average=True, dtype=torch.float32)
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    loaded = LearnedReader(str(tmp_path / "reader")).load()
    images = normal(0, 0, torch.arange(2), (3, 32, 32))
    assert torch.equal(loaded(images), training.ema.module(images))
    training.write_export(tmp_path / "half", average=True, dtype=torch.float16)
    assert all(one.dtype == torch.float32 for one in training.ema.module.parameters())
    with torch.no_grad():
        training.ema.module.get_parameter("head.bias").fill_(1e6)
    with pytest.raises(UserError, match="ReaderNetwork's head.bias has NaN, or values that float16 cannot"):
        training.write_export(tmp_path / "half", average=True, dtype=torch.float16)
    kept = LearnedReader(str(tmp_path / "half")).load().get_parameter("head.bias")
    assert kept.abs().max() < 10  # the earlier one
    with pytest.raises(FileNotFoundError, match="there is no condition reader in 'nowhere'"):
        ReaderNetwork.from_pretrained("nowhere")
