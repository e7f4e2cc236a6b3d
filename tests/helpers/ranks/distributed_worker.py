"""One of two processes of test_distributed.py: trains under every strategy and saves the results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from data.shards.layout import Content
from sdxs_lightning.callbacks.health import Health
from sdxs_lightning.networks.condition_readers import SoftEdgeReader
from sdxs_lightning.networks.controlled import ControlledFakeScore, ControlledStudent, ControlNetSource
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.condition_consistency import ConditionConsistency
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.controlnet.distillation import ControlNetDistillation, ControlSettings
from sdxs_lightning.stages.controlnet.training import ControlNetTraining
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training import gradient_average
from sdxs_lightning.training.gradient_average import GradientAverage
from sdxs_lightning.training.sharding import ShardedNetworks
from tests.helpers.rounding import ADAM_EPS
from tests.helpers.tiny_decoding import pixel_gan
from tests.helpers.tiny_distillation import batches_of, distillation, family_of, fit

ITERATIONS = 6
DENOISING_UPDATES = 3
MIXED_ITERATIONS = 3
SAVED_AFTER = 4
SGD_LR = 0.02
ADAMW_LR = 1e-3
GRADIENT_CLIP_NORM = 0.5
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=SGD_LR),
    "adamw": partial(torch.optim.AdamW, lr=ADAMW_LR, eps=ADAM_EPS),
}
STRATEGIES = ("ddp", "fsdp2")


class Case(NamedTuple):
    """One comparison."""

    optimizer: str
    gan: Literal["latents", "pixels"] | None = "latents"
    micro_batches: int = 1
    timesteps: tuple[int, ...] | None = None
    control: bool = False
    mixes_pairs: bool = False


CASES = {
    "sgd": Case("sgd", micro_batches=2),
    "adamw": Case("adamw"),
    "pixel_gan": Case("sgd", gan="pixels"),
    "two_steps": Case("sgd", gan=None, timesteps=(999, 499), mixes_pairs=True),
    "controlnet": Case("sgd", gan=None, control=True),
}


def strategy_of(name: str) -> Strategy:
    """Two processes on the CPU."""
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ShardedNetworks(process_group_backend="gloo")


def module_for(base: Path, case: Case, micro_batches: int) -> OneStepDistillation:
    """Warm-up, fake-score-only iterations and both: every kind of iteration within six."""
    make = OPTIMIZERS[case.optimizer]
    if case.control:
        return controlled(base, make)
    pixels = pixel_gan(base.parent / "dinov2", make, crop_px=24) if case.gan == "pixels" else {}
    falling = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda update: 0.9**update)
    return distillation(
        base,
        student=StudentGenerator(make, falling, timesteps=list(case.timesteps) if case.timesteps else None),
        fake_score=FakeScore(make),
        gan=case.gan is not None,
        **pixels,
        optimizer=make,
        update_schedule=UpdateSchedule(
            max_student_updates=99,
            fake_score_updates_per_student_update=2,
            warmup_updates=2,
            fake_score_only_iterations=1,
        ),
        pairs=PairSettings(
            count=7, every_nth_sample=2 if case.mixes_pairs else 1, sampler_steps=2, sampler_batch_size=4
        ),
        regression=Regression(phase="always" if case.mixes_pairs else "warmup"),
        accumulate_grad_batches=micro_batches,
        gradient_clip_norm=GRADIENT_CLIP_NORM,
    )


def controlled(base: Path, make: Any) -> OneStepDistillation:
    """A ControlNet of a frozen student, and a fake score with one of its own: two warm-up iterations, then the student's on
    every second of four."""
    return ControlNetDistillation(
        family_of(base),
        ControlledStudent(make),
        ControlledFakeScore(make),
        UpdateSchedule(
            max_student_updates=99,
            fake_score_updates_per_student_update=2,
            warmup_updates=2,
            fake_score_only_iterations=1,
        ),
        control=ControlSettings(condition_dropout=0.3),
        objectives={"condition": ConditionConsistency(SoftEdgeReader(), distance="mse", weight=3.0)},
        ema_decay=0.9,
        gradient_clip_norm=GRADIENT_CLIP_NORM,
    )


def mixed_precision(base: Path) -> OneStepDistillation:
    """The student's update comes before any of the fake score, whose first forward pass is therefore frozen."""
    return distillation(base, optimizer=OPTIMIZERS["sgd"], gradient_clip_norm=GRADIENT_CLIP_NORM)


class ReduceDtypes(Callback):
    """Notes in which dtypes FSDP2 will reduce gradients, before the first forward pass."""

    def on_train_start(self, trainer: Trainer, pl_module: OneStepDistillation) -> None:  # type: ignore[override]
        groups = [
            module._get_fsdp_state()._fsdp_param_group
            for network in pl_module.networks.values()
            for module in network.modules()
            if isinstance(module, FSDPModule)
        ]
        self.found = {
            str(getattr(group, "_reduce_dtype", "not known yet")) for group in groups if group is not None
        }


def denoising(base: Path) -> ControlNetTraining:
    """A ControlNet of the base by denoising: Lightning's automatic optimisation, and adapters with frozen weights below."""
    source = ControlNetSource(lora=LoRA(rank=2, targets=("to_q", "conv1")))
    return ControlNetTraining(
        family_of(base), OPTIMIZERS["sgd"], controlnet=source, condition_dropout=0.3, ema_decay=0.5
    )


def contents_of(case: Case) -> list[Content]:
    """What the data of a case holds."""
    return ["latents", "control_images"] if case.control else ["latents"]


def health_of() -> Health:
    """Measures diversity at the last student update, on all ranks."""
    return Health(4, prompts=["a red circle"], samples_per_prompt=4)


def arrived(module: LightningModule) -> dict[str, torch.Tensor]:
    """All parameters, whole; every rank has to call it."""
    whole = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        whole[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return whole


class CountSent:
    """Counts the elements of gradients that `GradientAverage` sends, in buckets that are small for tiny networks."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        """Elements per update."""
        self.overlapped = 0
        """Elements that were sent before their backward pass had ended."""
        self._elements = 0
        self._original = GradientAverage._send, GradientAverage.finish, gradient_average.BUCKET_BYTES

    def start(self) -> None:
        send, finish, _ = self._original

        def sending(average: GradientAverage) -> None:
            before = len(average._sent)
            send(average)
            elements = sum(flat.numel() for _, flat in average._sent[before:])
            self._elements += elements
            self.overlapped += elements if average._overlapping else 0

        def finishing(average: GradientAverage) -> None:
            finish(average)
            self.sent.append(self._elements)
            self._elements = 0

        GradientAverage._send = sending  # type: ignore[method-assign,assignment]
        GradientAverage.finish = finishing  # type: ignore[method-assign,assignment]
        gradient_average.BUCKET_BYTES = 2**16

    def stop(self) -> None:
        send, finish, gradient_average.BUCKET_BYTES = self._original
        GradientAverage._send, GradientAverage.finish = send, finish  # type: ignore[method-assign]


class SaveAfter(Callback):
    """Saves a checkpoint after a number of batches (None: never), and counts the gradients that travel under DDP."""

    def __init__(self, batches: int | None, path: Path) -> None:
        self.batches, self.path = batches, path
        self.counted = CountSent()
        self.sent_by_reducer = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counted.start()
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.register_comm_hook(None, lambda state, bucket: self._reducing(bucket))

    def _reducing(self, bucket: Any) -> Any:
        self.sent_by_reducer += bucket.buffer().numel()
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counted.stop()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if batches_of(trainer) == self.batches:
            trainer.save_checkpoint(self.path)


def train_in_mixed_precision(base: Path, shards: Path, file: Path) -> None:
    """FSDP2 with weights gathered in bfloat16, and gradients reduced in float32."""
    module, dtypes = mixed_precision(base), ReduceDtypes()
    two: dict[str, Any] = {"batch_size": 2, "devices": 2, "strategy": strategy_of("fsdp2")}
    fit(module, shards, MIXED_ITERATIONS, callbacks=[dtypes], precision="bf16-mixed", **two)
    whole = arrived(module)
    if module.global_rank == 0:
        torch.save({"straight": whole, "reduced_in": dtypes.found}, file)


def train_everything(base: Path, shards: Path, out: Path) -> None:
    """Every case under every strategy, and with AdamW, whose state is worth restoring, a resume on the way."""
    for strategy in STRATEGIES:
        training = denoising(base)
        fit(
            training,  # type: ignore[arg-type]
            shards,
            DENOISING_UPDATES,
            batch_size=2,
            devices=2,
            strategy=strategy_of(strategy),
            contents=["latents", "control_images"],
        )
        whole = arrived(training)
        if training.global_rank == 0:
            sharded = isinstance(next(training.controlled.parameters()), DTensor)
            torch.save({"straight": whole, "sharded": sharded}, out / f"{strategy}-denoising.pt")
        if strategy == "fsdp2":
            train_in_mixed_precision(base, shards, out / "mixed.pt")
        for name, case in CASES.items():
            checkpoint = out / f"{strategy}-{name}.ckpt"
            micro = case.micro_batches
            settings: dict[str, Any] = {"batch_size": 2 // micro, "devices": 2}

            module = module_for(base, case, micro)
            save = SaveAfter(SAVED_AFTER * micro if name == "adamw" else None, checkpoint)
            callbacks: list[Callback] = [save, health_of()] if name == "two_steps" else [save]
            trainer = fit(
                module,
                shards,
                ITERATIONS * micro,
                callbacks=callbacks,
                strategy=strategy_of(strategy),
                contents=contents_of(case),
                **settings,
            )
            results: dict[str, Any] = {"straight": arrived(module)}
            results["sent"], results["overlapped"] = save.counted.sent, save.counted.overlapped
            results["sent_by_reducer"] = save.sent_by_reducer
            results["sharded"] = isinstance(next(module.student.parameters()), DTensor)
            if name == "adamw":
                module = module_for(base, case, micro)
                fit(
                    module,
                    shards,
                    ITERATIONS * micro,
                    ckpt_path=str(checkpoint),
                    strategy=strategy_of(strategy),
                    **settings,
                )
                results["resumed"] = arrived(module)
            results["diversity"] = trainer.callback_metrics.get("student/diversity")
            results["counters"] = (module.iterations, module.student_updates)
            if trainer.is_global_zero:
                torch.save(results, out / f"{strategy}-{name}.pt")
