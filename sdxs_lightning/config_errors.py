"""What was wrong with a configuration, in one sentence: what came, what is accepted, where to change it.

jsonargparse reports a wrong value inside a `class_path` as an indented tree of all types that it tried. The user needs the
first leaf of that tree, the path to it, and the line of the file that it came from.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass

from sdxs_lightning.config_files import MergedArguments
from sdxs_lightning.core.errors import nearest
from sdxs_lightning.renamed import renamed_in
from sdxs_lightning.trust import refusal

TRIED = re.compile(
    r"Does not validate against any|Subtypes: |Errors:|Expected a <class 'NoneType'>|Given value type: |Expected a path but "
)
"""Lines of the tree without information of their own."""


@dataclass
class Problem:
    """The first leaf of jsonargparse's tree."""

    key: list[str]
    """Path to the setting; `init_args` stands for each class on the way."""
    owner: str | None
    """The innermost class on the way."""
    text: str
    value: str | None
    """What was given, where the leaf is about a type."""
    expected: str | None


def sentence(message: str, options: Iterable[str], command_line: MergedArguments) -> str:
    """One sentence for a message of the parser.

    Args:
        message: what jsonargparse says.
        options: all options of the command line, with their dashes.
        command_line: what was parsed.
    """
    moved = renamed_in(command_line)
    if moved:
        return "; ".join(moved) + "."
    problem = _read(message)
    key = ".".join(problem.key)
    denied = re.search(r"Importing '([^']+)' is not allowed, denied by", message)
    if denied:
        return refusal(denied[1], key, command_line.place(key))
    flag = re.match(r"unrecognized arguments: (--[^\s=]+)", problem.text)
    if flag and not problem.key:
        near = nearest(flag[1], options)
        return f"{flag[1]} is not an option{near}; `python train.py --help` says where all are listed."
    unknown = re.match(r"(?:Group '([^']*)' does not accept option|Option) '([^']+)'", problem.text)
    if flag or unknown:
        group, name = (unknown[1], unknown[2]) if unknown else (None, flag[1][2:] if flag else "")
        return _unknown_option(problem, group, name, list(options), command_line)
    if problem.expected is not None:
        what = f"is {problem.value!r}, but {_plain_type(problem.expected)} is accepted"
        return f"{key} {what}{_place(key, command_line)}."
    group = re.match(r"(?:Not a valid subclass of|Does not implement protocol) (\w+)", problem.text)
    if group:
        return f"{key}{_place(key, command_line)} takes a mapping with the options of {group[1]}, or the class_path of one."
    required = re.match(r"the following arguments are required: (.+)", problem.text)
    if required:
        name = ".".join([*problem.key, required[1].partition(",")[0]])
        null = _place(name, command_line)
        return f"{name} is required{f', null is not accepted{null}' if null else ''}."
    if problem.key and problem.key[-1] == "init_args":  # the class itself, not one of its arguments
        key = ".".join([*problem.key[:-1], "class_path"])
        return f"{key} {problem.owner!r} cannot be used{_place(key, command_line)}: {problem.text}."
    return f"{key}{_place(key, command_line)}: {problem.text}." if key else f"{problem.text}."


def reference_sentence(message: str, key: str | None, command_line: MergedArguments) -> str:
    """One sentence for a `${...}` that leads nowhere.

    Args:
        message: what OmegaConf says.
        key: where the reference stands.
        command_line: what was parsed.
    """
    broken = re.search(r"trying to access (\S+): node `([^`]+)` is not a container", message)
    if broken is None:
        return f"{message.splitlines()[0].rstrip('.')} (key {key})."
    return (
        f"{key}{_place(str(key), command_line)} refers to {broken[1]}, and {broken[2]} is null"
        f"{_place(broken[2], command_line)}; "
        f"give {key} a value of its own, or leave {broken[2]} as it was."
    )


def with_place(message: str, command_line: MergedArguments) -> str:
    """Adds to a message that quotes a value of the files, such as a folder that is missing, the option and its line.

    A message that names a place already stays as it is.
    """
    if " (set " in message or ", set in " in message:
        return message
    for file in reversed(command_line.files):
        for key, value in file.texts.items():
            if "/" in value and f"'{value}'" in message:
                return (
                    f"{message.rstrip('.')}; '{value}' is {key}, set in {file.name}, line {file.lines[key]}."
                )
    return message


def _read(message: str) -> Problem:
    key = list[str]()
    owner = value = expected = subtypes = None
    leaf = list[str]()
    depth = 0
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        if leaf:
            if line.lstrip().startswith("- ") or indent < depth:
                break
            leaf.append(text)
            continue
        parser_key = re.match(r'Parser key "([^"]+)":\s*', text)
        if parser_key:
            key.append(parser_key[1])
            text = text[parser_key.end() :]
        named = re.match(r"Problem with given class_path '([^']+)':\s*", text)
        if named:
            owner, text = named[1], text[named.end() :]
            key.append("init_args")
        called = re.match(
            r"Type \S.* expects a function or a callable class: (.*?)\.?\. Got value: (.*)", text
        )
        if called:
            text, given = called[1], re.search(r"class_path='([\w.]+)'", called[2])
            owner = given[1] if given else owner
            key += ["init_args"] if "is not accepted" in text else []
        subtypes = text[len("Subtypes: ") :].strip("[]") if text.startswith("Subtypes: ") else subtypes
        if text and not TRIED.match(text):
            leaf, depth = [text], indent
    text = _flat(" ".join(leaf))
    typed = re.match(r"Expected an? (.+?)(?:\. Got value: (.*))?$", text)
    if typed and not text.startswith("Expected '"):
        given = re.search(r"Given value: (.*)", message)
        value = typed[2] or (given[1] if given else None)
        expected = typed[1] if typed[2] or subtypes is None else subtypes
    return Problem(key, owner, text, value, expected)


def _unknown_option(
    problem: Problem, group: str | None, name: str, options: list[str], command_line: MergedArguments
) -> str:
    key = ".".join(part for part in (*problem.key, group, name) if part)
    accepted = _accepted_by_class(problem.owner, group) or _accepted_by_group(key, options)
    near = nearest(name.partition(".")[0], accepted)
    listed = f"; accepted are {', '.join(sorted(accepted))}" if 0 < len(accepted) <= 30 else ""
    return f"{key} is not an option{near}{_place(key, command_line)}{listed}."


def _accepted_by_class(owner: str | None, group: str | None) -> list[str]:
    """Arguments of a class, or of the dataclass that is its argument `group`."""
    module, _, name = (owner or "").rpartition(".")
    try:
        accepting = getattr(importlib.import_module(module), name)
        if group is not None:
            annotation = typing.get_type_hints(accepting.__init__)[group]
            accepting = next(one for one in (annotation, *typing.get_args(annotation)) if is_dataclass(one))
        parameters = inspect.signature(accepting).parameters.values()
    except (ImportError, AttributeError, KeyError, NameError, StopIteration, TypeError, ValueError):
        return []
    # The trainer gives a partly configured optimizer its parameters, and a scheduler its optimizer.
    given = [p.name for p in parameters if str(p.annotation).rpartition(".")[2].rstrip("'>") == "Optimizer"]
    return [p.name for p in parameters if p.name not in ("self", "params", *given)]


def _accepted_by_group(key: str, options: list[str]) -> list[str]:
    groups = {option[2:].partition(".")[0] for option in options}
    prefix = f"--{key.rpartition('.')[0]}." if key.partition(".")[0] in groups else "--"
    names = {option[len(prefix) :].partition(".")[0] for option in options if option.startswith(prefix)}
    return sorted(name for name in names if name and not name.endswith("+"))


def _place(key: str, command_line: MergedArguments) -> str:
    place = command_line.place(key)
    return f" (set {place})" if place else ""


def _plain_type(expected: str) -> str:
    names = re.sub(r"<class '([^']+)'>", lambda match: match[1].rpartition(".")[2], expected)
    names = names.replace("typing.", "").replace("NoneType", "null")
    return " or ".join(part.strip() for part in names.split(",")) if "[" not in names else names


def _flat(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
