"""Names that the commands' options accept; imports no torch, so that `--help` and refused options cost no start-up time."""

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


def parse_weights(text: str) -> tuple[str, str]:
    """`KIND=PATH` of `--weights` as a pair.

    Raises:
        ValueError: for another form or kind.
    """
    kind, _, path = text.partition("=")
    if not path:
        raise ValueError(f"--weights takes KIND=PATH, such as inception=inception.pth; got '{text}'.")
    if kind not in NETWORK_KINDS:
        raise ValueError(f"--weights names {kind}, but takes {', '.join(NETWORK_KINDS)}.")
    return kind, path
