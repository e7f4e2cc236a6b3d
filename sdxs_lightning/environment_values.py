"""Settings that come from the environment (`${oc.env:NAME}`) are printed and saved as they were written, never as their values.

A token or a path of one machine then ends neither in a run's config.yaml nor in its checkpoints, and a saved configuration
takes the values of the machine that it is started on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import yaml
from jsonargparse import Namespace
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from sdxs_lightning.config_files import MergedArguments, Settings, merge

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_HIDDEN_LENGTH = 4
"""A shorter value would be replaced in the middle of words."""

Place = tuple[str, ...]
"""Path of a setting without `init_args`, which flags may leave out. `callbacks+`, a list that starts the parser's own, is
`callbacks`."""


class EnvironmentValues:
    """The settings of a command line whose value depends on environment variables, directly or through other settings.

    Args:
        command_line: merged, unresolved.
    """

    def __init__(self, command_line: MergedArguments) -> None:
        self._written: dict[Place, tuple[str, str]] = {}
        self._secrets: dict[str, str] = {}
        settings = command_line.settings
        for name, value in _flags(command_line.arguments):
            settings = merge(settings, _nested(name.split("."), value, settings), command_line.trust)
        used: list[str] = []

        def recorded(name: str, *default: Any) -> Any:
            used.append(name)
            return oc.env(name, *default)

        if "${" not in str(settings):
            return
        OmegaConf.register_resolver("oc.env", recorded, replace=True)
        try:
            for place, text, value in _resolved(OmegaConf.create(settings), (), used):
                self._written[place] = (text, value)
        except OmegaConfBaseException:  # the parser reports it
            pass
        finally:
            OmegaConf.register_resolver("oc.env", oc.env, replace=True)
        for name in filter(_SECRET.search, used):
            if len(value := os.environ.get(name, "")) >= _HIDDEN_LENGTH:
                self._secrets[value] = f"${{oc.env:{name}}}"

    def as_written(self, config: Namespace) -> Namespace:
        """A copy of a resolved configuration in which these settings are as they were written."""
        copy = config.clone()
        if self._written:
            self._restore(copy, ())
        return copy

    def hidden(self, text: str) -> str:
        """A message without the values of variables that are called a key, token, secret or password."""
        for value, written in self._secrets.items():
            text = text.replace(value, written)
        return text

    def _restore(self, node: Any, place: Place) -> None:
        entries: list[tuple[Any, Any]] = list(enumerate(node)) if isinstance(node, list) else []
        if not isinstance(node, list):
            entries = list((vars(node) if isinstance(node, Namespace) else node).items())
        for name, value in entries:
            here = _below(place, name)
            if isinstance(value, Namespace | dict | list):
                self._restore(value, here)
            elif here in self._written and _equal(value, self._written[here][1]):
                node[name] = self._written[here][0]


def _resolved(node: Any, place: Place, used: list[str]) -> Iterator[tuple[Place, str, str]]:
    """Place, text and value of every interpolation below a container that reads the environment."""
    for name in range(len(node)) if isinstance(node, ListConfig) else list(node):
        here = _below(place, name)
        text: Any = node._get_node(name)
        if not OmegaConf.is_interpolation(node, name):
            if isinstance(text, DictConfig | ListConfig) and not text._is_none():
                yield from _resolved(text, here, used)
            continue
        count = len(used)
        value = node[name]
        if isinstance(value, DictConfig | ListConfig):
            yield from _resolved(value, here, used)
        elif len(used) > count:
            yield here, str(text._value()), str(value)


def _below(place: Place, name: Any) -> Place:
    return place if name == "init_args" else (*place, str(name).removesuffix("+"))


def _flags(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each flag with an interpolation."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        value = value if equals else following
        if name.startswith("--") and name != "--config" and "${" in value:
            yield name[2:], value


def _nested(names: list[str], value: str, settings: Any) -> Settings:
    """{"a": {"init_args": {"b": value}}} for a.b, where a has a class."""
    name, *rest = names
    if isinstance(settings, dict) and "class_path" in settings and name not in ("class_path", "init_args"):
        return {"init_args": _nested(names, value, settings.get("init_args"))}
    below = settings.get(name) if isinstance(settings, dict) else None
    return {name: _nested(rest, value, below) if rest else _read(value)}


def _read(value: str) -> Any:
    """A flag's value: the mapping or list in it, or its text."""
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:  # "${oc.env:NAME}" alone is no YAML
        return value
    return read if isinstance(read, dict | list) else value


def _equal(value: Any, text: str) -> bool:
    """Whether a parsed value is that of the text; no flag has replaced it then."""
    if str(value) == text:
        return True
    try:
        return not isinstance(value, str) and float(value) == float(text)
    except (TypeError, ValueError):
        return str(value).lower() == text.lower()
