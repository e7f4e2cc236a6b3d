"""What was wrong with a configuration, in one sentence: what came, what is accepted, where to change it.

jsonargparse reports a wrong value inside a `class_path` as a tree of everything that it tried, under the usage of all
options. The leaf of that tree is what the user needs, and the line of the file that it came from.
"""

import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path

import yaml


def sentence(message: str, options: Iterable[str], arguments: Sequence[str]) -> str:
    """One sentence for a message of the parser.

    Args:
        message: what jsonargparse says.
        options: all options of the command line, with their dashes.
        arguments: the command line, where the configuration files are named.
    """
    files = config_files(arguments)
    for reader in (_unrecognized, _unknown_key, _wrong_value, _no_such_class, _missing_file, _broken_file):
        found = reader(message, list(options), files, arguments)
        if found:
            return found
    return _flat(message)


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The files given by `--config FILE`, `--config=FILE` or `-c FILE`, in order."""
    files = []
    for index, argument in enumerate(arguments):
        if argument in ("--config", "-c") and index + 1 < len(arguments):
            files.append(Path(arguments[index + 1]))
        elif argument.startswith("--config="):
            files.append(Path(argument.partition("=")[2]))
    return files


def where(key: str, files: Sequence[Path], arguments: Sequence[str]) -> str:
    """Where a setting was made: on the command line, which wins, or on a line of the last file that has it."""
    name = key.rpartition(".")[2]
    if any(argument.partition("=")[0].endswith((f"--{key}", f".{name}")) for argument in arguments):
        return "on the command line"
    for file in reversed(files):
        lines = list(_lines_of(name, file))
        if lines:
            return f"in {file}, line {lines[0]}"
    return "in the configuration"


def _unrecognized(
    message: str, options: list[str], files: Sequence[Path], arguments: Sequence[str]
) -> str | None:
    match = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
    if match is None:
        return None
    name = match[1]
    if "class_path" in message:
        key = _key(message, match.start())
        return f"{key}.{name[2:]} is no option{_where(name[2:], files, arguments)}."
    return f"{name} is no option{_nearest(name, options)}; `python train.py --help` lists all of them."


def _unknown_key(
    message: str, options: list[str], files: Sequence[Path], arguments: Sequence[str]
) -> str | None:
    match = re.search(r"(?:Group '([^']*)' does not accept option|Option) '([^']+)'", message)
    if match is None:
        return None
    group, name = match[1], match[2]
    key = ".".join(part for part in (_key(message, match.start()), group, name) if part)
    told = message[: match.start()] + message[match.end() :].partition("\n")[0]
    accepted = _accepted_by_class(told, group) or _accepted_by_group(key, options)
    what = f"{key} is no option{_nearest(name.partition('.')[0], accepted)}"
    listed = f"; accepted are {', '.join(sorted(accepted))}" if 0 < len(accepted) <= 30 else ""
    return f"{what}{_where(name, files, arguments)}{listed}."


def _wrong_value(
    message: str, options: list[str], files: Sequence[Path], arguments: Sequence[str]
) -> str | None:
    match = re.search(r"Expected an? (.+?)\. Got value: (.*)", message)
    if match:
        expected, value = match[1], match[2]
    else:
        union = re.search(r"Subtypes: \[(.*)\]", message)
        given = re.search(r"Given value: (.*)\s*$", message)
        if union is None or given is None or "class_path" in message:
            return None
        match, expected, value = union, union[1], given[1]
    key = _key(message, match.start())
    return f"{key} is {value!r}, but {_plain_type(expected)} is accepted{_where(key, files, arguments)}."


def _no_such_class(
    message: str, options: list[str], files: Sequence[Path], arguments: Sequence[str]
) -> str | None:
    match = re.search(r"Problem with given class_path '([^']+)':\s*\n\s*(.+)", message)
    if match:
        place = _where("class_path", [], arguments, match[1], files)
        return f"class_path {match[1]!r} cannot be used{place}: {_flat(match[2])}."
    given = re.search(r"Not a valid subclass of (\w+)", message)
    if given is None:
        return None
    values = re.findall(r"'class_path': '([^']+)'", message)
    named = f" ({', '.join(values)})" if values else ""
    return f"{_key(message, len(message))}: not a usable {given[1]}{named}; check the class_path and its init_args."


def _missing_file(
    message: str, options: list[str], files: Sequence[Path], arguments: Sequence[str]
) -> str | None:
    match = re.search(r"File does not exist: '([^']+)'", message)
    return f"--config: there is no file '{match[1]}'." if match else None


def _broken_file(
    message: str, options: list[str], files: Sequence[Path], arguments: Sequence[str]
) -> str | None:
    match = re.search(r"Problems parsing config: ?(.*)", message, re.DOTALL)
    if match is None:
        return None
    for file in files:
        try:
            yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            return f"{file} is no YAML: {_flat(str(error))}."
        except OSError:
            continue
    return f"a configuration file is no YAML: {_flat(match[1])}."


def _key(message: str, end: int) -> str:
    """The dotted path to what is complained about at `end`, from the parser keys and classes mentioned before it."""
    parts = []
    for match in re.finditer(
        r"Parser key \"([^\"]+)\"|Problem with given class_path|callable class:", message[:end]
    ):
        parts.append(match[1] if match[1] else "init_args")
    return ".".join(parts)


def _accepted_by_class(message: str, group: str | None) -> list[str]:
    """Arguments of the class named last in a message, or of the dataclass that is its argument `group`."""
    paths = re.findall(r"(?:class_path'?:? |class_path=)'([\w.]+)'", message)
    if not paths:
        return []
    module, _, name = paths[-1].rpartition(".")
    try:
        accepting = getattr(importlib.import_module(module), name)
        if group is not None:
            annotation = typing.get_type_hints(accepting.__init__)[group]
            accepting = next(one for one in (annotation, *typing.get_args(annotation)) if is_dataclass(one))
        parameters = inspect.signature(accepting).parameters.values()
    except (ImportError, AttributeError, KeyError, NameError, StopIteration, TypeError, ValueError):
        return []
    # What a partly configured optimizer or scheduler gets from the training is not the file's to give.
    given = [p.name for p in parameters if str(p.annotation).rpartition(".")[2].rstrip("'>") == "Optimizer"]
    return [p.name for p in parameters if p.name not in ("self", "params", *given)]


def _accepted_by_group(key: str, options: list[str]) -> list[str]:
    groups = {option[2:].partition(".")[0] for option in options}
    prefix = f"--{key.rpartition('.')[0]}." if key.partition(".")[0] in groups else "--"
    names = {option[len(prefix) :].partition(".")[0] for option in options if option.startswith(prefix)}
    return sorted(name for name in names if name and not name.endswith("+"))


def _nearest(name: str, accepted: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.rpartition(" ")[2], list(accepted), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _where(
    key: str,
    files: Sequence[Path],
    arguments: Sequence[str],
    value: str = "",
    value_files: Sequence[Path] = (),
) -> str:
    if value:
        for file in reversed(value_files):
            for number, line in enumerate(_text(file).splitlines(), 1):
                if value in line:
                    return f" (set in {file}, line {number})"
        return ""
    place = where(key, files, arguments)
    return "" if place == "in the configuration" else f" (set {place})"


def _plain_type(expected: str) -> str:
    names = re.sub(r"<class '([^']+)'>", lambda match: match[1].rpartition(".")[2], expected)
    names = names.replace("typing.", "").replace("NoneType", "null")
    return " or ".join(part.strip() for part in names.split(",")) if "[" not in names else names


def _lines_of(name: str, file: Path) -> Iterator[int]:
    """Lines on which a mapping of the file has a key of this name."""
    try:
        root = yaml.compose(_text(file))
    except yaml.YAMLError:
        return
    waiting = [root]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == name:
                    yield key.start_mark.line + 1
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _flat(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
