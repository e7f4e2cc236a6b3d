"""The manuals of measuring: every number equals a result file, and every command line is accepted."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from statistics import mean

import pytest

from evaluation.__main__ import COMMANDS
from evaluation.benchmarks import runtime_exports, throughput
from evaluation.benchmarks.latency.report import table
from evaluation.benchmarks.passes import passes_table
from evaluation.benchmarks.score_precision import table as precision_table
from evaluation.benchmarks.tables import __main__ as tables
from evaluation.protocols.names import METRIC_NAMES, PROTOCOL_NAMES
from evaluation.reports.markdown import score_file_markdown
from evaluation.runner.control import control_markdown
from sdxs_lightning import lora
from sdxs_lightning.command_line import Command, parse_options
from tests.helpers.result_files import PAGE, PAGES, RESULTS, ROOT, result


def test_every_table_is_what_show_prints() -> None:
    shown = re.findall(
        r"`python -m evaluation.benchmarks.tables show evaluation/results/(\w+).json` prints:\n\n", PAGE
    )
    assert len(shown) == len(set(shown)) == 21
    for name in shown:
        assert f"{name}.json` prints:\n\n{score_file_markdown(result(name))}\n" in PAGE, name
    for path in RESULTS.glob("*.json"):
        assert path.name in PAGE or path.name == "README.md", f"{path.name} is in no section"
    for path in RESULTS.glob("*.png"):
        assert path.name in PAGE, f"{path.name} is in no section"


def test_what_is_said_of_guidance_as_an_input_is_its_file() -> None:
    rows, said = result("toy_guidance_input")["rows"], " ".join(PAGE.split())
    own, base = rows["guidance 3, negative prompt"], rows["base, guidance 3, negative prompt"]
    plain = result("toy_controlnet_canny")["chance"]["caption_accuracy"]
    removed, kept = [[100 * row[key] for row in (own, base)] for key in ("removed", "caption_accuracy")]
    assert f"removes its background from {removed[0]:.0f} % of the images (base {removed[1]:.0f} %)" in said
    assert f"costs captions as there ({kept[0]:.0f} and {kept[1]:.0f} % keep theirs)" in said
    lost = 100 * (plain - rows["guidance 1.5"]["caption_accuracy"])
    assert (
        f"is {lost:.0f} points of captions against the shipped student ({100 * plain:.1f} % of these" in said
    )
    assert rows["guidance 2"]["caption_accuracy"] > plain
    scales = [rows[f"guidance {scale}"]["diversity"] for scale in ("1", "1.5", "2", "3", "4")]
    assert scales == sorted(scales, reverse=True)


@pytest.mark.parametrize("name", ["latency_cpu", "latency_cpu_backends"])
def test_the_tables_of_speed_are_their_files(name: str) -> None:
    measured = result(name)
    assert f"\n\n{table(measured)}\n\n" in PAGE
    written = " ".join(PAGE.replace("\\\n", " ").split())
    assert f"{measured['command']} --out evaluation/results/{name}.json" in written


def test_what_is_said_of_speed_is_its_files() -> None:
    first, second = [
        {row["subject"]: row["seconds"] for row in result(name)["rows"]}
        for name in ("latency_cpu", "latency_cpu_backends")
    ]
    said, eager = " ".join(PAGE.split()), second["student, torch"]
    shares = [second[f"student, {name}"] / eager for name in ("torch-compiled", "onnx fp32", "openvino fp32")]
    assert (
        f"the step takes {shares[0]:.2f} times its eager time, in ONNX Runtime {shares[1]:.2f} times, in OpenVINO "
        f"{shares[2]:.2f} times" in said
    )
    ratios = [
        rows["student, diffusers, KL decoder"] / rows["student, openvino fp32"] for rows in (first, second)
    ]
    assert (
        f"{ratios[0]:.1f} times as fast as diffusers with the KL decoder in the first run and {ratios[1]:.1f} times"
        in said
    )


def test_what_is_said_of_precision_is_its_file() -> None:
    errors = result("score_precision")["relative_error"]
    assert f"\n\n{precision_table(errors)}\n" in PAGE
    real, both, prompts = errors.values()
    added = max(both[timestep] - real[timestep] for timestep in real)
    assert 0 < added < 0.01 < max(real.values()) and both == prompts
    assert "adds at most 1 point to it, and the prompts nothing" in " ".join(PAGE.split())


def test_the_table_of_passes_is_its_file() -> None:
    """And says which settings reach 42 passes at DMD2's ratio and 23 in all, both with the GAN."""
    rows = result("passes")["passes_per_student_update"]["sd15"]
    assert f"\n\n{passes_table(rows)}\n" in PAGE
    least = rows["samples used 10 times, GAN on the real score's features"]["passes"]
    half = rows["ratio 5, samples used 5 times, LoRA fake score, GAN"]["passes"]
    every_second = rows["ratio 5, every second sample for the fake score, GAN"]["passes"]
    assert least <= 42 and half <= 23 and every_second <= 23
    text = " ".join(PAGE.split())
    assert f"with the GAN {least:.1f} is the least" in text and f"takes {half:.1f} with the GAN" in text
    assert f"every second sample takes {every_second:.1f}." in text


def test_the_row_of_the_iterations_parts_is_its_file() -> None:
    """With the GAN the saved passes show in full, and what is no pass is next to nothing."""
    gan, plain = (result("step_profile")["rows"][name] for name in ("with GAN", "without GAN"))
    assert (
        f"{gan['speed']:.2f} times its images per second with the GAN, {plain['speed']:.2f} without" in PAGE
    )
    rest = 100 * gan["shares"]["rest"]
    assert f"{rest:.1f} % all that is neither" in PAGE
    assert gan["speed"] >= 1.19 and plain["speed"] > 1 and rest < 1


def test_the_readme_says_what_each_phase_of_the_quickstart_brings() -> None:
    readme = (ROOT / "README.md").read_text()
    curves = [result(f"quickstart_seed{seed}")["history"] for seed in range(3)]
    warm = [next(at for at in curve if at["student_updates"] == 300)["caption_accuracy"] for curve in curves]
    last = [curve[-1]["caption_accuracy"] for curve in curves]
    assert (
        f"the regression of its warm-up brings {100 * mean(warm):.0f} %, the distillation the rest to "
        f"{100 * mean(last):.0f} %" in " ".join(readme.split())
    )


def test_the_readme_says_what_control_and_style_reach() -> None:
    style, readme = (
        result("toy_lora")["rows"]["distilled"],
        " ".join((ROOT / "README.md").read_text().split()),
    )
    chance = result("toy_controlnet_canny")["chance"]

    def reached(name: str, key: str) -> list[float]:
        """Of the three seeds, smallest first."""
        files = [result(f"toy_controlnet_{name}{seed}") for seed in ("", "_seed1", "_seed2")]
        return sorted(100 * one["conditioning_scale"]["1"][key] for one in files)

    edges, pretrained = reached("canny", "edge_f1"), reached("canny", "caption_accuracy")
    joint, bar = (
        reached("canny_joint", "caption_accuracy"),
        reached("background_bar", "background_accuracy"),
    )
    assert round(edges[0]) == round(edges[-1]) and round(bar[0]) == round(bar[-1])
    assert (
        f"follows Canny edges with an F1 of {edges[0] / 100:.2f}, {chance['edge_f1']:.2f} without it, and its accuracy rises "
        f"from {100 * chance['caption_accuracy']:.0f} % to {pretrained[0]:.0f} or {pretrained[-1]:.0f}, to {joint[0]:.0f} to "
        f"{joint[-1]:.0f} % where the base has no ControlNet" in readme
    )
    assert f"it follows {bar[0]:.0f} %" in readme
    assert (
        f"the style in {100 * style['style_accuracy']['mean']:.0f} % of the images and accuracy falls to "
        f"{100 * style['caption_accuracy']['mean']:.0f} %" in readme
    )


@pytest.mark.parametrize("name", ["runtime_exports", "runtime_exports_1024"])
def test_the_table_of_exports_is_its_file(name: str) -> None:
    (rows,) = result(name).values()
    assert f"\n\n{runtime_exports.table(rows)}\n\n" in PAGE


def test_the_tables_of_controlnets_are_their_files() -> None:
    for path in RESULTS.glob("toy_controlnet_*.json"):
        assert f"\n\n{control_markdown(result(path.stem))}\n\n" in PAGE, path.name


def phrases() -> list[str]:
    """The numbers of the text, made from the files."""
    entry = result("toy_teacher")["toy"]
    seeds, fid = result("quickstart_seeds"), result("toy_pruned_dmd2")["metrics"]["fid"]
    ratio, plan = seeds["caption_accuracy_ratio"], "plan_sdxl_one_gpu"
    data, metrics = result("throughput_data"), result("throughput_metrics")
    parity = max(
        result("metrics_parity")[tool]["fid"]["relative"]
        for tool in ("torch-fidelity", "clean-fid", "pytorch-fid")
    )
    kills, firsts = result("resume_kills"), [f"{each['seconds']:.1f} s" for each in data["first_batch"]]
    trials = result("coverage")["coverage_of_95_percent_intervals"].values()
    covered = [100 * each["coverage"] for metrics_at in trials for each in metrics_at.values()]
    passes = {
        name: row["passes"] for name, row in result("passes")["passes_per_student_update"]["sd15"].items()
    }
    pruned_passes = passes["pruned student"]
    real = result("quickstart_seed0")["real_vs_real"]["fid"]
    return [
        f"DMD2's settings take {passes['DMD2, stage 1']:.1f} without the GAN and {passes['DMD2, stage 2 (GAN)']:.1f} with it",
        f"as student {pruned_passes:.1f} and {passes['pruned student, GAN']:.1f}",
        f"saves {pruned_passes - passes['samples used 10 times']:.1f} passes",
        f"fake score save {pruned_passes - passes['LoRA fake score']:.1f}, ratio 5 instead of 10 saves "
        f"{pruned_passes - passes['ratio 5']:.1f}",
        f"real images have {entry['real_vs_real']['shape_score']:.3f})",
        f"real images score {real:.2f} against real images",
        f"known to ± {(fid['high'] - fid['low']) / 2:.2f} (95 %",
        f"{seeds['student_updates']} student updates per run",
        f"{100 * ratio['smallest']:.1f} to {100 * ratio['largest']:.1f} % of its caption accuracy, at "
        f"{seeds['fid_ratio']['smallest']:.2f} to {seeds['fid_ratio']['largest']:.2f} times the base's FID in 50 steps",
        f"raw JPEG tars {data['raw_jpeg']['ratio']:.1f} times as fast, SDXL latents {data['raw_sdxl_latents']['ratio']:.1f}",
        f"512 px tensors {data['jpeg_to_512']['0 workers']['ratio']:.1f} ({data['jpeg_to_512']['2 workers']['ratio']:.1f} with",
        f"after {firsts[0]} (100 shards) or {firsts[1]} (1,000)",
        f"{kills['equal']} of {kills['kills']} runs",
        "torchmetrics takes {torchmetrics:.1f} times as long, scipy {scipy:.1f} times".format(
            **metrics["frechet"]["times_ours_in_seconds"]
        ),
        f"their sums in {metrics['sync']['seconds']:.1f} s",
        f"over all trials: {min(covered):.1f} to {max(covered):.1f} %",
        f"up to {parity:.1e} at {result('metrics_parity')['images_per_side']} images",
        f"{result(plan)['needed'] / 2**30:.0f} GiB, and {result(f'{plan}_lora_fake_score')['needed'] / 2**30:.0f} GiB",
    ]


@pytest.mark.parametrize("phrase", phrases())
def test_every_number_of_the_text_is_in_a_result_file(phrase: str) -> None:
    assert phrase in " ".join(PAGE.split())


def command_lines() -> list[str]:
    """Commands of both pages: of code blocks, and complete ones in the text."""
    lines = []
    for page in PAGES.values():
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines()
        lines += [
            code
            for code in re.findall(r"`([^`\n]+)`", page)
            if code.startswith("python -m ") and code.count(" ") > 2
        ]
    return sorted(
        {line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")}
    )


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_accepted(line: str) -> None:
    python, *words = shlex.split(line)
    assert python == "python"
    if words[0] == "train.py":  # its configurations are tested with them
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))
        return
    programs = {f"evaluation.{command.name}": (command, words[2:]) for command in COMMANDS}
    for name in ("Passes", "ScorePrecision", "ScoreRepair", "RuntimeExports", "StepProfile"):
        module = f"evaluation.benchmarks.{re.sub('(?<!^)(?=[A-Z])', '_', name).lower()}"
        programs[module] = (Command(name, f"{module}.{name}Options", ""), words[2:])
    gpu = Command("gpu", "evaluation.benchmarks.gpu.options.GpuOptions", "")
    programs["evaluation.benchmarks.gpu"] = (gpu, words[2:])
    for program in (tables, throughput, lora):
        for command in program.COMMANDS:
            if words[2:3] == [command.name]:
                programs[program.__name__.removesuffix(".__main__")] = (command, words[3:])
    command, arguments = programs[words[1]]
    module, _, options = command.options.rpartition(".")
    assert parse_options(getattr(import_module(module), options), arguments) is not None


def test_the_manual_names_every_protocol_and_metric() -> None:
    missing = [name for name in (*PROTOCOL_NAMES, *METRIC_NAMES) if f"`{name}`" not in PAGES["README.md"]]
    assert not missing
