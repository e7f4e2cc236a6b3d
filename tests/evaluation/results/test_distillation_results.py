"""What the manuals say of distillation on the toy world is in the result files."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from evaluation.benchmarks import score_repair
from evaluation.benchmarks.score_repair import FAKE, REAL
from evaluation.benchmarks.tables.score_files import mean_differences
from tests.helpers.result_files import PAGE, ROOT, result


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
        f"at its rate reaches {accuracy('dmd2'):.1f} % of captions, at four times the student's rate "
        f"{accuracy('large_rate'):.1f} %, at that rate and ratio 1 {accuracy('ratio_1'):.1f} %; in twice the passes ratio 1 "
        f"reaches {accuracy('ratio_1_2x'):.1f} %" in text
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
        f"without momentum, at ratio 1, adds nothing either: {accuracy('no_momentum') - 100 * plain:+.1f} (one"
        in text
    )
    costs = [
        rows[row]["cpu_seconds"]["mean"] / rows["cold_dmd2"]["cpu_seconds"]["mean"]
        for row in ("cold_segmented", "cold_regression")
    ]
    assert (
        f"segmented mode, also at ratio 1, reaches {accuracy('segmented'):.1f} % at {costs[0]:.2f} times the first row's "
        f"processor time, where regression alone has {accuracy('regression'):.1f} % at {costs[1]:.2f}."
        in text
    )
    first_seed: dict[str, float] = {}
    for row, words in {
        "samples_used_5_times": "samples used five times ({})",
        "lora_fake": "adapters as the fake score ({})",
        "half_fake_score_batch": "every second sample for it ({})",
        "gan": "the GAN ({})",
        "decoupled_guidance": "guidance apart from matching ({})",
        "long_and_short_guidance": "guidance of both scores (`cold_long_and_short_guidance`, {})",
        "score_identity": "score identity ({})",
    }.items():
        first_seed[row] = 100 * ahead(row, "dmd2", "caption_accuracy")[0]
        stated = text.replace(" points against `cold_dmd2`)", ")")
        assert words.format(f"{first_seed[row]:+.1f}") in stated, row
    spread = max(
        100 * (row["caption_accuracy"]["largest"] - row["caption_accuracy"]["smallest"])
        for row in rows.values()
    )
    chance = ", ".join(f"{one:+.1f}" for one in first_seed.values() if abs(one) < spread)
    assert (
        f"the seeds of a row lie up to {spread:.1f} points apart: what is nearer to 0 than that ({chance}) may be chance"
        in text
    )
    assert accuracy("dmd2") < accuracy("regression") and accuracy("dmd2_2x") < accuracy("regression_2x")
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
    shape, error = paired("shape_score")
    assert f"and {shape:.3f} of shape score ({error:.3f})" in text
    distance, error = paired("fid")
    assert f"costs {distance:.2f} of FID ({error:.2f})" in text
    longer, still, low = (
        {name: one["value"] for name, one in result(f"toy_longer{part}")["metrics"].items()}
        for part in ("", "_still", "_low")
    )
    base = result("toy_teacher")["toy"]["teacher"]["50"]["caption_accuracy"]
    accuracy, clean = 100 * longer["caption_accuracy"], 100 * longer["clean_images"]
    assert (
        f"ends at {accuracy:.1f} % of caption accuracy, {longer['caption_accuracy'] / base:.2f} of the base's, and a shape "
        f"score of {longer['shape_score']:.3f} with {clean:.1f} % clean images" in text
    )
    assert f"FID rises to {longer['fid']:.2f}" in text
    assert (
        f"one seed), end at {100 * still['caption_accuracy']:.1f} %, a shape score of {still['shape_score']:.3f} and a FID of "
        f"{still['fid']:.2f}." in text
    )
    low_accuracy = 100 * low["caption_accuracy"]
    assert (
        f"end at {low_accuracy:.1f} %, {low['caption_accuracy'] / base:.2f} of the base's, a shape score of "
        f"{low['shape_score']:.3f}, {100 * low['clean_images']:.1f} % clean images and a FID of {low['fid']:.2f}."
        in text
    )
    regression = 100 * control["caption_accuracy"]["mean"]
    assert f"reaches {regression:.1f} % (three seeds)" in readme
    assert f"distillation at all timesteps stays at {accuracy:.1f} %" in readme


def test_what_is_said_of_the_longer_runs_is_their_file() -> None:
    rows, text = result("toy_quickstart_longer")["rows"], " ".join(PAGE.split())
    base = result("toy_teacher")["toy"]["teacher"]["50"]["caption_accuracy"]

    def of_base(row: str) -> str:
        accuracy = rows[row]["caption_accuracy"]
        assert len(accuracy["values"]) == 3 and accuracy["smallest"] / base >= 0.95
        return f"{100 * accuracy['smallest'] / base:.1f} to {100 * accuracy['largest'] / base:.1f} %"

    assert (
        f"The full student has {of_base('longer')} of the base's captions at 50 steps, the pruned student "
        f"{of_base('pruned_longer')}." in text
    )
    before = result("toy_recipes")["rows"]["pruned_dmd2"]
    assert (
        f"after a longer warm-up, has {100 * before['caption_accuracy']['mean']:.1f} % of captions, and a FID of "
        f"{before['fid']['mean']:.2f} where `pruned_longer` has {rows['pruned_longer']['fid']['mean']:.2f}."
        in text
    )
    share = 100 * rows["pruned_longer"]["parameters"] / rows["longer"]["parameters"]
    assert f"with {share:.0f} % of the parameters (`configs/toy/pruned.yaml`)" in text
    shape = result("toy_teacher")["toy"]["teacher"]["50"]["shape_score"]
    assert (
        f"By shape the full student ({rows['longer']['shape_score']['mean']:.3f}) is still told from the base "
        f"({shape:.3f} at 50 steps)" in text
    )


def test_what_is_said_of_regression_beside_is_its_file() -> None:
    rows, text = result("toy_quickstart_beside")["rows"], " ".join(PAGE.split())
    alone, mixed = rows["quickstart_regression_beside"], rows["quickstart_regression_beside_a_quarter"]
    variants = result("toy_quickstart_variants")["rows"]
    plain, everywhere = variants["quickstart"], variants["quickstart_all_timesteps"]

    def said(row: dict[str, Any]) -> str:
        return f"{100 * row['caption_accuracy']['mean']:.1f} % at a FID of {row['fid']['mean']:.2f}"

    assert f"Pairs alone reach {said(alone)}, every fourth sample from a pair {said(mixed)}." in text
    assert (
        f"Without either the quickstart has {said(plain)}, at all timesteps {said(everywhere)} (seed 0)."
        in text
    )
    costs = mean_differences({"plain": plain, "mixed": mixed}, "plain", "mixed")
    fid, captions, shape = (costs[score] for score in ("fid", "caption_accuracy", "shape_score"))
    assert (
        f"saves {fid['mean']:.2f} of FID and costs {100 * captions['mean']:.1f} points of captions and {shape['mean']:.3f} of "
        f"shape score (standard errors {fid['standard_error']:.2f}, {100 * captions['standard_error']:.1f} and "
        f"{shape['standard_error']:.3f}, three pairs of seeds)" in text
    )
    # The row at all timesteps is seed 0.
    ahead = {
        score: mixed[score]["values"][0] - everywhere[score]["values"][0]
        for score in ("caption_accuracy", "fid")
    }
    assert (
        f"At seed 0 it is ahead of all timesteps by {100 * ahead['caption_accuracy']:.1f} points of captions and "
        f"{-ahead['fid']:.2f} of FID, no more than its own seeds lie apart" in text
    )
    assert all(abs(one) <= mixed[score]["largest"] - mixed[score]["smallest"] for score, one in ahead.items())


def test_what_is_said_of_the_fake_score_is_its_file() -> None:
    found, text = result("score_repair"), " ".join(PAGE.split())
    assert f"\n\n{score_repair.table(found).strip()}\n\n" in PAGE
    noisiest, lower = (found["captions_right"][timestep] for timestep in ("850", "300"))
    shares = {name: [100 * at[name]["wrong"] for at in (noisiest, lower)] for name in (REAL, FAKE)}
    before = found["captions_right_before"]
    student, wrong = f"{100 * before:.1f} %", round(found["samples"] * (1 - before))
    assert (
        f"{found['samples']} images of `toy_longer` ({student} of captions right, {wrong} images wrong;"
        in text
    )
    assert f"draws {100 * noisiest[FAKE]['all']:.1f} % of captions right, where" in text
    assert (
        f"mends the wrong images ({shares[FAKE][0]:.0f} %) nearly as the base does ({shares[REAL][0]:.0f} %)"
        in text
    )
    assert (
        f"the base mends {shares[REAL][1]:.0f} % of them and the fake score {shares[FAKE][1]:.0f} %; of {wrong} images one is "
        f"{100 / wrong:.0f} points" in text
    )


def test_what_is_said_of_the_fake_score_at_dmd2s_settings_is_its_file() -> None:
    longer, dmd2 = (result(name)["captions_right"] for name in ("score_repair", "score_repair_dmd2"))
    found, text = result("score_repair_dmd2"), " ".join(PAGE.split())
    assert f"\n\n{score_repair.table(found).strip()}\n\n" in PAGE
    before, count = found["captions_right_before"], found["samples"]
    assert (
        f"a student of {100 * before:.1f} % (seed 0, {count:,} images, {round(count * (1 - before))} wrong)"
        in text
    )
    from_850 = dmd2["850"]
    drawn = [at[FAKE]["all"] for at in dmd2.values()]
    assert (
        f"from any timestep it draws {100 * min(drawn):.1f} to {100 * max(drawn):.1f} % of captions right, and from 850 "
        f"it mends {100 * from_850[FAKE]['wrong']:.0f} % of the wrong images "
        f"where the base mends {100 * from_850[REAL]['wrong']:.0f} %." in text
    )
    assert before < min(drawn) and max(drawn) - before < 0.025

    def apart(run: dict[str, Any], timestep: str) -> str:
        return f"{100 * (run[timestep][REAL]['wrong'] - run[timestep][FAKE]['wrong']):.0f}"

    assert (
        f"{apart(longer, '850')} points of wrong images at 850 and {apart(dmd2, '850')} here, {apart(longer, '300')} at 300 "
        f"and {apart(dmd2, '300')} here." in text
    )


def test_what_is_said_of_the_quickstarts_variants_is_their_file() -> None:
    rows, text = result("toy_quickstart_variants")["rows"], " ".join(PAGE.split())
    for seed, value in zip(range(3), rows["quickstart"]["caption_accuracy"]["values"], strict=True):
        # The report measures in float32, and this table what was exported.
        assert abs(value - result(f"quickstart_seed{seed}")["student"]["caption_accuracy"]) <= 0.002
    plain = "quickstart_all_timesteps"

    def ahead(row: str, other: str, name: str) -> float:
        """On seed 0."""
        return float(rows[row][name]["values"][0] - rows[other][name]["values"][0])

    captions, shape, fid = (
        ahead("quickstart", plain, name) for name in ("caption_accuracy", "shape_score", "fid")
    )
    assert (
        f"gains {100 * captions:.1f} points of captions and {shape:.3f} of shape score, and costs {fid:.2f} of FID and "
        f"{-ahead('quickstart', plain, 'diversity'):.3f} of diversity" in text
    )
    lower = mean_differences(rows, "quickstart_to_timestep_600", "quickstart")
    of_captions, of_shape, of_fid = (lower[name] for name in ("caption_accuracy", "shape_score", "fid"))
    assert (
        f"captions fall by {-100 * of_captions['mean']:.1f} points and the shape score by {-of_shape['mean']:.3f}, and FID by "
        f"{-of_fid['mean']:.2f} (standard errors {100 * of_captions['standard_error']:.1f}, "
        f"{of_shape['standard_error']:.3f} and {of_fid['standard_error']:.2f}, three pairs of seeds)" in text
    )
    base = result("toy_teacher")["toy"]["teacher"]["50"]["caption_accuracy"]
    worst = rows["quickstart_to_timestep_600"]["caption_accuracy"]["smallest"] / base
    assert f"up to 600 the worst has {100 * worst:.1f} %." in text
    assert worst < 0.95 <= rows["quickstart"]["caption_accuracy"]["smallest"] / base
    spread = rows["quickstart"]["caption_accuracy"]
    apart = 100 * (spread["largest"] - spread["smallest"])
    assert f"Seeds of the quickstart lie {apart:.1f} points apart, and seed 0 is its best" in text
    assert spread["values"][0] == spread["largest"]
    lost = 100 * ahead(plain, f"{plain}_unaligned", "caption_accuracy")
    assert f"captions fall by {lost:.1f} points (seed 0)" in text
    assert f"it is worth {lost:.1f} points" in text
    without = rows[f"{plain}_no_momentum"]["caption_accuracy"]
    faster = rows[f"{plain}_no_momentum_twice_the_rate"]["caption_accuracy"]["mean"]
    assert (
        f"captions are {100 * without['smallest']:.1f} to {100 * without['largest']:.1f} % at all timesteps"
        in text
    )
    assert f"({100 * faster:.1f} %)" in text
    assert without["largest"] <= rows[plain]["caption_accuracy"]["mean"]


def test_what_is_said_of_guidance_in_training_is_its_file() -> None:
    rows, text = result("toy_quickstart_guidance")["rows"], " ".join(PAGE.split())
    captions, diversity, fid = (
        [row[score]["mean"] for row in rows.values()] for score in ("caption_accuracy", "diversity", "fid")
    )
    scales = [float(name.removeprefix("quickstart_guidance_").replace("quickstart", "1.5")) for name in rows]
    assert scales == [1, 1.5, 2, 3, 4.5] and min(fid) == fid[0] and max(fid) == fid[-1]
    assert max(diversity) == diversity[0] and min(diversity) == diversity[-1]
    best = scales[captions.index(max(captions))]
    assert (
        f"captions rise, from {100 * captions[0]:.1f} % at 1 to {100 * max(captions):.1f} % at {best:g}, and diversity "
        f"falls, from {diversity[0]:.3f} to {diversity[-1]:.3f} at 4.5; FID rises from {fid[0]:.2f} to {fid[-1]:.2f}"
        in text
    )
    seeds = result("toy_quickstart_variants")["rows"]["quickstart"]
    spread = {name: seeds[name]["largest"] - seeds[name]["smallest"] for name in ("caption_accuracy", "fid")}
    points, apart = 100 * (captions[1] - captions[2]), 100 * spread["caption_accuracy"]
    assert points < apart and fid[1] - fid[2] > spread["fid"]
    assert (
        f"1.5 and 2 differ by {points:.1f} points of captions, less than seeds do ({apart:.1f}), "
        f"and by {fid[1] - fid[2]:.2f} of FID, more than they do ({spread['fid']:.2f})" in text
    )
