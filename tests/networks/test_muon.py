"""Muon against torch's own optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sdxs_lightning.training.muon import Muon, orthogonalised


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 16, 144), (2, 40, 10), (1, 12, 12)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = random(*shape)
    result = orthogonalised(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ v)).sum(dim=(1, 2)) / (result.norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_matrices_follow_torchs_muon() -> None:
    ours, theirs = nn.Parameter(random(16, 24)), nn.Parameter(random(16, 24))
    optimizers = (
        Muon([ours], lr=0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = random(16, 24, seed=step)
            optimizer.step()
    moved = (ours - random(16, 24)).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch iterates in bfloat16
    assert moved > 0.1


def test_the_rest_follows_torchs_adamw() -> None:
    shapes = [(16,), (3, 16, 3, 3), (5, 2)]  # a bias, the last convolution, a narrow matrix
    ours, theirs = ([nn.Parameter(random(*shape)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = Muon(ours, **settings), torch.optim.AdamW(theirs, **settings)  # type: ignore[arg-type]
    for step in range(5):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter in parameters:
                parameter.grad = random(*parameter.shape, seed=step)
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_convolution_is_a_matrix_of_one_row_per_output_and_layout_does_not_matter() -> None:
    flat, kernel = nn.Parameter(random(16, 72)), nn.Parameter(random(16, 72).view(16, 8, 3, 3))
    last = nn.Parameter(kernel.detach().to(memory_format=torch.channels_last))
    for parameter in (flat, kernel, last):
        gradient = random(16, 72, seed=1).view(parameter.shape)
        parameter.grad = gradient.to(memory_format=torch.channels_last) if parameter is last else gradient
        Muon([parameter], lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), flat)
    torch.testing.assert_close(last, kernel)


def test_a_restored_state_goes_on_the_same() -> None:
    network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))
    images = random(2, 2, 7, 7)

    def train(module: nn.Module, optimizer: Muon, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            module(images).square().mean().backward()
            optimizer.step()

    optimizer = Muon(network.parameters(), lr=0.01)
    train(network, optimizer, 2)
    other = copy.deepcopy(network)
    restored = Muon(other.parameters(), lr=0.5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(network, optimizer, 2)
    train(other, restored, 2)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_negative_rate() -> None:
    with pytest.raises(ValueError, match=r"lr of Muon must not be negative, got -1"):
        Muon([nn.Parameter(torch.zeros(2))], lr=-1)
