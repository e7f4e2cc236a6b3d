"""Names accepted by the command options; does not import torch, so that `--help` and option errors are fast."""

from __future__ import annotations

TOY_PROTOCOLS = ("toy", "toy-val")
PROTOCOL_NAMES = (
    *TOY_PROTOCOLS,
    "coco2017-5k",
    "coco2014-30k-256",
    "coco2014-10k-512",
    "bk-sdm",
    "clean",
    "torch-fidelity",
    "pytorch-fid",
    "torchmetrics",
)

FRECHET_METRICS = ("fid", "patch_fid", "fd_dinov2")
"""Metrics that need the mean and covariance of the reference features."""

FEATURE_SET_METRICS = ("kid", "precision_recall", "cmmd")
"""Metrics that need the reference features rather than their statistics."""

REFERENCE_METRICS = (*FRECHET_METRICS, *FEATURE_SET_METRICS)
"""Metrics that need a reference."""

CAPTION_METRICS = ("clip_score", "pickscore", "hpsv2", "caption_accuracy", "shape_score")
"""Metrics that need captions."""

METRIC_NAMES = (*REFERENCE_METRICS, *CAPTION_METRICS, "aesthetic", "inception_score", "diversity")

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Classes of diffusers by the names of `--scheduler`."""

NETWORK_KINDS = (
    "inception",
    "inception_logits",
    "clip_image",
    "clip_text",
    "clip_unit",
    "dinov2",
    "pickscore",
    "hpsv2",
    "aesthetic",
    "attributes",
)
"""Kinds accepted by `--weights KIND=PATH`."""


def parse_weights(text: str) -> tuple[str, str]:
    """Parse `KIND=PATH` of `--weights`.

    Raises:
        ValueError: for an invalid form or an unknown kind.
    """
    kind, _, path = text.partition("=")
    if not path:
        raise ValueError(f"--weights takes KIND=PATH, such as inception=inception.pth; got '{text}'.")
    if kind not in NETWORK_KINDS:
        raise ValueError(f"--weights names {kind}, but takes {', '.join(NETWORK_KINDS)}.")
    return kind, path
