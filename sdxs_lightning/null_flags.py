"""Flags that set something to null, as `--model.init_args.student.init_args.weights=null`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def nulls_as_configs(arguments: Sequence[str]) -> list[str]:
    """Turns every `--a.b=null` and `--a.b null` into `--config={"a": {"b": null}}`, in its place.

    jsonargparse (4.53) reads null for a `str | None` two classes deep as the string "None"; in a config it reads it well.
    """
    rewritten, rest = list[str](), list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if "." not in name or not name.startswith("--"):
            rewritten.append(argument)
        elif equals and value == "null":
            rewritten.append(_config(name))
        elif not equals and rest[:1] == ["null"]:
            rest.pop(0)
            rewritten.append(_config(name))
        else:
            rewritten.append(argument)
    return rewritten


def _config(name: str) -> str:
    nested: Any = None
    for key in reversed(name.removeprefix("--").split(".")):
        nested = {key: nested}
    return f"--config={json.dumps(nested)}"
