"""Names that the commands' options accept; imports nothing, so that `--help` and refused options cost no start-up time."""

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
"""Compare with the mean and covariance of the reference's features."""

FEATURE_SET_METRICS = ("kid", "precision_recall", "cmmd")
"""Compare with the reference's features; their statistics are not enough."""

REFERENCE_METRICS = (*FRECHET_METRICS, *FEATURE_SET_METRICS)
"""Need a reference."""

CAPTION_METRICS = ("clip_score", "pickscore", "hpsv2", "caption_accuracy")
"""Need captions."""

METRIC_NAMES = (*REFERENCE_METRICS, *CAPTION_METRICS, "diversity")

NETWORK_KINDS = (
    "inception",
    "clip_image",
    "clip_text",
    "clip_unit",
    "dinov2",
    "pickscore",
    "hpsv2",
    "attributes",
)
"""What `--weights KIND=PATH` accepts."""

PRECISIONS = ("fp32", "fp16", "bf16")
"""Of the networks of a measured model."""
