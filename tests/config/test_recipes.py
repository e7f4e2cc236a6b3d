"""Every distillation that is shipped or documented trains as fast and as long as it says, by arithmetic alone.

A schedule can take a tenth of a run for its ramp, and an average can hold on to the initial weights, without any error: the
run just ends nearer to where it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch

from tests.config.test_resolved import resolve, stacks

AVERAGE_AT_LEAST = 0.85
"""Share of the exported average that the run itself must have made: 1 - ema_decay^updates."""
RATE_AT_LEAST = 0.3
"""Mean learning rate over that of the optimizer; a cosine decay to a fifth has 0.6."""
RAMP_AT_MOST = 0.05
"""Share of the updates below 90 % of the rate that the schedule then reaches."""


@cache
def resolved(stack: str) -> dict[str, Any]:
    """The settings of a stack of files, read once."""
    return resolve(stack)


def nested(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def factors(settings: Mapping[str, Any], role: str, updates: int) -> tuple[float, ...]:
    """The learning rate of a role at each of its updates, over its optimizer's."""
    network = nested(settings, f"model.init_args.{role}.init_args.lr_scheduler.")
    name, arguments = network.get("class_path"), nested(network, "init_args.")
    return (1.0,) * updates if name is None else scheduled(name, tuple(sorted(arguments.items())), updates)


@cache
def scheduled(name: str, arguments: tuple[tuple[str, Any], ...], updates: int) -> tuple[float, ...]:
    """Factors of a schedule; most configurations share theirs."""
    module, _, class_name = name.rpartition(".")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = getattr(import_module(module), class_name)(optimizer, **dict(arguments))
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return tuple(found)


def distillations() -> list[str]:
    return [
        stack
        for stack in stacks()
        if "model.init_args.update_schedule.max_student_updates" in resolved(stack)
    ]


def problems(settings: Mapping[str, Any]) -> list[str]:
    """What a resolved configuration does not train."""
    schedule = nested(settings, "model.init_args.update_schedule.")
    total, warmup = schedule["max_student_updates"], schedule.get("warmup_updates", 0)
    found = []
    if 1 - settings["model.init_args.ema_decay"] ** total < AVERAGE_AT_LEAST:
        found.append(f"ema_decay {settings['model.init_args.ema_decay']} over {total} updates")
    counts = {"student": total}
    if settings.get("model.init_args.fake_score.class_path"):
        ratio = schedule.get("fake_score_updates_per_student_update", 5)
        counts["fake_score"] = min(ratio * (total - warmup), 2000)  # its schedules only rise, at the start
    for role, updates in counts.items():
        rates = factors(settings, role, updates)
        # The warm-up stage has rates of its own; each phase is compared with what it reaches itself.
        first = warmup if role == "student" and warmup < total else 0
        for name, phase in (("warm-up", rates[:first]), ("run", rates[first:])):
            if not phase:
                continue
            peak = phase.index(max(phase))
            ramp = sum(rate < 0.9 * phase[peak] for rate in phase[:peak])
            if ramp > max(RAMP_AT_MOST * len(phase), 10):
                found.append(f"{role}, {name}: {ramp} of {len(phase)} updates are a ramp")
            if sum(phase) / len(phase) < RATE_AT_LEAST * max(1.0, *phase):
                found.append(f"{role}, {name}: mean rate {sum(phase) / len(phase):.2f} of {max(phase):.2f}")
    return found


@pytest.mark.parametrize("stack", distillations())
def test_a_distillation_trains_at_its_rate_and_exports_what_it_trained(stack: str) -> None:
    assert not problems(resolved(stack))


def test_dmd2s_numbers_of_updates() -> None:
    """Of fake score updates: 39 k and 2 k for SD-1.5, 24 k and (four steps) 19 k for SDXL."""
    for stack, updates in {
        "sd15/distill.yaml": 39_000,
        "sd15/distill.yaml sd15/distill_gan.yaml": 2_000,
        "sdxl/distill.yaml": 24_000,
        "sdxl/distill.yaml sdxl/distill_4step.yaml": 19_000,
    }.items():
        schedule = nested(resolved(stack), "model.init_args.update_schedule.")
        student = schedule["max_student_updates"] - schedule.get("warmup_updates", 0)
        assert student * schedule["fake_score_updates_per_student_update"] == updates, stack


def test_stage_2_goes_on_from_stage_1() -> None:
    first, second = resolved("sd15/distill.yaml"), resolved("sd15/distill.yaml sd15/distill_gan.yaml")
    folder = first["trainer.default_root_dir"]
    assert second["model.init_args.student.init_args.weights"] == f"{folder}/pipeline"
    assert second["model.init_args.fake_score.init_args.weights"] == f"{folder}/fake_score"
    exports = [key for key, value in first.items() if str(value).endswith("export.Export")]
    assert first[exports[0].replace("class_path", "init_args.fake_score")] is True


def test_what_the_bounds_are_for() -> None:
    """The recipes that prompted this test: a ramp of 500 of 3 900 updates, and an average of 0.999 over 200."""
    old = resolved("sd15/distill.yaml") | {
        "model.init_args.student.init_args.lr_scheduler.init_args.total_iters": 500,
        "model.init_args.ema_decay": 0.9999,
    }
    assert len(problems(old)) == 2
