"""The method as a whole, on the shipped toy base: distribution matching from the base's own weights, in 20 s of one core.

Measured on 200 val prompts, one seed each, FID and share of images with every stated attribute right:

    before                              17.5   0.36
    as it is here                        3.7   0.72
    fake score never updated             4.9   0.75
    sign of the score difference turned 133    0.00

The last two fail the bounds below. A GAN's share is too small to be seen at this length; test_training_step.py tests its
logits and gradients directly.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from data.toy.datamodule import ToyDataModule
from evaluation.images.generate import SampledImages
from evaluation.protocols.protocols import REPOSITORY, get_protocol
from evaluation.runner.scores import ProtocolNetworks, Scores, score_images
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule

BASE = str(REPOSITORY / "data" / "toy" / "base")
# DMD2's SDXL timestep: from there the base's own single step is far off, which leaves room to show an improvement.
CONDITIONING_TIMESTEP = 399


@pytest.mark.timeout(600)
def test_two_dozen_updates_make_a_student_of_the_base(tmp_path: Path) -> None:
    adam = partial(torch.optim.AdamW, betas=(0.9, 0.99))
    module = OneStepDistillation(
        StableDiffusion(BASE, CONDITIONING_TIMESTEP),
        StudentGenerator(partial(adam, lr=2e-4)),
        FakeScore(partial(adam, lr=8e-4)),
        UpdateSchedule(max_student_updates=24, fake_score_updates_per_student_update=2),
        distribution_matching=DistributionMatching(guidance_scale=1.5),
        ema_decay=0.85,
    )
    module.configure_model()
    before = score(module)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ToyDataModule(BASE, train_images=512, cache=str(tmp_path), batch_size=8))
    after = score(module)
    assert before.fid > 15
    assert before.caption_accuracy < 0.45
    assert after.fid < 4.3
    assert after.caption_accuracy > 0.65


def score(module: OneStepDistillation) -> Scores:
    assert module.ema is not None
    protocol, device = get_protocol("toy-val", samples=200), torch.device("cpu")
    images = SampledImages(module.ema, module.family, device)
    return score_images(images, protocol.captions(), ProtocolNetworks.load(protocol), device)
