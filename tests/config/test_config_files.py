"""Include, merge, null, and where a setting was made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxs_lightning.config_files import merge, read_arguments
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.renamed import CLASSES, MODULES, new_class, renamed_in
from sdxs_lightning.trust import Trust


class Tally(Counter[str]):
    """A subclass."""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def to(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return to


def test_a_file_is_laid_over_what_it_includes(write: Any) -> None:
    write("sd15/distill.yaml", "trainer: {devices: 1, max_steps: 5}\nmodel: {init_args: {seed: 0}}\n")
    write("sizes/large.yaml", "trainer: {devices: 8}\n")
    write(
        "sd21/distill.yaml", "include: [../sd15/distill.yaml, ../sizes/large.yaml]\ntrainer: {max_steps: 9}\n"
    )
    line = read_arguments(["--config", "sd21/distill.yaml"])
    assert line.settings == {"trainer": {"devices": 8, "max_steps": 9}, "model": {"init_args": {"seed": 0}}}
    assert [file.name for file in line.files] == [
        "sd15/distill.yaml",
        "sizes/large.yaml",
        "sd21/distill.yaml",
    ]
    assert line.place("trainer.devices") == "in sizes/large.yaml, line 1"
    assert line.place("trainer.max_steps") == "in sd21/distill.yaml, line 2"
    assert line.place("model.init_args.seed") == "in sd15/distill.yaml, line 2"
    assert line.place("trainer.precision") is None


def test_a_file_included_twice_is_merged_once_in_its_first_place(write: Any) -> None:
    write("base.yaml", "a: {x: 1, y: 1}")
    write("one.yaml", "include: base.yaml\na: {x: 2}")
    write("two.yaml", "include: base.yaml\na: {y: 2}")
    write("both.yaml", "include: [one.yaml, two.yaml]")
    assert read_arguments(["--config=both.yaml"]).settings == {"a": {"x": 2, "y": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: first.yaml", "in a circle: first.yaml -> second.yaml -> first.yaml"),
        ("include: nowhere.yaml", "there is no file 'nowhere.yaml', which second.yaml includes"),
        (
            "a: 1\ninclude: {x: 1}",
            "include is {'x': 1} in second.yaml, line 2; it takes a path or a list of paths",
        ),
        ("a: [1\nb: 2", "second.yaml is not valid YAML in line 2: "),
        ("- a", r"second.yaml is not a configuration: it holds \['a'\]"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "not a configuration: line 4: b is set a second time in the same mapping"),
        ("a: {null: 1}", "line 1: a key is no text; put it in quotes"),
        ("? [a]\n: 1", "line 1: a key is no text"),
        ("a: &x\n  b: [*x]", "line 1: an alias leads back to what it is part of"),
        ("a: " + "[" * 5000 + "]" * 5000, "second.yaml is not a configuration: "),
        (
            "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
            "with its aliases it has more than 100,000 values",
        ),
        (f"a: {'9' * 5000}", "second.yaml is not a configuration: Exceeds the limit"),
    ],
)  # fmt: skip
def test_what_cannot_be_included_is_refused(write: Any, text: str, message: str) -> None:
    write("second.yaml", text)
    with pytest.raises(UserError, match=message):
        read_arguments(["--config", write("first.yaml", "include: second.yaml")])


def test_lists_are_replaced_or_appended_to() -> None:
    base = {"callbacks": ["a"], "logger": ["x"]}
    assert merge(base, {"callbacks+": ["b"], "logger": ["y"]}) == {"callbacks": ["a", "b"], "logger": ["y"]}
    assert merge(merge({}, {"callbacks+": ["b"]}), {"callbacks+": "c"}) == {"callbacks+": ["b", "c"]}
    assert merge({"callbacks+": ["b"]}, {"callbacks": ["a"]}) == {"callbacks": ["a"]}
    assert base == {"callbacks": ["a"], "logger": ["x"]}


def test_entries_of_a_dict_merge_and_null_stays() -> None:
    base = {"objectives": {"a": {"weight": 1, "k": 2}, "b": {"weight": 3}}}
    overlay = {"objectives": {"a": {"weight": 5}, "b": None, "c": {"weight": 7}}}
    assert merge(base, overlay) == {"objectives": {"a": {"weight": 5, "k": 2}, "b": None, "c": {"weight": 7}}}


TRUST = Trust(("builtins", "collections", "wsgiref", "tests", "no"))


@pytest.mark.parametrize(
    ("new", "arguments"),
    [
        ("builtins.dict", {"x": 2}),
        ("collections.OrderedDict", {"x": 2}),  # has the same base
        ("collections.Counter", {"num_features": 3, "eps": 1, "x": 2}),
        ("wsgiref.headers.Headers", {"x": 2}),
        ("tests.config.test_config_files.Tally", {"num_features": 3, "eps": 1, "x": 2}),
        ("no.such.Class", {"x": 2}),
    ],
)
def test_init_args_stay_below_a_subclass_only(new: str, arguments: dict[str, int]) -> None:
    base = {"class_path": "collections.Counter", "init_args": {"num_features": 3, "eps": 1}}
    merged = merge(base, {"class_path": new, "init_args": {"x": 2}}, TRUST)
    assert merged == {"class_path": new, "init_args": arguments}


def test_a_subclass_alone_keeps_all_init_args() -> None:
    base = {"class_path": "collections.Counter", "init_args": {"num_features": 3}}
    assert merge(base, {"class_path": "tests.config.test_config_files.Tally"}, TRUST)["init_args"] == {
        "num_features": 3
    }


def test_flags_come_after_all_files_and_keep_their_order(write: Any) -> None:
    write("a.yaml", "trainer: {devices: 1}")
    write("b.yaml", "trainer: {devices: 2, precision: 1e-3}")
    line = read_arguments(
        ["--trainer.devices", "8", "--config", "a.yaml", "--plan", "-c", "b.yaml", "--x.y=-1"]
    )
    assert line.arguments[1:] == ["--trainer.devices", "8", "--plan", "--x.y=-1"]
    config = line.arguments[0].removeprefix("--config=")
    assert yaml.safe_load(config) == {"trainer": {"devices": 2, "precision": 0.001}}
    assert line.place("trainer.devices") == "on the command line"


def test_null_flags_are_merged_and_the_last_flag_wins(write: Any) -> None:
    write("a.yaml", "model: {class_path: m.M, init_args: {pairs: {count: 4}, student: {class_path: s.S}}}")
    line = read_arguments(
        [
            *("--config", "a.yaml", "--model.init_args.pairs.count", "3", "--model.init_args.pairs", "null"),
            *("--model.student.weights=null", "--data.x=null", "--data.x=1", "--ckpt_path", "null"),
        ]
    )
    arguments = {"pairs": None, "student": {"class_path": "s.S", "init_args": {"weights": None}}}
    assert line.settings == {"model": {"class_path": "m.M", "init_args": arguments}}
    assert line.arguments[1:] == ["--data.x=1", "--ckpt_path", "null"]


def test_nulls_inside_a_flag_are_merged(write: Any) -> None:
    write("a.yaml", "model: {class_path: m.M, init_args: {control: {weights: a, train: false}}}")
    inside = '{"train": true, "weights": null, "lora": {"rank": 2, "alpha": null}}'
    for flag in ([f"--model.control={inside}"], ["--model.control", inside]):
        line = read_arguments(["--config", "a.yaml", *flag, "--plan"])
        control = {"weights": None, "train": False, "lora": {"alpha": None}}
        assert line.settings == {"model": {"class_path": "m.M", "init_args": {"control": control}}}
        assert line.arguments[1:] == ['--model.control={"train": true, "lora": {"rank": 2}}', "--plan"]
    line = read_arguments(["--config", "a.yaml", '--model.control={"weights": null}', "--data={1"])
    assert line.settings["model"]["init_args"]["control"] == {"weights": None, "train": False}
    assert line.arguments[1:] == ["--data={1"]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--model.data=collections.OrderedDict"], False),
        (["--model.init_args.data", "collections.OrderedDict"], False),
        (["--model.data.class_path", "collections.OrderedDict"], False),
        (['--model.data={"class_path": "collections.OrderedDict", "init_args": {"x": 2}}'], False),
        (["--model.data=OrderedDict"], False),  # a class that the parser knows by its name
        (["--model.data=Counter"], True),
        (["--model.data=collections.Counter"], True),
        (["--model.data=tests.config.test_config_files.Tally"], True),
        (['--model.data={"eps": 2}'], True),
        (["--model.data={1"], True),
        (["--model.data.eps=collections.OrderedDict"], True),
        (["--model.other=collections.OrderedDict", "--plan"], True),
    ],
)
def test_a_flag_that_names_another_class_drops_what_the_files_gave_the_old_one(
    write: Any, flags: list[str], kept: bool
) -> None:
    inner = "{class_path: collections.Counter, init_args: {condition: canny, eps: 1}}"
    write("a.yaml", f"model: {{class_path: m.M, init_args: {{data: {inner}}}}}")
    line = read_arguments(["--trust=collections,tests", "--config", "a.yaml", *flags])
    data = line.settings["model"]["init_args"]["data"]
    assert data.get("init_args") == ({"condition": "canny", "eps": 1} if kept else None)
    assert (data["class_path"] == "collections.Counter") == kept
    assert line.arguments[1:] == flags  # which the parser applies, and checks


def test_old_names_are_reported_with_their_new_ones(write: Any) -> None:
    old = "sdxs_lightning.modules.miniaturisation.Miniaturisation"
    write("a.yaml", f"model:\n  class_path: {old}\n  init_args:\n    curriculum: {{warmup_updates: 3}}\n")
    line = read_arguments(["--config", "a.yaml", "--trainer.logger.class_path=evaluation.report.Report"])
    assert renamed_in(line) == [
        f"{old} is called sdxs_lightning.stages.prune_distill.PrunedUNetDistillation now (a.yaml, line 2)",
        "curriculum is called update_schedule now (a.yaml, line 4)",
        "evaluation.report.Report is called evaluation.callbacks.run_report.Report now (on the command line)",
    ]


def test_new_names_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    for module in MODULES.values():
        assert (root / f"{module.replace('.', '/')}.py").is_file(), module
    for path in CLASSES.values():
        module, _, name = path.rpartition(".")
        assert f"class {name}" in (root / f"{module.replace('.', '/')}.py").read_text(), path
    assert new_class("sdxs_lightning.modules.fake_score.FakeScore") == (
        "sdxs_lightning.networks.fake_score.FakeScore"
    )
    assert new_class("sdxs_lightning.networks.fake_score.FakeScore") is None
