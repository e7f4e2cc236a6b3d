"""What a configuration may run: which `class_path` is imported unasked, and whether `pipe:` commands run.

A dotted path in a configuration is imported, and a shard location `pipe:COMMAND` is a shell command. Paths below `TRUSTED`, and
below what `--trust` names, are allowed; jsonargparse enforces it for each import that a value causes. Nothing in a file can
widen it, since `--trust` is an option of the command line only. Imported before torch: keep it light.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdxs_lightning.core.errors import UserError

TRUSTED = ("torch", "lightning", "sdxs_lightning", "data", "evaluation")
"""Packages whose classes a configuration names without `--trust`."""
CODE_LOADERS = (
    "torch.hub",
    "torch.load",
    "torch.save",
    "torch.serialization",
    "torch.jit",
    "torch.package",
    "torch.export",
    "torch.ops",
    "torch.classes",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torch.utils.collect_env",
    "torch.multiprocessing",
    "torch.distributed.elastic",
    "torch.distributed.launch",
    "torch.distributed.launcher",
    "torch.distributed.run",
    "torch.testing",
    "torch.compiler",
    "torch._dynamo",
    "torch._inductor",
    "lightning.app",
    "lightning.pytorch.cli",
    "lightning.fabric.cli",
    "lightning.fabric.utilities.cloud_io",
)
"""Parts of trusted packages that fetch, unpickle or compile code, or start programs: a path below them needs `--trust` too."""
PIPE = "pipe:"
FLAG = "--trust"


@dataclass(frozen=True)
class Trust:
    """What the command line allows beside `TRUSTED`."""

    named: tuple[str, ...] = ()
    """Modules and packages by dotted name, and `pipe:`."""

    @classmethod
    def of(cls, values: Iterable[str]) -> Trust:
        """Trust in the values of `--trust`, each one name or several with commas between.

        Raises:
            UserError: for a value that names no module.
        """
        names = [name.strip() for value in values for name in value.split(",")]
        for name in names:
            known = name == PIPE or all(part.isidentifier() for part in name.split("."))
            if not known or name.partition(".")[0] == "jsonargparse":
                raise UserError(
                    f"{FLAG} is '{name}', but must be the dotted name of a module or package of yours, such as my_package, or "
                    f"{PIPE} for shard locations that are commands."
                )
        return cls(tuple(names))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Dotted prefixes of what may be imported."""
        return (*TRUSTED, *(name for name in self.named if name != PIPE))

    def allows(self, path: str) -> bool:
        """Whether an object with this dotted path may be imported; of several prefixes the longest decides."""
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            prefix = ".".join(parts[:count])
            if prefix in self.prefixes:
                return True
            if prefix in CODE_LOADERS:
                return False
        return False

    def check_locations(self, locations: Iterable[str]) -> None:
        """Refuses shard locations that are commands.

        Raises:
            UserError: unless `pipe:` is trusted.
        """
        command = next((one for one in locations if one.strip().startswith(PIPE)), None)
        if command is not None and PIPE not in self.named:
            raise UserError(f"the shards '{command}' are a shell command; to let it run, add {FLAG} {PIPE}")


def split_arguments(arguments: Sequence[str]) -> tuple[Trust, list[str]]:
    """The trust that a command line states, and the command line without it.

    Raises:
        UserError: for `--trust` without a value, or with one that names no module.
    """
    values, others = list[str](), list[str]()
    waiting = list(arguments)
    while waiting:
        name, equals, value = (argument := waiting.pop(0)).partition("=")
        if name != FLAG:
            others.append(argument)
        elif equals or (waiting and not waiting[0].startswith("-")):
            values.append(value if equals else waiting.pop(0))
        else:
            raise UserError(f"{FLAG} needs a value, the name of a module or package of yours, or {PIPE}.")
    return Trust.of(values), others


def class_paths(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value of each `class_path` below a mapping or list."""
    if isinstance(settings, dict | list):
        entries = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for name, value in entries:
            here = f"{key}.{name}" if key else str(name)
            # Without a dot it is the name of a class that is known already.
            if name == "class_path" and isinstance(value, str) and "." in value and "${" not in value:
                yield here, value
            yield from class_paths(value, here)


def texts(settings: Any) -> Iterator[str]:
    """Each string below a mapping or list."""
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, dict | list | tuple):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from texts(value)


def refusal(path: str, key: str = "", place: str | None = None) -> str:
    """The sentence for an import that is not allowed.

    Args:
        path: dotted path of what would be imported.
        key: dotted key of the setting.
        place: where it was set, as "in FILE, line N".
    """
    what = f"{key} is '{path}'" if key else f"'{path}' is named"
    where = f" (set {place})" if place else ""
    prefix = path if any(f"{path}.".startswith(f"{one}.") for one in CODE_LOADERS) else path.partition(".")[0]
    return (
        f"{what}{where}, which is not imported unasked: it is outside {', '.join(TRUSTED)}, or a part of them that loads code. "
        f"If you trust what it runs, add {FLAG} {prefix}"
    )
