"""Control adherence of a ControlNet's student during training, with its chance and ceiling, and grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from evaluation.callbacks.score_curve import ScoreCurve
from evaluation.callbacks.student_updates import check_counts, student_updates_of
from evaluation.images.control_sets import (
    CONDITIONS,
    ControlledPrompts,
    ControlSet,
    ReadCondition,
    ShardControlSet,
    ToyControlSet,
    adherence_of,
    made_by,
    measurable,
    network_of,
)
from evaluation.images.generate import rank_batches
from evaluation.protocols.protocols import Protocol, find_protocol, get_protocol
from evaluation.runner.control import Board, ControlledMaker, control_sheet
from evaluation.runner.control_quality import QualityMetrics
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_condition import ImageCondition, description_of
from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.stages.controlnet.distillation import ControlNetDistillation
from sdxs_lightning.stages.distillation.step import OneStepDistillation

GRID_COLUMNS = 8


def condition_of(datamodule: Any) -> ImageCondition:
    """The condition that a DataModule makes.

    Raises:
        UserError: if its conditions come from files.
    """
    made = getattr(getattr(datamodule, "settings", None), "condition", None)
    if made is None:
        raise UserError(
            "ControlMetrics: the data's conditions are not made by data.condition, so say how to read them off an image: "
            f"condition of the callback, one of {', '.join(CONDITIONS)}."
        )
    return made  # type: ignore[no-any-return]


class ControlMetrics(ScoreCurve):
    """Does the averaged student follow the condition? Logged as `val/...`, appended to scores.jsonl, and drawn as a grid.

    Beside each score stand `..._chance`, of the student without control, and `..._ceiling`, of the autoencoder's
    reconstruction of the image that the condition belongs to; both are measured once.

    Args:
        condition: how the condition is read off an image, as `--condition` of `python -m evaluation.evaluate`; None is the
            data's own condition, with its settings. A trained reader must not be the one that the ControlNet is trained with.
        control: shards with images and cond.png, or "toy" for the toy world's own images.
        make_conditions: make the conditions of the set's images instead of reading cond.png.
        every_n_student_updates: measuring interval.
        protocol: a toy protocol also measures FID, CLIP score and caption accuracy.
        samples: number of images.
        batch_size: images per call on each device.
        resolution: side to which the set's images are resized and cropped; None takes them unchanged.
        at_start: also before the first update.

    Raises:
        ValueError: for numbers below 1; in the setup UserError, for a set, condition or protocol that do not go together.
    """

    def __init__(
        self,
        condition: str | None = None,
        control: str = "toy",
        make_conditions: bool = True,
        every_n_student_updates: int = 50,
        protocol: str = "toy-val",
        samples: int = 200,
        batch_size: int = 50,
        resolution: int | None = None,
        at_start: bool = False,
    ) -> None:
        super().__init__(every_n_student_updates, at_start)
        check_counts(type(self).__name__, samples=samples, batch_size=batch_size)
        self._named, self.control, self.protocol = condition, control, protocol
        self.condition: ImageCondition | None = None
        """How it is read, known since the setup."""
        self.make_conditions, self.samples = make_conditions, samples
        self.batch_size, self.resolution = batch_size, resolution
        self.bounds: dict[str, float] = {}
        """Chance and ceiling, once measured."""
        self._set: ControlSet | None = None
        self._quality: QualityMetrics | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Opens the set and loads the metric networks, so that a missing one is reported before training starts."""
        if not isinstance(pl_module, ControlNetDistillation):
            raise UserError(
                f"ControlMetrics needs a ControlNetDistillation, got a {type(pl_module).__name__}; remove it from "
                "trainer.callbacks."
            )
        if self._set is not None:
            return
        data = getattr(trainer, "datamodule", None)
        self.condition = measurable(condition_of(data) if self._named is None else made_by(self._named))
        self._quality = QualityMetrics(self.protocol, pl_module.device)
        found = find_protocol(self.protocol)
        if self.control == "toy":
            if not isinstance(found, Protocol):
                raise UserError(
                    f"ControlMetrics: control toy goes with protocol toy or toy-val, got {self.protocol}; or name shards as "
                    "control."
                )
            split = get_protocol(self.protocol, samples=self.samples).split
            self._set = ToyControlSet(split, self.samples, self.condition)
        else:
            # What a reader sees in the images is not what was asked for.
            made = self.make_conditions and not isinstance(self.condition, ReadCondition)
            condition = self.condition if made else None
            self._set = ShardControlSet(self.control, self.resolution, self.samples, condition)
        self._check_size(self._set, pl_module.family.resolution)

    def _check_size(self, control_set: ControlSet, side: int) -> None:
        height, width = control_set.batch([0]).controls_uint8.shape[-2:]
        if (height, width) != (side, side):
            instead = "name shards of its size" if self.control == "toy" else f"set resolution to {side}"
            raise UserError(
                f"ControlMetrics: the images of `control` '{self.control}' are {height}x{width}, and the student's "
                f"{side}x{side}; {instead}."
            )

    def scores_of(self, trainer: pl.Trainer, module: OneStepDistillation) -> dict[str, float]:
        assert isinstance(module, ControlNetDistillation) and self._quality is not None
        seed = find_protocol(self.protocol).seed

        def drawn(prompts: ControlledPrompts, sample_ids: Tensor, scale: float) -> Tensor:
            noise = normal(seed, Stream.EVALUATION, sample_ids, module.family.latent_shape())
            controls = prompts.controls_uint8.float() / 255 if scale else None
            return to_uint8(module.generate(prompts.captions, noise, control_images=controls))

        def rebuilt(prompts: ControlledPrompts, sample_ids: Tensor) -> Tensor:
            images = from_uint8(prompts.targets_uint8.to(module.device))
            return to_uint8(module.family.decode(module.family.encode(images)))

        makers: dict[str, ControlledMaker] = {"": lambda prompts, ids: drawn(prompts, ids, 1.0)}
        if not self.bounds:
            makers |= {"_chance": lambda prompts, ids: drawn(prompts, ids, 0.0), "_ceiling": rebuilt}
        self._quality.device = module.device
        scores = self._measure(trainer, makers)
        if not self.bounds:
            bounds = {which: scores[which] for which in ("_chance", "_ceiling")}
            self.bounds = {f"{name}{which}": one for which in bounds for name, one in bounds[which].items()}
        self._draw_grid(trainer, module, makers[""], lambda prompts, ids: drawn(prompts, ids, 0.0))
        return scores[""] | self.bounds

    def _measure(
        self, trainer: pl.Trainer, makers: dict[str, ControlledMaker]
    ) -> dict[str, dict[str, float]]:
        """Figures of each maker; collective."""
        assert self._quality is not None and self._set is not None and self.condition is not None
        classifier: Any = None if self._quality.toy is None else self._quality.toy.classifier
        boards = {name: Board(adherence_of(self.condition, classifier), self._quality) for name in makers}
        ranks = trainer.global_rank, trainer.world_size
        for sample_ids, counting in rank_batches(self._set.count, self.batch_size, *ranks):
            prompts = self._set.batch(sample_ids.tolist())
            for name, maker in makers.items():
                # Every rank makes the padding too, because the forward of a sharded network is collective.
                images = maker(prompts, sample_ids)[:counting]
                captions, targets, controls = prompts
                kept = ControlledPrompts(captions[:counting], targets[:counting], controls[:counting])
                boards[name].update(images, kept, sample_ids[:counting])
        return {name: board.compute() for name, board in boards.items()}

    def _draw_grid(
        self, trainer: pl.Trainer, module: pl.LightningModule, own: ControlledMaker, plain: ControlledMaker
    ) -> None:
        assert self._set is not None
        ids = torch.arange(min(GRID_COLUMNS, self._set.count))
        prompts = self._set.batch(ids.tolist())
        output, plain_output = own(prompts, ids).cpu(), plain(prompts, ids).cpu()
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "control"
            folder.mkdir(parents=True, exist_ok=True)
            updates = student_updates_of(module)
            control_sheet(prompts, output, plain_output).save(folder / f"update_{updates:08d}.png")

    def protocol_id(self) -> dict[str, Any]:
        assert self.condition is not None
        condition = description_of(self.condition)
        return {"protocol": self.protocol, "control": self.control, "condition": condition}

    def networks(self) -> list[Any]:
        toy = None if self._quality is None else self._quality.toy
        reader = None if self.condition is None else network_of(self.condition)
        return [*([] if toy is None else [toy.clip, toy.classifier]), *([] if reader is None else [reader])]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bounds": self.bounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.bounds = state_dict["bounds"]
