"""The fingerprint of frozen weights tells any two networks apart."""

from __future__ import annotations

import torch
from torch import nn

from sdxs_lightning.core.frozen import fingerprint


def network(change: str = "none") -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(40, 30), nn.Linear(30, 30), nn.Linear(30, 30)]
    first, second, third = (layer.weight.detach() for layer in layers)
    if change == "one value":
        first[-1, -1] = torch.nextafter(first[-1, -1], torch.tensor(9.0))
    elif change == "two values swapped":
        first[-1, -2:] = first[-1, -2:].flip(0)
    elif change == "two rows swapped":
        first[-2:] = first[-2:].flip(0)
    elif change == "four values swapped crosswise":  # what hashes of rows and of columns would not see
        first[-2:, -2:] = first[-2:, -2:].flip(0, 1)
    elif change == "two layers swapped":
        second[:], third[:] = third.clone(), second.clone()
    return nn.Sequential(*layers)


def test_any_change_of_weights_is_seen() -> None:
    changes = (
        "one value",
        "two values swapped",
        "two rows swapped",
        "four values swapped crosswise",
        "two layers swapped",
    )
    prints = {fingerprint(network(change)) for change in ("none", *changes)}
    assert len(prints) == 1 + len(changes) and None not in prints
    assert fingerprint(network()) == fingerprint(network())


def test_layout_and_device_do_not_count_and_rounding_does() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3)
    expected = fingerprint(conv)
    assert fingerprint(conv.to(memory_format=torch.channels_last)) == expected
    assert fingerprint(conv.to("meta")) is None
    assert fingerprint(network(), torch.bfloat16) == fingerprint(network().bfloat16())
    assert fingerprint(network()) != fingerprint(network().double())
