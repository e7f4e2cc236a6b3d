"""The manuals of measuring: every number equals a result file, and every command line is accepted."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

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

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "evaluation" / "results"
PAGES = {name: (ROOT / "evaluation" / name).read_text() for name in ("README.md", "results/README.md")}
PAGE = PAGES["results/README.md"]


def result(name: str) -> dict[str, Any]:
    """The content of a result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def test_every_table_is_what_show_prints() -> None:
    shown = re.findall(
        r"`python -m evaluation.benchmarks.tables show evaluation/results/(\w+).json` prints:\n\n", PAGE
    )
    assert len(shown) == len(set(shown)) == 19
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


def test_the_judge_orders_what_the_eye_does() -> None:
    """Intervals of the base by its steps, and of students from early to late; True where they do not overlap."""
    rows = result("toy_quality")["rows"]
    base = [f"base, {count} step{'s' * (count > 1)}" for count in (50, 8, 4, 2, 1)]
    students = ["longer", "shipped", "middle", "early"]

    def apart(ranked: list[str], score: str) -> list[bool]:
        scores = [rows[name]["estimates"][score] for name in ranked]
        assert sorted(scores, key=lambda one: -one["value"]) == scores
        return [better["low"] > worse["high"] for better, worse in pairwise(scores)]

    assert apart(base, "caption_accuracy") == [False, False, True, True]
    assert apart(["real images", *base[1:]], "shape_score") == [True, False, True, True]
    for score in ("shape_score", "caption_accuracy"):
        assert apart(students, score) == [True, False, True]
    # KID and recall see two rows alone.
    for score in ("kid", "recall"):
        usual = rows[base[0]]["estimates"][score]
        seen = [
            name
            for name, row in rows.items()
            if row["estimates"][score]["low"] > usual["high"]
            or row["estimates"][score]["high"] < usual["low"]
        ]
        assert seen == ["base, 1 step", "early"]
    first, second = (rows[name]["estimates"]["shape_score"] for name in base[:2])
    assert second["value"] > first["value"] > second["low"]  # 50 and 8 steps


def test_what_is_said_of_precision_is_its_file() -> None:
    errors = result("score_precision")["relative_error"]
    assert f"\n\n{precision_table(errors)}\n" in PAGE
    real, both, prompts = errors.values()
    added = max(both[timestep] - real[timestep] for timestep in real)
    assert 0 < added < 0.01 < max(real.values()) and both == prompts
    assert "adds at most 1 point to it, and the prompts nothing" in " ".join(PAGE.split())


def test_what_is_said_of_the_methods_alone_is_their_file() -> None:
    rows, text = result("toy_cold")["rows"], " ".join(PAGE.split())

    def accuracy(row: str) -> float:
        return 100 * float(rows[f"cold_{row}"]["caption_accuracy"]["mean"])

    def ahead(row: str, other: str, score: str) -> list[float]:
        """Differences over the seeds of both rows."""
        found = [
            dict(zip(one["seeds"], one[score]["values"], strict=True))
            for one in (rows[f"cold_{row}"], rows[f"cold_{other}"])
        ]
        return [found[0][seed] - found[1][seed] for seed in found[0] if seed in found[1]]

    assert (
        f"at its rate reaches {accuracy('dmd2'):.1f} % of captions, four times the rate of the student "
        f"{accuracy('large_rate'):.1f} %, ratio 1 as well {accuracy('ratio_1'):.1f} %; in twice the passes ratio 1 reaches "
        f"{accuracy('ratio_1_2x'):.1f} %" in text
    )
    assert accuracy("ratio_1_halfx") > accuracy("dmd2_2x")
    share = rows["cold_ratio_1_halfx"]["cpu_seconds"]["mean"] / rows["cold_dmd2_2x"]["cpu_seconds"]["mean"]
    assert (
        f"it has more ({accuracy('ratio_1_halfx'):.1f} %) than DMD2's settings after twice as many "
        f"({accuracy('dmd2_2x'):.1f} %), at {share:.2f} times the processor time" in text
    )
    longer = accuracy("ratio_1_2x") - accuracy("regression_2x")
    assert f"In twice the work it is {longer:.1f} points (one seed)" in text
    gained = [100 * one for one in ahead("ratio_1", "regression", "caption_accuracy")]
    error = stdev(gained) / len(gained) ** 0.5
    counts = {2: "two", 3: "three"}
    assert (
        f"in equal work: {mean(gained):.1f} points of captions (standard error {error:.1f}, {counts[len(gained)]} pairs"
        in text
    )
    shape, distance = (mean(ahead("ratio_1", "regression", score)) for score in ("shape_score", "fid"))
    assert f"and {shape:.3f} of shape score for it, {distance:.2f} of FID against it" in text
    aligned = [100 * one for one in ahead("aligned", "ratio_1", "caption_accuracy")]
    assert f"at ratio 1: {mean(aligned):+.1f} points over {counts[len(aligned)]} pairs" in text
    plain = rows["cold_ratio_1"]["caption_accuracy"]["values"][rows["cold_ratio_1"]["seeds"].index(0)]
    assert (
        f"Learning without momentum, at ratio 1, is worth {accuracy('no_momentum') - 100 * plain:+.1f}."
        in text
    )
    costs = [
        rows[row]["cpu_seconds"]["mean"] / rows["cold_dmd2"]["cpu_seconds"]["mean"]
        for row in ("cold_segmented", "cold_regression")
    ]
    assert (
        f"segmented mode reaches {accuracy('segmented'):.1f} % at {costs[0]:.2f} times the first row's processor time, where "
        f"regression alone has {accuracy('regression'):.1f} % at {costs[1]:.2f}." in text
    )
    for row, words in {
        "samples_used_5_times": "samples used five times ({})",
        "lora_fake": "adapters as the fake score ({})",
        "half_fake_score_batch": "every second sample for it ({})",
        "gan": "The GAN ({})",
        "decoupled_guidance": "guidance apart from matching ({})",
        "long_and_short_guidance": "guidance of both scores ({})",
        "score_identity": "score identity ({})",
    }.items():
        first = 100 * ahead(row, "dmd2", "caption_accuracy")[0]  # of seed 0
        assert words.format(f"{first:+.1f}") in text.replace(" points)", ")"), row
    spread = max(
        100 * (row["caption_accuracy"]["largest"] - row["caption_accuracy"]["smallest"])
        for row in rows.values()
    )
    assert f"the seeds of a row lie up to {spread:.1f} points apart" in text
    cost = rows["cold_lora_fake"]["cpu_seconds"]["mean"] / rows["cold_dmd2"]["cpu_seconds"]["mean"]
    assert f"Adapters cost {cost:.2f} times the processor time" in text
    before = 100 * result("quickstart_seed0")["student_before"]["caption_accuracy"]
    assert f"The student begins at {before:.1f} % of captions" in text
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"from {before:.0f} to {accuracy('ratio_1_2x'):.0f} % by itself, in work in which regression reaches "
        f"{accuracy('regression_2x'):.0f} % (one seed)" in readme
    )


def test_what_is_said_of_the_quickstarts_distillation_is_its_files() -> None:
    """Over pairs of equal seeds, against regression in the same time; and what more distillation reaches."""
    control = result("toy_quickstart_regression")["rows"]["quickstart_regression"]
    students = [result(f"quickstart_seed{seed}")["student"] for seed in control["seeds"]]
    text, readme = " ".join(PAGE.split()), " ".join((ROOT / "README.md").read_text().split())

    def paired(name: str) -> tuple[float, float]:
        gained = [student[name] - one for student, one in zip(students, control[name]["values"], strict=True)]
        return mean(gained), stdev(gained) / len(gained) ** 0.5

    points, error = (100 * one for one in paired("caption_accuracy"))
    assert f"brings {points:.1f} points more of caption accuracy (standard error {error:.1f})" in text
    distance, error = paired("fid")
    assert f"costs {distance:.2f} of FID ({error:.2f})" in text
    shape, error = paired("shape_score")
    assert "the same shape score" in text and abs(shape) < 2 * error
    longer = {name: one["value"] for name, one in result("toy_longer")["metrics"].items()}
    accuracy = 100 * longer["caption_accuracy"]
    share = longer["caption_accuracy"] / result("toy_teacher")["toy"]["teacher"]["50"]["caption_accuracy"]
    assert (
        f"ends at {accuracy:.1f} % of caption accuracy, {share:.2f} of the base's, and a shape score of "
        f"{longer['shape_score']:.3f} with {100 * longer['clean_images']:.1f} % clean images" in text
    )
    assert f"FID rises to {longer['fid']:.2f}" in text
    still = {name: one["value"] for name, one in result("toy_longer_still")["metrics"].items()}
    assert (
        f"one seed), end at {100 * still['caption_accuracy']:.1f} %, a shape score of {still['shape_score']:.3f} and a FID of "
        f"{still['fid']:.2f}." in text
    )
    regression = 100 * control["caption_accuracy"]["mean"]
    assert (
        f"reaches {regression:.1f} % (three seeds); 700 more updates of distillation {accuracy:.1f} %"
        in readme
    )


def test_what_is_said_of_the_quickstarts_variants_is_their_file() -> None:
    rows, text = result("toy_quickstart_variants")["rows"], " ".join(PAGE.split())
    shipped = [result(f"quickstart_seed{seed}")["student"] for seed in range(3)]

    def ahead(row: str, name: str) -> list[float]:
        """Of the quickstart, by seed."""
        values = dict(zip(rows[row]["seeds"], rows[row][name]["values"], strict=True))
        return [value - shipped[seed][name] for seed, value in values.items()]

    points = [100 * one for one in ahead("quickstart_no_momentum", "caption_accuracy")]
    assert len(points) == 3
    assert (
        f"{mean(points):+.1f} points of captions over three pairs of seeds (standard error {stdev(points) / 3**0.5:.1f}), at "
        f"{mean(ahead('quickstart_no_momentum', 'fid')):.2f} more of FID" in text
    )
    faster, aligned, unaligned = (
        100 * ahead(f"quickstart_{row}", "caption_accuracy")[0]
        for row in ("no_momentum_twice_the_rate", "ratio_1", "unaligned")
    )
    assert f"seed 0 lies {faster:.1f} and {aligned:.1f} points above the quickstart's" in text
    for said in (
        f"captions fall by {aligned - unaligned:.1f} points",
        f"it is worth {aligned - unaligned:.1f} points",
    ):
        assert said in text
    assert f"where the quickstart has {100 * shipped[0]['caption_accuracy']:.1f} % of captions" in text


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


def test_the_readme_says_what_the_students_reach() -> None:
    quickstart, rows = result("quickstart_seeds"), result("toy_recipes")["rows"]
    base = result("toy_teacher")["toy"]["teacher"]["50"]["caption_accuracy"]
    named = {
        f"student, quickstart ({quickstart['student_updates']} updates)": quickstart["student"],
        "student, warm-up then DMD2": rows["dmd2"],
        "student with 28 % of the base's parameters, the same": rows["pruned_dmd2"],
    }
    readme = (ROOT / "README.md").read_text()
    for name, scores in named.items():
        fid, clip, accuracy = (scores[key]["mean"] for key in ("fid", "clip_score", "caption_accuracy"))
        assert f"| {name} | 1 | {fid:.2f} | {clip:.1f} | {100 * accuracy:.1f} % |" in readme
    shares = [100 * scores["caption_accuracy"]["mean"] / base for scores in named.values()]
    assert f"have {min(shares):.0f} to {max(shares):.0f} % of the accuracy of their base" in readme
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
    rows, entry = result("toy_recipes")["rows"], result("toy_teacher")["toy"]
    one, many = entry["teacher"]["1"], entry["teacher"]["50"]
    seeds, fid = result("quickstart_seeds"), result("toy_pruned_dmd2")["metrics"]["fid"]
    accuracy = {row: scores["caption_accuracy"]["mean"] for row, scores in rows.items()}
    cost = {row: scores["cpu_seconds"]["mean"] for row, scores in rows.items()}
    distilled = [accuracy[row] for row in rows if row.startswith(("dmd2", "segmented")) and "+" not in row]
    pruned = [accuracy[row] / many["caption_accuracy"] for row in rows if re.match("pruned_(dmd2|seg)", row)]
    assert max(rows[row]["fid"]["mean"] for row in rows if re.match("pruned_(dmd2|seg)", row)) <= many["fid"]
    ratio, paired = seeds["caption_accuracy_ratio"], result("toy_segmented_versus_dmd2")
    finish, plan = result("toy_finish_versus_none"), "plan_sdxl_one_gpu"
    data, metrics = result("throughput_data"), result("throughput_metrics")
    parity = max(
        result("metrics_parity")[tool]["fid"]["relative"]
        for tool in ("torch-fidelity", "clean-fid", "pytorch-fid")
    )
    kills, firsts = result("resume_kills"), [f"{each['seconds']:.1f} s" for each in data["first_batch"]]
    trials = result("coverage")["coverage_of_95_percent_intervals"].values()
    covered = [100 * each["coverage"] for metrics_at in trials for each in metrics_at.values()]
    assert f"{cost['segmented'] / cost['dmd2']:.1f}" == "0.8"  # four fifths
    assert finish["fid"]["mean"] < 0 < paired["fid"]["mean"]
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
        f"{100 * rows['pruned_dmd2']['parameters'] / rows['dmd2']['parameters']:.0f} % of the parameters",
        f"(FID {one['fid']:.2f}, caption accuracy {100 * one['caption_accuracy']:.1f} %)",
        f"the base in 50 steps ({many['fid']:.2f})",
        f"{100 * min(pruned):.0f} to {100 * max(pruned):.0f} % of its caption accuracy.",
        f"adds {100 * (accuracy['warmup'] - accuracy['regression']):.0f} points",
        f"at {cost['warmup'] / cost['regression']:.1f} times the cost",
        f"adds {100 * (min(distilled) - accuracy['warmup']):.1f} to {100 * (max(distilled) - accuracy['warmup']):.1f} more",
        f"is {100 * paired['caption_accuracy']['mean']:.1f} points of accuracy ahead of DMD2 "
        f"(standard error {100 * paired['caption_accuracy']['standard_error']:.1f})",
        f"{paired['fid']['mean']:.2f} of FID behind ({paired['fid']['standard_error']:.2f})",
        f"accuracy by {100 * finish['caption_accuracy']['mean']:.1f} points "
        f"(standard error {100 * finish['caption_accuracy']['standard_error']:.1f})",
        f"lowers FID by {-finish['fid']['mean']:.3f} ({finish['fid']['standard_error']:.3f}), "
        f"over {finish['fid']['differences']} pairs",
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
    for name in ("Passes", "ScorePrecision", "RuntimeExports", "StepProfile"):
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
