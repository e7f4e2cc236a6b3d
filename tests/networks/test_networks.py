"""The parts of the composition by themselves: update_schedule, average, discriminator, learning rates, gradients."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.network import no_param_grad
from sdxs_lightning.stages.distillation.update_schedule import Updates, UpdateSchedule
from sdxs_lightning.training import gradient_average
from sdxs_lightning.training.gradient_average import GradientAverage
from sdxs_lightning.training.gradients import clip_gradients
from sdxs_lightning.training.lr_schedules import TwoPhaseLR

SGD = partial(torch.optim.SGD, lr=0.1)


def test_curriculum_order() -> None:
    update_schedule = UpdateSchedule(
        max_student_updates=9,
        fake_score_updates_per_student_update=3,
        warmup_updates=2,
        fake_score_only_iterations=2,
    )
    warmup, others, both = Updates(True, False, True), Updates(False, True, False), Updates(True, True, False)
    expected = [warmup, warmup, others, others, both, others, others, both, others, others, both]
    assert [update_schedule.updates_at(i) for i in range(11)] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_student_updates": 0}, "at least 1"),
        ({"max_student_updates": 5, "warmup_updates": 6}, r"at least warmup_updates \(6\), got 5"),
        ({"max_student_updates": 5, "fake_score_updates_per_student_update": 0}, "1 or more, got 0"),
        (
            {"max_student_updates": 5, "fake_score_only_iterations": -1},
            "fake_score_only_iterations must be 0 or more",
        ),
    ],
)
def test_curriculum_refuses(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateSchedule(**settings)


@pytest.mark.parametrize(
    ("shape", "convolutions"),
    [((32, 8, 8), 3), ((32, 32, 32), 5), ((12, 4, 4), 2), ((16, 2, 2), 2), ((8, 7, 5), 2)],
)
def test_discriminator_reaches_one_logit_from_any_size(
    shape: tuple[int, int, int], convolutions: int
) -> None:
    head = Discriminator(SGD)
    head.build(shape)
    layers = [layer for layer in head.head if isinstance(layer, nn.Conv2d)]
    assert len(layers) == convolutions
    assert head(torch.randn(3, *shape)).shape == (3,)
    # Nothing in it may look across the batch, since real and fake share one call.
    features = torch.randn(4, *shape)
    torch.testing.assert_close(head(features)[:2], head(features[:2]))


def test_discriminator_weights_depend_on_its_seed_only() -> None:
    heads = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        head = Discriminator(SGD, seed=seed)
        head.build((8, 4, 4))
        heads.append(next(head.parameters()))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_configuring_before_building_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="Discriminator: nothing to optimise"):
        Discriminator(SGD).configure_optimizers()


def test_no_param_grad_restores_only_what_was_trainable() -> None:
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    with no_param_grad(network, None):
        assert not network.weight.requires_grad
        inputs = torch.ones(1, 2, requires_grad=True)
        network(inputs).sum().backward()
    assert network.weight.grad is None and inputs.grad is not None
    assert network.weight.requires_grad and not network.bias.requires_grad


def test_clip_gradients_returns_the_norm_before() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, None).item() == 5.0 and parameters[0].grad.item() == 3.0
    assert clip_gradients(parameters, 10.0).item() == 5.0 and parameters[0].grad.item() == 3.0
    assert clip_gradients(parameters, 1.0).item() == 5.0
    assert parameters[0].grad.item() == pytest.approx(0.6, rel=1e-5)


def test_gradients_are_averaged_in_buckets_of_their_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    first, second, unused = (nn.Parameter(torch.ones(size)) for size in (4, 5, 2))
    parameters = [first, second, *wide.parameters(), unused]
    messages: list[int] = []

    class Sent:
        def wait(self) -> None:
            messages.append(0)

    def two_equal_ranks(flat: torch.Tensor, async_op: bool) -> Sent:
        assert async_op
        messages.append(flat.numel())
        flat *= 2
        return Sent()

    monkeypatch.setattr(dist, "all_reduce", two_equal_ranks)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda order: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(gradient_average, "BUCKET_BYTES", 4 * 9)
    average = GradientAverage(parameters)

    def loss() -> torch.Tensor:
        # Gradients arrive in the order from the convolution's weight to `second`.
        images = (second.sum() * torch.arange(50.0)).view(1, 2, 5, 5)
        output: torch.Tensor = wide(images * first.sum())
        return output.square().mean()

    for sent_meanwhile in (False, True):
        for parameter in parameters:
            parameter.grad = None
        loss().backward()  # an earlier micro-batch, which nothing is sent of
        assert messages == []
        with average.overlapping():
            loss().backward()
        # The weight, which is more than a bucket, then its bias and `first`; the last bucket waits for the unused parameter.
        assert messages == ([54, 7] if sent_meanwhile else [])
        average.finish()
        assert messages == [54, 7, 5, 0, 0, 0]
        messages.clear()
        expected = torch.autograd.grad(loss(), parameters[:-1])
        for parameter, alone in zip(parameters, expected, strict=False):
            assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
            torch.testing.assert_close(parameter.grad, 2 * alone, rtol=1e-6, atol=0)
        assert unused.grad is None


def test_two_phase_learning_rate() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))])
    schedule = TwoPhaseLR(
        optimizer,
        total_updates=14,
        first_phase_updates=4,
        first_phase_factor=5.0,
        ramp_updates=2,
        final_factor=0.2,
    )
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"] / 0.1)
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(5.0) and rates[2] == pytest.approx(3.0)
    assert rates[4] == pytest.approx(0.5) and rates[14] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(0.6) and all(a >= b for a, b in itertools.pairwise(rates[5:]))
