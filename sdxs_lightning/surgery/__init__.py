"""Pruned students: which parts of a U-Net stay, and where each of their weights comes from."""

from sdxs_lightning.surgery.config import prune_config
from sdxs_lightning.surgery.feature_pairs import feature_pairs
from sdxs_lightning.surgery.presets import PRESETS, topology_of
from sdxs_lightning.surgery.pruning import plan, prune
from sdxs_lightning.surgery.report import TransferReport
from sdxs_lightning.surgery.topology import Stage, Topology

__all__ = [
    "PRESETS",
    "Stage",
    "Topology",
    "TransferReport",
    "feature_pairs",
    "plan",
    "prune",
    "prune_config",
    "topology_of",
]
