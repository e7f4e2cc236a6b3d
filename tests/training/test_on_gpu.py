"""What only a GPU can show: bfloat16 kernels, captured graphs, NCCL, host synchronisations, pinned memory, resuming there.

Tests that compute the same on the CPU run there too, so that what a GPU is given is known to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from evaluation.benchmarks.gpu.inference import captured, half, student_of
from evaluation.benchmarks.gpu.random_base import RandomBase
from evaluation.benchmarks.gpu.section import SectionRun
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.inference.generator import OneStepGenerator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.training.sharding import ShardedNetworks
from tests.helpers.students import PROMPTS, SEEDS
from tests.helpers.tiny_distillation import distillation, fit, weights

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)
ON_GPU: dict[str, Any] = {"accelerator": "gpu"}
LOSSES = ("student/distribution_matching", "fake_score/loss", "discriminator/loss")

both = pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """TF32 would hide differences behind its own rounding."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Over all weights, on the CPU."""
    theirs = weights(other)
    return max(float((value.cpu() - theirs[name].cpu()).abs().max()) for name, value in weights(one).items())


@both
@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_a_bfloat16_iteration_is_near_that_of_float32(
    base: Base, shards: Path, kind: str, accelerator: str
) -> None:
    """The losses, and the direction of the student's update, from equal weights, noise and timesteps."""
    losses: list[dict[str, Tensor]] = []
    updates: list[Tensor] = []
    for precision in ("32-true", "bf16-mixed"):
        dtype = "bfloat16" if precision == "bf16-mixed" else "float32"
        module = distillation(base(kind), real_score_dtype=dtype)
        module.configure_model()
        before = weights(module.student)
        trainer = fit(module, shards, batches=1, precision=precision, accelerator=accelerator)
        losses.append({name: trainer.callback_metrics[name].cpu() for name in LOSSES})
        moved = [(value.cpu() - before[name]).flatten() for name, value in weights(module.student).items()]
        updates.append(torch.cat(moved))
    for name in LOSSES:
        torch.testing.assert_close(losses[1][name], losses[0][name], rtol=0.05, atol=1e-3)
    assert float(torch.cosine_similarity(updates[0], updates[1], dim=0)) > 0.99


@pytest.mark.gpu
def test_an_iteration_on_the_gpu_is_that_of_the_cpu(base: Base, shards: Path) -> None:
    """In float32: losses to rounding; random numbers are the same on every device."""
    metrics = []
    for accelerator in ("cpu", "gpu"):
        trainer = fit(distillation(base("sd-epsilon")), shards, batches=1, accelerator=accelerator)
        metrics.append({name: trainer.callback_metrics[name].cpu() for name in LOSSES})
    for name in LOSSES:
        torch.testing.assert_close(metrics[1][name], metrics[0][name], rtol=1e-3, atol=1e-5)


@both
def test_a_resumed_run_is_the_uninterrupted_one(
    base: Base, shards: Path, tmp_path: Path, accelerator: str
) -> None:
    """Four iterations at once, and two with two more from a checkpoint.

    On a GPU atomic additions round differently each time, which Adam would make steps of full size where a gradient is next to
    zero; momentum does not, and is restored from the checkpoint likewise.
    """
    adam = partial(torch.optim.AdamW, lr=1e-3)
    momentum = partial(torch.optim.SGD, lr=0.01, momentum=0.9)

    def made() -> Any:
        return distillation(base("sd-epsilon"), optimizer=adam if accelerator == "cpu" else momentum)

    uninterrupted, cut_off, resumed = made(), made(), made()
    fit(uninterrupted, shards, batches=4, accelerator=accelerator)
    path = tmp_path / "state.ckpt"
    fit(cut_off, shards, batches=2, accelerator=accelerator).save_checkpoint(path)
    fit(resumed, shards, batches=4, ckpt_path=str(path), accelerator=accelerator)
    assert resumed.student_updates == uninterrupted.student_updates == 4
    reached = largest_difference(uninterrupted, resumed)
    assert reached <= (0.0 if accelerator == "cpu" else 1e-5)
    assert largest_difference(uninterrupted, cut_off) > 100 * max(reached, 1e-6)


class WholeWeights(Callback):
    """All weights at the end of the training, while there is a process group that gathers the shards."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        for name, value in module.named_parameters():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            self.weights[name] = whole.detach().cpu().clone()


@pytest.mark.gpu
def test_sharding_over_one_gpu_changes_nothing(base: Base, shards: Path) -> None:
    """FSDP2 over NCCL with one rank, against the plain run."""
    plain, sharded = WholeWeights(), WholeWeights()
    fit(distillation(base("sd-epsilon")), shards, batches=3, callbacks=[plain], **ON_GPU)
    fit(
        distillation(base("sd-epsilon")), shards, batches=3, callbacks=[sharded], strategy=ShardedNetworks(), **ON_GPU
    )  # fmt: skip
    assert sharded.weights.keys() == plain.weights.keys()
    for name, value in sharded.weights.items():
        torch.testing.assert_close(value, plain.weights[name], rtol=1e-4, atol=1e-5)


class NoSynchronisation(Callback):
    """Makes torch raise where the host waits for the device, during the third and fourth batch."""

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: Trainer, module: Any, *given: Any) -> None:
        if given[-1] == 3:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_host_never_waits_between_two_log_points(base: Base, shards: Path) -> None:
    module = distillation(base("sd-epsilon"), optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True))
    fit(module, shards, batches=5, callbacks=[NoSynchronisation()], log_every_n_steps=1000, **ON_GPU)
    assert module.student_updates == 5


@pytest.mark.gpu
def test_batches_come_in_page_locked_memory(base: Base, shards: Path) -> None:
    """Else copies to the GPU would wait."""
    pinned: list[bool] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            batch = next(iter(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
            pinned.append(batch.latents.is_pinned())

    fit(distillation(base("sd-epsilon")), shards, batches=1, callbacks=[Watch()], **ON_GPU)
    assert pinned == [True]


@both
def test_a_step_from_noise_to_pixels_can_be_captured(tmp_path: Path, accelerator: str) -> None:
    """As the benchmark's CUDA graph, which raises unless its images are those of eager execution; on the CPU the step alone."""
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    run = SectionRun(tmp_path / "rows", 60, 60, device, True, tmp_path)
    base = RandomBase.of("sdxl", tmp_path, device, tiny=True)
    base.to(dtype=half(device))
    student = student_of(run, "sdxl", base, 2, controlled=True)
    with torch.no_grad():
        images = student()
        if accelerator == "gpu":
            captured(student)()
    assert images.shape == (2, 3, 128, 128) and images.dtype == torch.uint8 and images.float().std() > 0


@pytest.mark.gpu
def test_a_captured_graph_makes_the_eager_image(base: Base, tmp_path: Path) -> None:
    """torch.compile with CUDA graphs, replayed with other prompts and noise."""
    from sdxs_lightning.export import export_pipeline

    family = StableDiffusion(str(base("sd-epsilon")))
    export_pipeline(family.load_unet(), family, tmp_path / "student", dtype=torch.float32)
    eager = OneStepGenerator.load(tmp_path / "student", device="cuda")
    captured = OneStepGenerator.load(tmp_path / "student", device="cuda", compiled=True)
    for seeds in (SEEDS, [seed + 100 for seed in SEEDS], [seed + 200 for seed in SEEDS]):
        one, other = eager.sample(PROMPTS, seeds), captured.sample(PROMPTS, seeds)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_compiled_blocks_change_nothing(base: Base, shards: Path) -> None:
    """The last test, since compiling takes longest; without the GAN there is less to compile."""
    metrics = []
    for compiled in (False, True):
        student = StudentGenerator(SGD, compile_blocks=compiled)
        fake_score = FakeScore(SGD, compile_blocks=compiled)
        module = distillation(base("sd-epsilon"), gan=False, student=student, fake_score=fake_score)
        trainer = fit(module, shards, batches=2, **ON_GPU)
        metrics.append({name: trainer.callback_metrics[name].cpu() for name in LOSSES[:2]})
    for name in LOSSES[:2]:
        torch.testing.assert_close(metrics[1][name], metrics[0][name], rtol=1e-3, atol=1e-4)
