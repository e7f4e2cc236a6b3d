"""Configuration files: `include`, merging, and which line of which file made a setting.

All `--config` files are merged here, before jsonargparse sees them, into one configuration:

- A file may start from others: `include: ../sd15/distill.yaml`, or a list, relative to the file. They are merged in order,
  then the file itself.
- Mappings merge field by field, everything else is replaced. `key+: [...]` appends to a list.
- `null` switches a part off.
- A mapping that names another `class_path` drops the `init_args` below it, unless the new class is a subclass of the old one:
  then they stay and merge. Fields without a `class_path` (`regression: {weight: 1.0}`) merge with the `init_args` of one that
  has it.
- `${...}` is resolved after merging (by OmegaConf), so a reference follows what a later file or flag says.

Flags are applied after all files, `--key null` included. One that names another class drops the `init_args` too;
those that a subclass does not have are left out.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.trust import Trust, class_paths, refusal, split_arguments

INCLUDE = "include"
CONFIG_FLAGS = ("--config", "-c")
GROUP_FLAGS = ("--model", "--data", "--trainer")
MAX_NODES, MAX_NESTING = 100_000, 64
"""Limits on a file, since aliases of aliases can make billions of values of a few lines."""
_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")

Settings = dict[str, Any]


@dataclass(frozen=True)
class ConfigFile:
    """One file as it was read, without what it includes."""

    name: str
    """As given, for messages."""
    settings: Settings
    lines: dict[str, int]
    """Dotted key -> line on which the file sets it, in the file's order; elements of lists are numbered from 0."""
    texts: dict[str, str]
    """Dotted key -> what is written there, where that is no list or mapping."""


@dataclass(frozen=True)
class MergedArguments:
    """A command line whose files are merged."""

    arguments: list[str]
    """For the parser: one `--config` with the merged settings, then the flags."""
    files: list[ConfigFile]
    """In the order of merging: the last one that sets a key wins."""
    settings: Settings
    """What the files and the null flags say together."""
    flags: frozenset[str]
    """Keys that options set, without `init_args`."""
    trust: Trust = Trust()
    """What `--trust` allows; it is not among the arguments any more."""

    def place(self, key: str) -> str | None:
        """Where a setting was made, as "on the command line" or "in FILE, line N".

        Args:
            key: dotted; where no file has it, a key that ends with its last part is looked for.

        Returns:
            None if nothing sets it.
        """
        name = _without_init_args(key)
        last = name.rpartition(".")[2]
        if self.flags & {name, f"{name}.class_path"}:
            return "on the command line"
        for file in reversed(self.files):
            if key in file.lines:
                return f"in {file.name}, line {file.lines[key]}"
        if any(flag.rpartition(".")[2] == last for flag in self.flags):
            return "on the command line"
        for file in reversed(self.files):
            for other, line in file.lines.items():
                if other.rpartition(".")[2] == last:
                    return f"in {file.name}, line {line}"
        return None


def read_arguments(arguments: Sequence[str]) -> MergedArguments:
    """Merges the `--config` files of a command line.

    `--a.b null` is merged too, and so are the nulls of `--a.b '{"c": null}'`: jsonargparse (4.53) reads null for a `str | None`
    two classes deep as the string "None". So are the classes that flags name: jsonargparse would keep all arguments that the
    new class has too, such as the condition of another data set.

    Raises:
        UserError: for a file that is missing, no YAML, or includes itself.
    """
    trust, arguments = split_arguments(arguments)
    files = list[ConfigFile]()
    nulls = list[str]()
    flags = list[tuple[str, list[str]]]()
    for chunk in _chunks(arguments):
        name, equals, value = chunk[0].partition("=")
        if not equals and len(chunk) == 2:
            value = chunk[1]
        if name in CONFIG_FLAGS and value:
            files += read_config(value)
        elif value == "null" and ("." in name or name in GROUP_FLAGS):
            # Last one wins: an earlier flag for the same setting, or for a part of it, is replaced.
            flags = [flag for flag in flags if flag[0] != name and not flag[0].startswith(f"{name}.")]
            nulls.append(name[2:])
        else:
            nulls = [null for null in nulls if f"--{null}" != name]
            kept, inner = _without_nulls(value)
            nulls += [f"{name[2:]}.{key}" for key in inner]
            if kept or not inner:
                flags.append((name, [f"{name}={kept}"] if inner else chunk))
    settings: Settings = {}
    for file in files:
        settings = merge(settings, file.settings, trust)
    flag_values = [
        (name, chunk[1] if len(chunk) == 2 else chunk[0].partition("=")[2]) for name, chunk in flags
    ]
    for name, value in flag_values:
        settings = merge(settings, _other_class(name[2:], value, settings, trust), trust)
    for key in nulls:
        settings = merge(settings, _nested(key, settings), trust)
    merged = [f"--config={_exact_yaml(settings)}"] if settings else []
    set_by_flags = [*(name.lstrip("-").removesuffix("+") for name, _ in flags), *nulls]
    set_by_flags += [f"{name[2:]}.{key}" for name, value in flag_values for key in _inner_keys(value)]
    keys = frozenset(map(_without_init_args, set_by_flags))
    left = [part for _, chunk in flags for part in chunk]
    return MergedArguments(merged + left, files, settings, keys, trust)


def refuse_untrusted(command_line: MergedArguments) -> None:
    """Refuses a class_path of the files that may not be imported, before anything is; the parser refuses the others.

    Raises:
        UserError: naming it, its line and `--trust`.
    """
    for key, path in class_paths(command_line.settings):
        if not command_line.trust.allows(path):
            raise UserError(refusal(path, key, command_line.place(key)))


def read_config(value: str, including: Sequence[Path] = ()) -> list[ConfigFile]:
    """A configuration file and all that it includes, in the order of merging.

    Args:
        value: path, or the configuration itself as JSON or YAML in braces.
        including: the files that led here.

    Raises:
        UserError: for a file that is missing, no YAML, or includes itself.
    """
    inline = value.lstrip().startswith("{")
    path = Path("--config" if inline else os.path.abspath(value))
    if path in including:
        chain = " -> ".join(_shown(one) for one in (*including[including.index(path) :], path))
        raise UserError(f"configuration files include each other in a circle: {chain}.")
    name = str(path) if inline else _shown(path)
    file = _parse(value if inline else _read(path, including), name)
    if INCLUDE not in file.settings:
        return [file]
    included = file.settings.pop(INCLUDE)
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise UserError(
            f"{INCLUDE} is {included!r} in {name}, line {file.lines[INCLUDE]}; it takes a path or a list of paths, relative to "
            "that file."
        )
    folder = Path() if inline else path.parent
    files = list[ConfigFile]()
    for one in names:
        # A file that two included files share is merged once, in its first place.
        seen = {earlier.name for earlier in files}
        files += [new for new in read_config(str(folder / one), [*including, path]) if new.name not in seen]
    return [*files, file]


def merge(base: Settings, overlay: Settings, trust: Trust = Trust()) -> Settings:
    """Lays one mapping over another; neither is changed.

    Args:
        base: what the earlier files say.
        overlay: what the next one says.
        trust: which classes may be imported, to see whether one is a subclass of another.
    """
    base, overlay = _as_class(base, overlay), _as_class(overlay, base)
    merged = dict(base)
    old = base.get("class_path")
    new = overlay.get("class_path", old)
    if new != old and old is not None and not _is_subclass(new, old, trust):
        merged.pop("init_args", None)
        merged.pop("dict_kwargs", None)
    for key, value in overlay.items():
        target = key.removesuffix("+")
        if target != key:
            stays = target if isinstance(merged.get(target), list) else key
            added = value if isinstance(value, list) else [value]
            merged[stays] = [*merged.get(stays, []), *added]
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value, trust)
        else:
            merged.pop(f"{key}+", None)
            merged[key] = value
    return merged


def _as_class(settings: Settings, other: Settings) -> Settings:
    """Fields of a class that is not named, where the other mapping names it: they are its `init_args`."""
    if (
        not settings
        or "class_path" not in other
        or settings.keys() & {"class_path", "init_args", "dict_kwargs"}
    ):
        return settings
    return {"init_args": settings}


def _is_subclass(name: Any, of: Any, trust: Trust) -> bool:
    new, old = _imported(name, trust), _imported(of, trust)
    return isinstance(new, type) and isinstance(old, type) and issubclass(new, old)


def _imported(dotted: Any, trust: Trust) -> Any:
    module, _, name = str(dotted).rpartition(".")
    if not trust.allows(str(dotted)):  # refused afterwards, with its line
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):  # the parser refuses it with its line
        return None


def _without_init_args(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "init_args")


def _chunks(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Each option with the value behind it."""
    waiting = list(arguments)
    while waiting:
        first = waiting.pop(0)
        takes = (first.startswith("--") or first in CONFIG_FLAGS) and "=" not in first
        value = bool(waiting) and takes and not waiting[0].startswith("--") and waiting[0] not in CONFIG_FLAGS
        yield [first, waiting.pop(0)] if value else [first]


def _without_nulls(value: str) -> tuple[str, list[str]]:
    """A flag's value without the nulls of its mapping, and their dotted keys; "" if nothing else is in it."""
    if not value.startswith("{"):
        return value, []
    try:
        mapping = yaml.safe_load(value)
    except yaml.YAMLError:
        return value, []  # the parser says what is wrong with it
    keys = list[str]()

    def kept(node: Settings, path: str) -> Settings:
        found: Settings = {}
        for name, one in node.items():
            if one is None:
                keys.append(f"{path}{name}")
            else:
                found[name] = kept(one, f"{path}{name}.") if isinstance(one, dict) else one
        return found

    rest = kept(mapping, "") if isinstance(mapping, dict) else {}
    return (json.dumps(rest) if rest else "") if keys else value, keys


def _inner_keys(value: str) -> Iterator[str]:
    """Dotted keys of all that a flag's mapping sets."""
    try:
        mapping = yaml.safe_load(value) if value.startswith("{") else None
    except yaml.YAMLError:
        return  # the parser says what is wrong with it

    def keys(node: Any, path: str) -> Iterator[str]:
        if isinstance(node, dict):
            for name, one in node.items():
                yield f"{path}{name}"
                yield from keys(one, f"{path}{name}.")

    yield from keys(mapping, "")


def _other_class(key: str, value: str, settings: Settings, trust: Trust) -> Settings:
    """{"a": {"class_path": new}} for a flag that gives a setting another class, no subclass of the one it has; else {}."""
    key = key.removesuffix(".class_path")
    below: Any = _at(key, settings)
    old = below.get("class_path") if isinstance(below, dict) else None
    if value.startswith("{"):
        try:
            mapping = yaml.safe_load(value)
        except yaml.YAMLError:
            return {}  # the parser says what is wrong with it
        value = str(mapping.get("class_path", old)) if isinstance(mapping, dict) else ""
    # A name without its module is that of a class that the parser knows.
    if not isinstance(old, str) or value in (old, old.rpartition(".")[2]):
        return {}
    if not all(part.isidentifier() for part in value.split(".")) or _is_subclass(value, old, trust):
        return {}
    return _nested(key, settings, {"class_path": value})


def _at(key: str, settings: Settings) -> Any:
    """The value of a dotted key, None if there is none; `init_args` may be left out, as in jsonargparse's flags."""
    found: Any = _nested(key, settings)
    value: Any = settings
    while isinstance(found, dict) and isinstance(value, dict):
        ((name, found),) = found.items()
        value = value.get(name)
    return value


def _nested(key: str, settings: Settings, value: Any = None) -> Settings:
    """{"a": {"b": value}} for "a.b"; `init_args` may be left out, as in jsonargparse's flags."""
    name, _, rest = key.partition(".")
    if "class_path" in settings and name not in ("class_path", "init_args", "dict_kwargs"):
        return {"init_args": _nested(key, settings.get("init_args") or {}, value)}
    below = settings.get(name)
    return {name: _nested(rest, below if isinstance(below, dict) else {}, value) if rest else value}


def _read(path: Path, including: Sequence[Path]) -> str:
    by = f", which {_shown(including[-1])} includes" if including else ""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"--config: there is no file '{_shown(path)}'{by}.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--config: '{_shown(path)}'{by} cannot be read: {reason}.") from error


def _parse(text: str, name: str) -> ConfigFile:
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        _check_nodes(root)
        settings = get_loader("yaml")(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{name} is not a configuration: {reason}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{name} is not valid YAML{line}: {' '.join(problem.split())}.") from error
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UserError(f"{name} is not a configuration: it holds {settings!r}, a mapping is expected.")
    nodes = dict(_nodes(root, ""))
    lines = {key: line for key, (line, _) in nodes.items()}
    return ConfigFile(
        name, settings, lines, {key: text for key, (_, text) in nodes.items() if text is not None}
    )


def _check_nodes(root: yaml.Node | None) -> None:
    """Refuses what YAML allows and no configuration means.

    Raises:
        ValueError: for a key that occurs twice, of which PyYAML silently takes the last, a key that is no text, and aliases
            that lead in a circle or multiply.
    """
    count = 0
    waiting: list[tuple[yaml.Node, frozenset[int]]] = [(root, frozenset())] if root is not None else []
    while waiting:
        node, above = waiting.pop()
        line = f"line {node.start_mark.line + 1}"
        count += 1
        if id(node) in above:
            raise ValueError(f"{line}: an alias leads back to what it is part of")
        if count > MAX_NODES or len(above) > MAX_NESTING:
            raise ValueError(
                f"{line}: with its aliases it has more than {MAX_NODES:,} values, or {MAX_NESTING} levels"
            )
        within = above | {id(node)}
        if isinstance(node, yaml.SequenceNode):
            waiting += [(value, within) for value in node.value]
        if isinstance(node, yaml.MappingNode):
            names = set[str]()
            for key, value in node.value:
                place = f"line {key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode) or key.tag not in _TEXT_TAGS:
                    raise ValueError(f"{place}: a key is no text; put it in quotes if it is a name")
                if key.value in names:
                    raise ValueError(
                        f"{place}: {key.value} is set a second time in the same mapping; remove one of the two"
                    )
                names.add(key.value)
                waiting.append((value, within))


def _nodes(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, tuple[int, str | None]]]:
    """Dotted key, line and text of all that a document sets, outer before inner."""
    inner = list[tuple[str, int, yaml.Node]]()
    if isinstance(node, yaml.MappingNode):
        inner = [(key.value, key.start_mark.line, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(str(index), value.start_mark.line, value) for index, value in enumerate(node.value)]
    for name, line, value in inner:
        text = value.value if isinstance(value, yaml.ScalarNode) else None
        yield f"{prefix}{name}", (line + 1, text)
        yield from _nodes(value, f"{prefix}{name}.")


def _shown(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _exact_yaml(settings: Settings) -> str:
    """YAML that jsonargparse reads as the same values: every scalar quoted and tagged, so that none is guessed again."""
    text: str = yaml.safe_dump(settings, default_style='"', sort_keys=False)
    return text
