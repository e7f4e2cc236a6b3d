"""The GPU command at tiny size on the CPU: every section runs, a fault ends one section, files are extended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.benchmarks.gpu import gpu_tests, runner
from evaluation.benchmarks.gpu.device_counter import DeviceCounter
from evaluation.benchmarks.gpu.distillation import RATIO
from evaluation.benchmarks.gpu.expected import COUNTED, H100_TFLOPS, USE, _file, shares
from evaluation.benchmarks.gpu.inference import student_of
from evaluation.benchmarks.gpu.options import SECTIONS, GpuOptions, Section
from evaluation.benchmarks.gpu.random_base import Kind, RandomBase
from evaluation.benchmarks.gpu.section import SectionRun
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.evaluation.test_gpu_benchmark."


def options(out: Path, **settings: Any) -> GpuOptions:
    given: dict[str, Any] = {"device": "cpu", "tiny": True, "minutes": 8.0} | settings
    return GpuOptions(out=out, **given)


def sections_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())["sections"]
    return found


def test_every_section_runs_at_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    table = runner.run(options(out))
    sections = sections_of(out)
    assert list(sections) == list(SECTIONS)
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(
        SECTIONS, "complete"
    )
    assert [row for section in sections.values() for row in section["rows"] if "error" in row] == []
    assert all(f"## {name}: complete" in table for name in SECTIONS) and "Not complete" not in table
    rows = sections["distill"]["rows"]
    assert [row["labels"]["arrangement"] for row in rows] == ["ours", "DMD2's"]
    assert all(row["images_per_second"] > 0 for row in rows) and rows[1]["ours_is_faster_by"] > 0
    # The DMD2 iteration: 10 fake score updates per student update, each pass counted once.
    assert all(row["tflop_per_student_update"] > 0 for row in rows if row["labels"]["arrangement"] == "ours")
    modes = {row["labels"]["mode"] for row in sections["inference"]["rows"]}
    assert modes == {"eager", "ONNX Runtime, CPUExecutionProvider"}
    differences = [
        row["mean_difference"] for row in sections["inference"]["rows"] if "mean_difference" in row
    ]
    assert len(differences) == 2 and max(differences) < 1e-3
    assert any("with ControlNet" in row["labels"]["what"] for row in sections["inference"]["rows"])
    assert all(
        row["bits_equal_cpu"] for row in sections["evaluation"]["rows"] if "resize" in row["labels"]["what"]
    )
    assert {row["labels"]["stage"] for row in sections["stages"]["rows"]} == {"miniaturise", "decoder"}
    assert sections["tests"]["rows"][0]["labels"]["test"].startswith("tests/core/test_seeding.py::")
    kept = sections["toy"]["rows"][0]["files"]
    assert kept == "toy_quickstart_student.tar.gz" and (tmp_path / "gpu" / kept).stat().st_size > 1_000_000


# ------------------------------------------------------- sections that end badly; run in their processes, found by name


def ends_well(run: SectionRun) -> None:
    run.attempt(lambda: {"value": 1.0}, what="first")
    run.attempt(lambda: {"value": 2.0}, what="second")


def raises(run: SectionRun) -> None:
    run.attempt(lambda: {"value": 1.0}, what="first")
    raise KeyError("a fault of the section's own")


def is_killed(run: SectionRun) -> None:
    run.attempt(lambda: {"value": 1.0}, what="first")
    run.attempt(lambda: os.kill(os.getpid(), signal.SIGKILL), what="second")  # type: ignore[arg-type, return-value]


def runs_out_of_memory(run: SectionRun) -> None:
    def allocate() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    run.attempt(allocate, what="first")
    run.attempt(lambda: {"value": 2.0}, what="second")


def hangs(run: SectionRun) -> None:
    run.attempt(lambda: {"value": 1.0}, what="first")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    run.add({"what": "child"}, pid=child.pid)
    run.attempt(lambda: time.sleep(600), what="second")  # type: ignore[arg-type, return-value]


def tells_its_fork(run: SectionRun) -> None:
    run.add({"what": "bad fork"}, value=torch.cuda._is_in_bad_fork())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def use(monkeypatch: pytest.MonkeyPatch, seconds: float = 30, **functions: str) -> None:
    found = {name: Section(HERE + function, seconds, 1) for name, function in functions.items()}
    monkeypatch.setattr(runner, "SECTIONS", found)


def test_whatever_ends_a_section_ends_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(
        monkeypatch, missing="no_such", faulty="raises", killed="is_killed", large="runs_out_of_memory", well="ends_well"
    )  # fmt: skip
    table = runner.run(options(tmp_path / "gpu.json"))
    sections = sections_of(tmp_path / "gpu.json")
    assert {name: one["status"] for name, one in sections.items()} == {
        "missing": "failed with exit code 1",
        "faulty": "failed with exit code 1",
        "killed": "killed by SIGKILL",
        "large": "complete",
        "well": "complete",
    }
    assert "has no attribute 'no_such'" in sections["missing"]["error"]
    assert "a fault of the section's own" in sections["faulty"]["error"]
    for name in ("faulty", "killed"):
        assert sections[name]["rows"] == [{"labels": {"what": "first"}, "value": 1.0}]
    assert sections["killed"]["ended_in"] == {"what": "second"}
    assert [row.get("value") for row in sections["large"]["rows"]] == [None, 2.0]
    assert "OutOfMemoryError: CUDA out of memory" in sections["large"]["rows"][0]["error"]
    assert "## killed: killed by SIGKILL, in what=second" in table
    assert "Not complete: missing, faulty, killed; go on with --resume." in table


def test_a_section_out_of_time_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytest and train.py, which sections start, would go on using the GPU."""
    use(monkeypatch, seconds=2.0, slow="hangs", well="ends_well")
    runner.run(options(tmp_path / "gpu.json"))
    sections = sections_of(tmp_path / "gpu.json")
    assert sections["slow"]["status"] == "out of time" and sections["slow"]["ended_in"] == {"what": "second"}
    assert not is_alive(next(row["pid"] for row in sections["slow"]["rows"] if "pid" in row))
    assert sections["well"]["status"] == "complete"


def test_an_interrupted_command_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's end sends SIGTERM, which would leave the section alone with the GPU, and its rows in a temporary folder."""
    use(monkeypatch, slow="hangs", well="ends_well")
    join, run = ForkServerProcess.join, runner._exit_code
    tasks: list[Any] = []
    monkeypatch.setattr(runner, "_exit_code", lambda task: tasks.append(task) or run(task))  # type: ignore[func-returns-value]

    def terminated(process: Any, timeout: float | None = None) -> None:
        rows = Path(tasks[0].rows)
        while timeout is not None and not (rows.exists() and "pid" in rows.read_text()):
            time.sleep(0.05)
        if timeout is not None:
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # type: ignore[operator, misc]
        join(process, timeout)

    monkeypatch.setattr(ForkServerProcess, "join", terminated)
    with pytest.raises(SystemExit) as stop:
        runner.run(options(tmp_path / "gpu.json"))
    assert stop.value.code == 143
    sections = sections_of(tmp_path / "gpu.json")
    assert list(sections) == ["slow"] and sections["slow"]["status"] == "interrupted"
    assert sections["slow"]["rows"][0] == {"labels": {"what": "first"}, "value": 1.0}
    assert not is_alive(sections["slow"]["rows"][1]["pid"])


def test_a_section_on_a_gpu_is_no_fork_of_a_process_that_asked_for_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers asks while it is imported, so that CUDA refuses to start in a fork of the fork server."""
    use(monkeypatch, fork="tells_its_fork")
    found, _ = runner._run_section("fork", options(tmp_path / "gpu.json", device="cuda"), 300, 300, [])
    assert found["status"] == "complete", found
    assert found["rows"] == [{"labels": {"what": "bad fork"}, "value": False}]


def test_an_earlier_file_is_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without time sections are named; --resume measures only what is missing; --only measures again."""
    out = tmp_path / "gpu.json"
    use(monkeypatch, one="is_killed", two="ends_well")
    monkeypatch.setattr(runner, "SHORTEST_SECONDS", 1e9)
    assert "## one: did not fit" in runner.run(options(out))
    monkeypatch.setattr(runner, "SHORTEST_SECONDS", 5.0)
    runner.run(options(out, only=("one",)))
    assert {name: one["status"] for name, one in sections_of(out).items()} == {
        "one": "killed by SIGKILL",
        "two": "did not fit",
    }
    marked = json.loads(out.read_text())
    marked["sections"]["one"]["rows"][0]["value"] = 7.0
    out.write_text(json.dumps(marked))
    use(monkeypatch, one="ends_well", two="ends_well")
    runner.run(options(out, resume=True))
    sections = sections_of(out)
    assert [one["status"] for one in sections.values()] == ["complete", "complete"]
    assert [row["value"] for row in sections["one"]["rows"]] == [7.0, 2.0]
    seconds = sections["two"]["seconds"]
    runner.run(options(out, only=("one",)))
    sections = sections_of(out)
    assert [row["value"] for row in sections["one"]["rows"]] == [1.0, 2.0]
    assert sections["two"]["seconds"] == seconds


def test_files_that_are_not_this_machines_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"machine": {"device": "NVIDIA H100"}, "tiny": False, "sections": {}}))
    with pytest.raises(UserError, match=r"is of .*H100.*give another --out"):
        runner.run(options(out))
    machine = runner._machine("cpu")
    for content in (
        "[]",
        json.dumps({"machine": machine, "tiny": True}),
        json.dumps({"machine": machine, "tiny": True, "sections": {"toy": {"status": "complete"}}}),
        json.dumps({"machine": machine, "tiny": True, "sections": {"toy": {"status": "", "rows": [{}]}}}),
    ):
        out.write_text(content)
        with pytest.raises(UserError, match="is not a result of this command"):
            runner.run(options(out))


def test_a_file_that_cannot_be_written_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, one="ends_well")
    monkeypatch.setattr(runner, "_run_section", lambda *_: pytest.fail("a section ran"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointNotWritten, match=r"--out '.*gpu.json' could not be written: "):
        runner.run(options(tmp_path / "file" / "gpu.json"))


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(UserError, match="there is no GPU that torch can use; .* --device cpu --tiny"):
        runner.run(options(tmp_path / "gpu.json", device="cuda"))


def test_only_files_with_the_mark_are_collected() -> None:
    files = gpu_tests.files_with_gpu_tests()
    assert "tests/training/test_on_gpu.py" in files and "tests/core/test_seeding.py" in files
    assert "tests/core/test_batch.py" not in files and len(files) < 12


# ----------------------------------------------------------------------------------------------- what is expected


def test_the_dry_run_says_what_is_expected(tmp_path: Path) -> None:
    text = runner.run(options(tmp_path / "gpu.json", dry_run=True))
    total = sum(one.seconds for one in SECTIONS.values())
    assert f"| distill | {SECTIONS['distill'].seconds} | {SECTIONS['distill'].gigabytes} |" in text
    assert text in (ROOT / "evaluation" / "README.md").read_text()
    assert f"{total:.0f} s in all" in text and not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize(("kind", "side"), [("sd15", 512), ("sdxl", 1024)])
def test_full_size_students_run_without_weights(kind: Kind, side: int, tmp_path: Path) -> None:
    """With ControlNet, on the meta device; the stages at full size are counted in `gpu_expected.json`."""
    meta = torch.device("meta")
    run = SectionRun(tmp_path / "rows", 60, 60, meta, tiny=False, files=tmp_path)
    base = RandomBase.of(kind, tmp_path, meta)
    base.to(dtype=torch.float32)
    with DeviceCounter() as counter, torch.no_grad():
        student = student_of(run, kind, base, 1, controlled=True)
        asked = len(counter.waits)
        images = student()
    assert (
        images.shape == (1, 3, side, side) and len(counter.waits) == asked
    )  # none while it runs: it can be captured


def test_expected_memory_is_the_plans() -> None:
    """Of the largest arrangement of each section; only SDXL in full is more than an H100 of 80 GB has."""
    by_base: dict[str, list[float]] = {"sd15": [], "sdxl": []}
    for row in _file()["training"]:
        by_base[row["base"]] += row["planned_gib"].values()
    assert SECTIONS["distill"].gigabytes == pytest.approx(max(by_base["sd15"]), rel=0.05)
    assert SECTIONS["distill_sdxl"].gigabytes == pytest.approx(max(by_base["sdxl"]), rel=0.05)
    assert [name for name, one in SECTIONS.items() if one.gigabytes > 75] == ["distill_sdxl"]
    assert min(by_base["sdxl"]) < 75  # with adapters as the fake score


def test_the_hosts_share_follows_from_the_counts() -> None:
    """And no host synchronisation is among them."""
    found = _file()
    row, host = found["training"][0], found["host"]
    assert found["host_share"] == shares(row, host)
    assert host["student"]["host_synchronisations"] == host["other"]["host_synchronisations"] == 0
    per_sample = row["student_tflop_per_sample"] + (RATIO["sd15"] - 1) * row["other_tflop_per_sample"]
    largest = COUNTED["sd15"][-1]
    device = largest * per_sample / (H100_TFLOPS * USE)
    share = found["host_share"][str(largest)]
    assert share["device_seconds"] == pytest.approx(device)
    page = " ".join((ROOT / "evaluation" / "results" / "README.md").read_text().split())
    assert (
        f"launches {host['other']['launches']:,} kernels, one with a student update {host['student']['launches']:,}"
        in page
    )
    assert (
        f"is {share['host']:.1f} times what an H100" in page
        and f"{share['python']:.1f} times in Python" in page
    )
