"""Images to measure: functions of caption and number alone, rounded by one rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.toy.world import captions, image_at
from evaluation.images.generate import RealImages, Reconstructions, SampledImages
from evaluation.runner.machine import milliseconds_per_image
from evaluation.runner.teacher_scores import Teacher
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families.sd import StableDiffusion
from tests.helpers.tiny import save_tiny_sd

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    """A tiny random base."""
    return StableDiffusion(str(save_tiny_sd(tmp_path_factory.mktemp("base") / "sd")))


def test_a_sample_does_not_depend_on_its_batch(family: StableDiffusion) -> None:
    maker = Teacher(family, CPU).images(2)
    texts = captions("test", 5)
    together = maker(texts, torch.arange(5))
    assert together.dtype == torch.uint8
    assert together.shape == (5, 3, 32, 32)
    for index in (0, 3):
        alone = maker(texts[index : index + 1], torch.tensor([index]))
        # Convolutions round differently at another batch size; a grey level may tip over.
        assert (alone[0].int() - together[index].int()).abs().max() <= 1
    assert not torch.equal(together[0], maker(texts[:1], torch.tensor([7]))[0])


def test_floats_are_clamped_and_rounded(family: StableDiffusion) -> None:
    class Decoder(StableDiffusion):
        def decode(self, latents: Tensor) -> Tensor:
            # In grey levels: below, above, just under and just over a half.
            levels = torch.tensor([-3.0, 260.0, 100.49, 100.51])
            return (levels / 127.5 - 1).view(1, 1, 2, 2).expand(len(latents), 3, 2, 2)

    maker = SampledImages(lambda noise, conditioning: noise, Decoder(family.base), CPU)
    assert maker(["a"], torch.tensor([0]))[0, 0].flatten().tolist() == [0, 255, 100, 101]


def test_seeds_make_other_noise_and_students_share_it_with_teachers(family: StableDiffusion) -> None:
    seen: list[Tensor] = []

    def sampler(noise: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(noise)
        return noise

    for seed in (0, 0, 1):
        SampledImages(sampler, family, CPU, seed)(["a", "b"], torch.tensor([4, 5]))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0][0], seen[0][1])


def test_real_images_and_their_reconstructions(family: StableDiffusion) -> None:
    real = RealImages("val")
    images = real([], torch.tensor([3, 0]))
    assert torch.equal(images[0].permute(1, 2, 0), torch.from_numpy(image_at("val", 3)))
    reconstructed = Reconstructions(real, family.load_vae())([], torch.tensor([3, 0]))
    assert reconstructed.shape == images.shape
    assert reconstructed.dtype == torch.uint8


def test_latency_counts_steps(family: StableDiffusion) -> None:
    teacher = Teacher(family, CPU)
    few, many = (
        milliseconds_per_image(teacher.images(steps), "a red circle", repeats=3) for steps in (1, 12)
    )
    assert many > 2 * few


def test_teachers_differ_by_weights_and_guidance(family: StableDiffusion, tmp_path: Path) -> None:
    other = StableDiffusion(str(save_tiny_sd(tmp_path / "sd", seed=1)))
    keys = [Teacher(family, CPU), Teacher(other, CPU), Teacher(family, CPU, guidance_scale=4.0)]
    assert len({str(teacher.key()) for teacher in keys}) == 3
