"""What is said of the recipes, on the page of results and in the README, equals their files."""

from __future__ import annotations

from typing import Any

from tests.helpers.result_files import PAGE, ROOT, result


def test_what_is_said_of_the_recipes_is_their_file() -> None:
    rows, text = result("toy_recipes")["rows"], " ".join(PAGE.split())
    pairs = result("toy_recipes_paired")["differences"]
    assert all(row["seeds"] == [0, 1, 2] for row in rows.values())
    base, quickstart = result("toy_teacher")["toy"]["teacher"], result("quickstart_seeds")["student"]
    one, many = (100 * base[steps]["caption_accuracy"] for steps in ("1", "50"))
    accuracy = {row: 100 * scores["caption_accuracy"]["mean"] for row, scores in rows.items()}
    cost = {row: scores["cpu_seconds"]["mean"] for row, scores in rows.items()}

    def ahead(row: str, other: str, score: str = "caption_accuracy") -> float:
        return float(pairs[f"{row}:{other}"][score]["mean"])

    assert (
        f"The base has {one:.1f} % of captions in one step and {many:.1f} % in 50 (FID {base['1']['fid']:.2f} and "
        f"{base['50']['fid']:.2f}); regression reaches {accuracy['regression']:.1f} %." in text
    )
    by_seed = [rows[row]["cpu_seconds"]["values"] for row in ("warmup", "regression")]
    dearer = [one / other for one, other in zip(*by_seed, strict=True)]
    assert (
        f"Feature matching adds {100 * ahead('warmup', 'regression'):.1f} points, at {min(dearer):.1f} to {max(dearer):.1f} "
        "times the processor time by seed." in text
    )
    assert (
        f"at {cost['dmd2_no_gan'] / cost['warmup']:.1f} and {cost['dmd2'] / cost['warmup']:.1f} times the warm-up's processor "
        f"time: {100 * ahead('dmd2_no_gan', 'warmup'):.1f} points of captions without the GAN, "
        f"{100 * ahead('dmd2', 'warmup'):.1f} with it, neither proven (their intervals reach below 0); FID falls by "
        f"{-ahead('dmd2_no_gan', 'warmup', 'fid'):.2f} and {-ahead('dmd2', 'warmup', 'fid'):.2f} (the second is). "
        f"Both end below the FID of real images ({result('toy_teacher')['toy']['real_vs_real']['fid']:.2f}),"
        in text
    )
    with_gan, without = (pairs[f"segmented:{row}"]["caption_accuracy"] for row in ("dmd2", "dmd2_no_gan"))
    assert (
        f"SDXS's scheme is {100 * with_gan['mean']:.1f} points ahead of DMD2's with the GAN (standard error "
        f"{100 * with_gan['standard_error']:.1f}: the one order of captions among the distillations that is proven) and "
        f"{ahead('segmented', 'dmd2', 'fid'):.2f} of FID behind it (proven too), at {cost['segmented'] / cost['dmd2']:.2f} "
        f"times the processor time. Without the GAN it is {100 * without['mean']:.1f} points ahead (standard error "
        f"{100 * without['standard_error']:.1f}, not proven)." in text
    )
    # 4.303 is Student's t at 97.5 % for the two degrees of freedom of three differences.
    beyond = {
        score: [
            pair
            for pair, scores in pairs.items()
            if abs(scores[score]["mean"]) > 4.303 * scores[score]["standard_error"]
        ]
        for score in ("caption_accuracy", "fid")
    }
    assert beyond == {
        "caption_accuracy": ["warmup:regression", "segmented:dmd2"],
        "fid": ["dmd2:warmup", "segmented:dmd2"],
    }
    assert rows["dmd2_no_gan"]["fid"]["mean"] < result("toy_teacher")["toy"]["real_vs_real"]["fid"]
    finish = [ahead("dmd2+finish", "dmd2", score) for score in ("caption_accuracy", "fid")]
    assert (
        f"The finish changes captions by {abs(100 * finish[0]):.1f} points and FID by {abs(finish[1]):.2f}, at "
        f"{cost['dmd2+finish'] / cost['dmd2']:.1f} times the processor time:" in text
    )
    distilled = ("dmd2_no_gan", "dmd2", "segmented", "dmd2+finish")
    best: dict[str, Any] = rows[max(distilled, key=lambda row: accuracy[row])]
    diversity = result("toy_quickstart_variants")["rows"]["quickstart"]["diversity"]["mean"]
    assert best["caption_accuracy"]["mean"] < quickstart["caption_accuracy"]["mean"]
    assert (
        f"{100 * quickstart['caption_accuracy']['mean']:.1f} % of captions and a shape score of "
        f"{quickstart['shape_score']['mean']:.3f}, from a quarter of the pairs; the best row here has "
        f"{100 * best['caption_accuracy']['mean']:.1f} % and {best['shape_score']['mean']:.3f}. It pays in FID "
        f"({quickstart['fid']['mean']:.2f} against {best['fid']['mean']:.2f}) and diversity ({diversity:.3f} against "
        f"{best['diversity']['mean']:.3f});" in text
    )
    pruned = rows["pruned_dmd2"]
    assert (
        f"has in one step {100 * accuracy['pruned_dmd2'] / many:.0f} % of the caption accuracy that the base has in 50, and "
        f"{pruned['fid']['mean'] / base['50']['fid']:.2f} times its FID" in text
    )
    share = 100 * pruned["parameters"] / rows["dmd2"]["parameters"]
    assert f"after knowledge distillation, with {share:.0f} % of the parameters |" in text


def test_the_readme_says_what_the_students_reach() -> None:
    quickstart, rows = result("quickstart_seeds"), result("toy_recipes")["rows"]
    longer, entry = result("toy_quickstart_longer")["rows"], result("toy_teacher")["toy"]
    students = {
        f"student, quickstart ({quickstart['student_updates']} updates)": quickstart["student"],
        "student, longer (1,400 updates)": longer["longer"],
        "student, warm-up then DMD2": rows["dmd2"],
        "student with 28 % of the base's parameters, longer": longer["pruned_longer"],
    }
    readme = (ROOT / "README.md").read_text()
    lines = {
        f"| {name} | 1": {key: scores[key]["mean"] for key in COLUMNS} for name, scores in students.items()
    }
    lines |= {f"| base | {steps}": entry["teacher"][steps] for steps in ("50", "1")}
    lines["| real images |"] = entry["real_vs_real"]
    for line, scores in lines.items():
        shape, fid, clip, accuracy = (scores[key] for key in COLUMNS)
        assert f"{line} | {shape:.3f} | {fid:.2f} | {clip:.1f} | {100 * accuracy:.1f} % |\n" in readme
    base = entry["teacher"]["50"]["caption_accuracy"]
    shares = [100 * scores["caption_accuracy"]["mean"] / base for scores in students.values()]
    assert f"have {min(shares):.0f} to {max(shares):.0f} % of the accuracy of their base" in readme


COLUMNS = ("shape_score", "fid", "clip_score", "caption_accuracy")
