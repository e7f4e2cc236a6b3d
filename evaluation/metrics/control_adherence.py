"""Control adherence: agreement of an image's edges or depth with its control image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from evaluation.metrics.sampled import PerImageMetric
from sdxs_lightning.core.image_condition import ImageCondition


class ControlAdherence(PerImageMetric):
    """Extracts the condition of each generated image and compares it with the control image.

    Args:
        condition: extracts control images, such as `data.conditions.Canny` or `Depth`; same settings as for the control
            images.
        name: name of the metric.
    """

    def __init__(self, condition: ImageCondition, name: str) -> None:
        super().__init__()
        self.condition, self.names = condition, (name,)

    def update_with(
        self,
        images_uint8: Tensor,
        controls_uint8: Tensor,
        sample_ids: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Add generated images and their control images, both (B,3,H,W) uint8.

        Raises:
            ValueError: unless there is one control image of the same size per image.
        """
        if len(images_uint8) > 0 or len(controls_uint8) > 0:
            self.add(self.measure_with(images_uint8, controls_uint8), sample_ids)

    def measure_with(self, images_uint8: Tensor, controls_uint8: Tensor) -> Tensor:
        """Rows (B, 1) that `update_with` stores."""
        if images_uint8.shape != controls_uint8.shape:
            raise ValueError(
                f"{self.title} of images {tuple(images_uint8.shape)} with control images {tuple(controls_uint8.shape)}; one "
                "of the same size is needed for each"
            )
        arrays = images_uint8.permute(0, 2, 3, 1).cpu().numpy()
        made = np.stack([self.condition(np.ascontiguousarray(array)) for array in arrays])
        return self.between(torch.from_numpy(made).permute(0, 3, 1, 2), controls_uint8.cpu()).unsqueeze(1)

    def measure(self, images_uint8: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Raises: captions do not describe the control image."""
        raise ValueError(f"{self.title} needs control images; use update_with(images_uint8, controls_uint8)")

    def between(self, made: Tensor, wanted: Tensor) -> Tensor:
        """Metric per image, (B,) float64, from conditions of the images and control images, both (B,3,H,W) uint8."""
        raise NotImplementedError


class EdgeAdherence(ControlAdherence):
    """F1 of edge pixels: 1 where the image has exactly the edges of the control image.

    Args:
        condition: an edge detector; white (128 and up) on black.
        tolerance_px: distance from an edge within which a pixel counts as on it; 0 as in ControlNet++.
        name: name of the metric.

    Source: ControlNet++, arXiv:2404.07987, section 4.1 (Canny).
    """

    higher_is_better = True
    bounds = (0.0, 1.0)

    def __init__(self, condition: ImageCondition, tolerance_px: int = 0, name: str = "edge_f1") -> None:
        super().__init__(condition, name)
        self.tolerance_px = tolerance_px

    def between(self, made: Tensor, wanted: Tensor) -> Tensor:
        """F1 per image; 1 where neither has an edge."""
        sides = [(side.amax(1, keepdim=True) >= 128).double() for side in (made, wanted)]
        reach = 2 * self.tolerance_px + 1
        near = [max_pool2d(side, reach, stride=1, padding=self.tolerance_px) for side in sides]
        counts = [side.sum((1, 2, 3)) for side in sides]
        hits = [(sides[0] * near[1]).sum((1, 2, 3)), (sides[1] * near[0]).sum((1, 2, 3))]
        precision, recall = (hit / count.clamp_min(1) for hit, count in zip(hits, counts, strict=True))
        f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        return torch.where(counts[0] + counts[1] == 0, torch.ones_like(f1), f1)


class DepthAdherence(ControlAdherence):
    """Root mean square difference of relative depth, in grey levels of 0..255.

    Args:
        condition: a depth network.
        name: name of the metric.

    Source: ControlNet++, arXiv:2404.07987, section 4.1 (depth RMSE).
    """

    higher_is_better = False
    bounds = (0.0, 255.0)

    def __init__(self, condition: ImageCondition, name: str = "depth_error") -> None:
        super().__init__(condition, name)

    def between(self, made: Tensor, wanted: Tensor) -> Tensor:
        return (made.double() - wanted.double()).square().mean((1, 2, 3)).sqrt()


class ReaderAdherence(DepthAdherence):
    """Root mean square difference of the condition that a reader reads, in grey levels of 0..255.

    Args:
        condition: a trained reader, or a condition of the user's own.
        name: name of the metric.
    """

    def __init__(self, condition: ImageCondition, name: str = "condition_error") -> None:
        super().__init__(condition, name)


class BarAdherence(ControlAdherence):
    """Share of images of the toy world whose background is the one that the bar states.

    Args:
        condition: draws the bar of the background that it sees.
        name: name of the metric.
    """

    higher_is_better = True
    bounds = (0.0, 1.0)

    def __init__(self, condition: ImageCondition, name: str = "background_accuracy") -> None:
        super().__init__(condition, name)

    def between(self, made: Tensor, wanted: Tensor) -> Tensor:
        return (made == wanted).flatten(1).all(dim=1).double()
