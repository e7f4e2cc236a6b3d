"""One of four processes of test_hybrid.py: DDP, and HSDP of 2 x 2, with what travels between which of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdxs_lightning.networks.controlled import ControlledFakeScore, ControlledStudent, ControlNetSource
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.controlnet.distillation import ControlNetDistillation
from sdxs_lightning.stages.controlnet.training import ControlNetTraining
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training.sharding import ShardedNetworks
from tests.helpers.ranks.distributed_worker import CountSent, arrived
from tests.helpers.tiny_distillation import batches_of, distillation, family_of, fit

ITERATIONS = 10
SAVED_AFTER = 8
COUNTED = 3
"""The first iteration that updates every network, from 0."""
MICRO_BATCHES = 2
"""Per iteration, of ControlNet and adapters."""
SGD = partial(torch.optim.SGD, lr=0.02)
GRADIENT_CLIP_NORM = 0.5


def strategy_of(name: str) -> Strategy:
    """Four processes on the CPU: "ddp", "hsdp" (2 replicas of 2 shards) or "fsdp2" (4 shards)."""
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ShardedNetworks(2 if name == "hsdp" else 1, process_group_backend="gloo")


def gan(base: Path) -> OneStepDistillation:
    """Two iterations of warm-up, one of fake score and discriminator, then the student on every second."""
    return distillation(
        base,
        optimizer=SGD,
        update_schedule=UpdateSchedule(
            max_student_updates=99,
            fake_score_updates_per_student_update=2,
            warmup_updates=2,
            fake_score_only_iterations=1,
        ),
        pairs=PairSettings(count=4, sampler_steps=2, sampler_batch_size=4),
        regression=Regression(),
        gradient_clip_norm=GRADIENT_CLIP_NORM,
    )


def controlnet(base: Path) -> ControlNetDistillation:
    """ControlNets of a frozen student and of the fake score, both updated in an iteration of two micro-batches."""
    return ControlNetDistillation(
        family_of(base),
        ControlledStudent(SGD),
        ControlledFakeScore(SGD),
        UpdateSchedule(max_student_updates=99, fake_score_updates_per_student_update=1),
        ema_decay=0.9,
        accumulate_grad_batches=MICRO_BATCHES,
        gradient_clip_norm=GRADIENT_CLIP_NORM,
    )


def adapters(base: Path) -> ControlNetTraining:
    """Adapters of a ControlNet, by Lightning's automatic optimisation, where the Trainer accumulates."""
    source = ControlNetSource(lora=LoRA(rank=2, targets=("to_q", "conv1")))
    return ControlNetTraining(family_of(base), SGD, controlnet=source, ema_decay=0.5)


class Sent(NamedTuple):
    """One collective."""

    operation: str
    members: tuple[int, ...]
    elements: int


class Collectives(TorchDispatchMode):
    """Records every collective of c10d, and among which ranks it is."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on local tensors come here again
        if func.namespace in ("c10d", "_c10d_functional"):
            objects = [one for one in args if isinstance(one, torch.ScriptObject)]
            names = [one for one in args if isinstance(one, str)]
            if not objects and not names:
                return func(*args, **kwargs or {})
            # c10d has the group before other objects, functional collectives its name after the operation's.
            resolve: Any = _resolve_process_group
            group = dist.ProcessGroup.unbox(objects[0]) if objects else resolve(names[-1])
            members = tuple(dist.get_process_group_ranks(group))
            operation = func.overloadpacket.__name__
            whole = args[1] if "reduce_scatter_base" in operation else args[0]  # output, input, ...
            tensors = whole if isinstance(whole, list | tuple) else [whole]
            self.sent.append(Sent(operation, members, sum(tensor.numel() for tensor in tensors)))
        return func(*args, **kwargs or {})


class Watch(Callback):
    """Notes the gradient norms after every batch, saves after some, and records the collectives of others.

    Args:
        counted: the batches whose collectives are recorded, from 0.
        saves: a checkpoint after so many batches.
    """

    def __init__(self, counted: range = range(0), saves: dict[int, Path] | None = None) -> None:
        self.counted, self.saves = counted, saves or {}
        self.norms: list[dict[str, float]] = []
        self.collectives = Collectives()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if batches_of(trainer) - 1 in self.counted:
            self.collectives.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        done = batches_of(trainer)
        if done - 1 in self.counted:
            self.collectives.__exit__(None, None, None)
        metrics = trainer.callback_metrics.items()
        self.norms.append({name: float(value) for name, value in metrics if "gradient_norm" in name})
        if done in self.saves:
            trainer.save_checkpoint(self.saves[done])


def placements_of(module: OneStepDistillation) -> dict[str, set[str]]:
    """How the parameters of every network are distributed."""
    assert module.ema is not None and module.real_score is not None
    networks: dict[str, torch.nn.Module] = {**module.networks, "ema": module.ema}
    networks["real_score"] = module.real_score.module
    return {
        role: {str(p.placements) if isinstance(p, DTensor) else "whole" for p in network.parameters()}
        for role, network in networks.items()
    }


def train_everything(base: Path, shards: Path, out: Path) -> None:
    """The same runs under DDP and HSDP; one of HSDP goes on as FSDP2."""
    counted = CountSent()
    counted.start()
    results: dict[str, Any] = {}

    def run(name: str, case: str, module: Any, batches: int, watch: Watch, **settings: Any) -> None:
        fit(
            module,
            shards,
            batches,
            1,
            callbacks=[watch],
            devices=4,
            strategy=strategy_of(name),
            **settings,
        )
        results[f"{name} {case}"] = {
            "weights": arrived(module),
            "norms": watch.norms,
            "sent": watch.collectives.sent,
        }

    saved = out / "hsdp.ckpt"
    contents: Any = ["latents", "control_images"]
    automatic: dict[str, Any] = {
        "contents": contents,
        "accumulate_grad_batches": MICRO_BATCHES,
        "gradient_clip_val": 0.5,
    }
    last_iteration = range(MICRO_BATCHES, 2 * MICRO_BATCHES)
    for name in ("ddp", "hsdp"):
        module = gan(base)
        watch = Watch(range(COUNTED, COUNTED + 1), {SAVED_AFTER: saved} if name == "hsdp" else {})
        run(name, "gan", module, ITERATIONS, watch)
        if name == "ddp":
            results["overlap"] = counted.overlapped, sum(counted.sent)
        else:
            results["placements"] = placements_of(module)
        run(
            name,
            "controlnet",
            controlnet(base),
            MICRO_BATCHES,
            Watch(range(MICRO_BATCHES)),
            contents=contents,
        )
        run(name, "adapters", adapters(base), 2 * MICRO_BATCHES, Watch(last_iteration), **automatic)
    run("fsdp2", "from hsdp", gan(base), ITERATIONS, Watch(), ckpt_path=str(saved))
    torch.save(results, out / f"rank_{dist.get_rank()}.pt")
