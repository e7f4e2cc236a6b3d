"""Topologies by name, with their parameter counts and where these are published.

The depths of ssd-1b, vega and koala-700m are those by which public loaders recognise the released files. The files do not
record which of SDXL's blocks a kept block started from: ours are evenly spaced (`Topology.transformer_blocks`).
"""

from __future__ import annotations

from dataclasses import replace

from sdxs_lightning.surgery.topology import Stage, Topology

# BK-SDM keeps the first layer of each down stage, and of each up stage the first and the last.
_HALF = Stage(down_layers=(0,), up_layers=(0, -1))
_HALF_RESNETS = replace(_HALF, down_depths=0, up_depths=0)
_RESNETS = Stage(down_depths=0, up_depths=0)

_VEGA = Topology(
    stages=(_RESNETS, Stage(down_depths=1, up_depths=1), Stage(down_depths=2, up_depths=2)),
    mid_block="resnet",
    added_conditioning="text_time",
    name="vega",
    note="Segmind Vega: 745,225,604 parameters from SDXL (arXiv:2401.02677: 0.74 B)",
)

_TOPOLOGIES = (
    Topology(
        stages=(_HALF_RESNETS, _HALF, _HALF),
        mid_block="none",
        added_conditioning="none",
        name="sdxs-512",
        note="arXiv:2403.16627, 3.1: 318,695,364 parameters from SD-2.1 (paper: 319 M), 315,746,244 from SD-1.5, as in "
        "sdxs-512-dreamshaper",
    ),
    Topology(
        # attention_head_dim [8, 8, 8] and only_cross_attention [true, false, false] are those of the released file.
        stages=(
            replace(_HALF, attention_heads=8, only_cross_attention=True),
            replace(_HALF, attention_heads=8),
            replace(_HALF, attention_heads=8),
        ),
        mid_block="none",
        added_conditioning="none",
        name="sdxs-512-0.9",
        note="the released sdxs-512-0.9: 328,177,284 parameters from SD-2.1",
    ),
    replace(
        _VEGA,
        name="sdxs-1024",
        note="arXiv:2403.16627: 745,225,604 parameters from SDXL (paper: 0.74 B); the topology of vega",
    ),
    Topology(
        stages=(_HALF,) * 4,
        mid_block="full",
        added_conditioning="none",
        name="bk-base",
        note="BK-SDM (arXiv:2305.15798): 579,384,964 parameters from SD-1.x (v1), 583,480,964 from SD-2.x (v2)",
    ),
    Topology(
        stages=(_HALF,) * 4,
        mid_block="none",
        added_conditioning="none",
        name="bk-small",
        note="BK-SDM: 482,346,884 parameters (v1), 485,787,524 (v2)",
    ),
    Topology(
        stages=(_HALF,) * 3,
        mid_block="none",
        added_conditioning="none",
        name="bk-tiny",
        note="BK-SDM: 323,384,964 parameters (v1), 326,825,604 (v2)",
    ),
    Topology(
        stages=(
            _HALF_RESNETS,
            replace(_HALF, down_depths=2, up_depths=2),
            replace(_HALF, down_depths=5, up_depths=5),
        ),
        mid_block="none",
        added_conditioning="text_time",
        name="koala-700m",
        note="KOALA (arXiv:2312.04005): 782,822,724 parameters from SDXL",
    ),
    Topology(
        stages=(
            _RESNETS,
            Stage(down_depths=2, up_depths=(2, 1, 1)),
            Stage(down_depths=4, up_depths=(4, 4, 10)),
        ),
        mid_block="resnet",
        added_conditioning="text_time",
        name="ssd-1b",
        note="Segmind SSD-1B: 1,331,334,404 parameters from SDXL (arXiv:2401.02677: 1.3 B)",
    ),
    _VEGA,
)

PRESETS: dict[str, Topology] = {topology.name: topology for topology in _TOPOLOGIES}


def topology_of(choice: str | Topology) -> Topology:
    """A preset by its name; a topology is returned unchanged.

    Raises:
        ValueError: for a name that no preset has.
    """
    if isinstance(choice, Topology):
        return choice
    if choice not in PRESETS:
        raise ValueError(
            f"there is no preset '{choice}'; there are {', '.join(PRESETS)}, or describe your own topology "
            "(stages, mid_block)."
        )
    return PRESETS[choice]
