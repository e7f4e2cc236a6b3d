"""Two processes reach what one reaches on the same global batches, under DDP and under FSDP2 per network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback

from tests.helpers.ranks.distributed_worker import (
    ADAMW_LR,
    CASES,
    DENOISING_UPDATES,
    GRADIENT_CLIP_NORM,
    ITERATIONS,
    MIXED_ITERATIONS,
    SGD_LR,
    STRATEGIES,
    arrived,
    contents_of,
    denoising,
    health_of,
    mixed_precision,
    module_for,
    train_everything,
)
from tests.helpers.ranks.processes import in_ranks
from tests.helpers.rounding import tolerance_of
from tests.helpers.tiny_decoding import save_dinov2
from tests.helpers.tiny_distillation import built, fit

# The pair of processes starts twice as many networks as any other test; on a busy machine it needs minutes.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def two_processes(
    base: Callable[[str], Path], shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with the results of the pair; it runs once for all tests here."""
    out = tmp_path_factory.mktemp("two")
    save_dinov2(base("sd-v_prediction").parent / "dinov2")
    ended = in_ranks(train_everything, (base("sd-v_prediction"), shards, out), out)
    assert [rank.code for rank in ended] == [0, 0], [rank.said[-3000:] for rank in ended]
    return out


@pytest.fixture(scope="module")
def one_process(base: Callable[[str], Path], shards: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a single process on the same global batches, without accumulation."""
    save_dinov2(base("sd-v_prediction").parent / "dinov2")
    results, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of the two: the order of sums depends on it
    for name, case in CASES.items():
        module = module_for(base("sd-v_prediction"), case, 1)
        callbacks: list[Callback] = [health_of()] if name == "two_steps" else []
        trainer = fit(
            module, shards, ITERATIONS, batch_size=4, callbacks=callbacks, contents=contents_of(case)
        )
        results[name] = arrived(module)
        if callbacks:
            results["diversity"] = {"of two_steps": trainer.callback_metrics["student/diversity"]}
    torch.set_num_threads(threads)
    return results


def load(two_processes: Path, strategy: str, case: str) -> dict[str, Any]:
    results: dict[str, Any] = torch.load(two_processes / f"{strategy}-{case}.pt", weights_only=False)
    return results


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", list(CASES))
def test_same_weights_as_one_process(
    two_processes: Path,
    one_process: dict[str, dict[str, torch.Tensor]],
    base: Callable[[str], Path],
    strategy: str,
    case: str,
) -> None:
    results = load(two_processes, strategy, case)
    assert results["sharded"] == (strategy == "fsdp2")
    expected = one_process[case]
    assert results["straight"].keys() == expected.keys()
    optimizer: Literal["sgd", "adam"] = "adam" if CASES[case].optimizer == "adamw" else "sgd"
    lr = {"sgd": SGD_LR, "adam": ADAMW_LR}[optimizer]
    allowed = {
        name: tolerance_of(value, optimizer, lr, ITERATIONS, GRADIENT_CLIP_NORM)
        for name, value in expected.items()
    }
    used = {
        name: float((results["straight"][name] - value).abs().max()) / allowed[name]
        for name, value in expected.items()
    }
    worst = max(used, key=used.__getitem__)
    print(f"{strategy} {case}: {used[worst]:.2f} of what rounding explains, in {worst}")
    assert used[worst] <= 1, worst
    start = arrived(built(module_for(base("sd-v_prediction"), CASES[case], 1)))
    moved = max(float((expected[name] - value).abs().max()) / allowed[name] for name, value in start.items())
    assert moved > 100, "the bound would hide a wrong update"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_controlnet_of_the_base_is_that_of_one_process(
    two_processes: Path, base: Callable[[str], Path], shards: Path, strategy: str
) -> None:
    results = load(two_processes, strategy, "denoising")
    assert results["sharded"] == (strategy == "fsdp2")
    module = denoising(base("sd-v_prediction"))
    module.configure_model()
    start = arrived(module)
    contents: Any = ["latents", "control_images"]
    fit(module, shards, DENOISING_UPDATES, batch_size=4, contents=contents)  # type: ignore[arg-type]
    expected = arrived(module)
    # Sharding ends the sharing of frozen weights with the average, whose names are then listed too.
    assert expected.keys() <= results["straight"].keys()
    moved = 0.0
    for name, value in results["straight"].items():
        alone = expected[name if name in expected else name.replace("ema.denoiser.", "controlled.")]
        atol = tolerance_of(alone, "sgd", SGD_LR, DENOISING_UPDATES, GRADIENT_CLIP_NORM)
        torch.testing.assert_close(value, alone, rtol=0, atol=atol, msg=name)
        if name in start:
            moved = max(moved, float((alone - start[name]).abs().max()) / atol)
    assert moved > 20, "the bound would hide a wrong update"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_diversity_is_that_of_one_process(
    two_processes: Path, one_process: dict[str, dict[str, torch.Tensor]], strategy: str
) -> None:
    found = load(two_processes, strategy, "two_steps")["diversity"]
    assert float(found) > 0.1
    torch.testing.assert_close(found, one_process["diversity"]["of two_steps"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_is_exact(two_processes: Path, strategy: str) -> None:
    results = load(two_processes, strategy, "adamw")
    # 2 warm-up iterations, 1 of fake score and discriminator, then the student on every second of 3.
    assert results["counters"] == (ITERATIONS, 2 + 2)
    for name, value in results["straight"].items():
        assert torch.equal(value, results["resumed"][name]), name
    assert (two_processes / f"{strategy}-adamw.ckpt").is_dir() == (strategy == "fsdp2")


@pytest.mark.parametrize("case", list(CASES))
def test_only_the_gradients_of_updated_networks_travel(
    two_processes: Path, base: Callable[[str], Path], case: str
) -> None:
    results = load(two_processes, "ddp", case)
    module = module_for(base("sd-v_prediction"), CASES[case], 1)
    module.configure_model()
    sizes = {role: sum(p.numel() for p in network.parameters()) for role, network in module.networks.items()}
    student, others = [sizes.pop("student")], [sum(sizes.values())]
    both = student + others
    iterations = [student, student, others, both, others, both]
    assert results["sent"] == [size for iteration in iterations for size in iteration]
    assert results["sent_by_reducer"] == 0
    # All but the first passes of the student and of the others, which find out the order; and what the last bucket awaits.
    assert results["overlapped"] > 0.5 * sum(results["sent"])
    # FSDP2 scatters the gradients of what it shards by itself; the heads of the projected GAN are whole.
    whole = [sizes["discriminator"]] * (ITERATIONS - 2) if case == "pixel_gan" else []
    assert load(two_processes, "fsdp2", case)["sent"] == whole


def test_mixed_precision_reduces_in_float32_although_the_first_pass_is_frozen(
    two_processes: Path, base: Callable[[str], Path], shards: Path
) -> None:
    results = torch.load(two_processes / "mixed.pt")
    assert results["reduced_in"] == {"torch.float32"}

    def trained(precision: Any) -> dict[str, torch.Tensor]:
        module = built(mixed_precision(base("sd-v_prediction")))
        fit(module, shards, MIXED_ITERATIONS, batch_size=4, precision=precision)
        return arrived(module)

    start, whole = arrived(built(mixed_precision(base("sd-v_prediction")))), trained("32-true")
    expected, found = trained("bf16-mixed"), results["straight"]
    for role in ("student", "fake_score"):
        names = [name for name in start if name.startswith(role)]

        def distance(
            one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], names: Any = names
        ) -> float:
            return float(torch.cat([(one[name] - other[name]).flatten() for name in names]).norm())

        way, rounding = distance(expected, start), distance(expected, whole)
        # Two roundings of one kind, which differ more where the processor has bf16 units: half the batch is summed in another
        # order. A wrong update would be off by about the way's own length.
        assert 0 < distance(found, expected) < 3 * rounding < 0.5 * way, role
