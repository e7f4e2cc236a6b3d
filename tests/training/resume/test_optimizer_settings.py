"""New optimizer settings and schedules on resume are applied and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

from sdxs_lightning.callbacks.optimizer_settings import apply_settings, settings_of
from tests.helpers.resumed_run import saved


def test_new_learning_rates_and_schedules_are_applied_and_said(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        arguments = config["model"]["init_args"]
        arguments["student"]["init_args"]["optimizer"]["init_args"] = {"lr": 5e-4, "weight_decay": 0.3}
        arguments["fake_score"]["init_args"]["lr_scheduler"]["init_args"]["total_updates"] = 4

    code, said = resume(change)
    assert code == 0
    assert "student: lr 0.001 -> 0.0005" in said
    assert "student: weight_decay 0.01 -> 0.3" in said
    assert "fake_score: lr by the schedule, now " in said
    student, fake_score = (state["param_groups"][0] for state in saved(tmp_path)["optimizer_states"])
    # After three updates, half a cosine from lr to lr / 2 over 10 updates (student), over 4 (fake score).
    assert student["lr"] == pytest.approx(5e-4 * 0.896947, rel=1e-5)
    assert student["weight_decay"] == 0.3
    assert fake_score["lr"] == pytest.approx(1e-3 * 0.573223, rel=1e-5)


class _Trainer:
    """Of a Trainer what `settings_of` reads."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.optimizers = [optimizer]
        self.lr_scheduler_configs = (
            [] if scheduler is None else [type("Config", (), {"scheduler": scheduler})]
        )


@pytest.mark.parametrize("kind", ["none", "lambda", "cosine", "step"])
@pytest.mark.parametrize("old_version", [False, True])
def test_a_restored_schedule_goes_on_as_if_begun_with_the_new_rate(kind: str, old_version: bool) -> None:
    def build(lr: float, gamma: float = 0.1, period: int = 10) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=lr)
        schedulers: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "lambda": lambda: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            "cosine": lambda: CosineAnnealingLR(optimizer, T_max=period),
            "step": lambda: StepLR(optimizer, step_size=2, gamma=gamma),
        }
        return optimizer, schedulers[kind]()

    def steps(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> float:
        for _ in range(count):
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return float(optimizer.param_groups[0]["lr"])

    old, old_schedule = build(1e-3)
    (before,) = settings_of(_Trainer(old, old_schedule))  # type: ignore[arg-type]
    steps(old, old_schedule, 3)
    changed: dict[str, Any] = {} if old_version else {"gamma": 0.5, "period": 8}
    new, new_schedule = build(2e-4, **changed)
    (now,) = settings_of(_Trainer(new, new_schedule))  # type: ignore[arg-type]
    new.load_state_dict(old.state_dict())
    if new_schedule is not None:
        new_schedule.load_state_dict(old_schedule.state_dict())
    if old_version:
        before = {"groups": [{k: v for k, v in old.param_groups[0].items() if k != "params"}]}
    assert apply_settings(new, new_schedule, before, now)
    wanted = build(2e-4, **changed)
    assert steps(*wanted, 3) == pytest.approx(float(new.param_groups[0]["lr"]), rel=1e-9)
    assert steps(*wanted, 3) == pytest.approx(steps(new, new_schedule, 3), rel=1e-9)
