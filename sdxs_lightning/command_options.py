"""Options of a command as fields of a dataclass: types, bounds, help and the checks of what is given."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import docstring_parser
import jsonargparse

from sdxs_lightning.core.errors import UserError, nearest

LARGEST_NUMBER = 2**31 - 1
"""Of an option without a bound of its own; larger ones are typing errors, and overflow what takes them."""


@dataclasses.dataclass(frozen=True)
class Option:
    """Metadata of an option in its field's annotation: `Annotated[int, Option(at_least=1)]`."""

    name: str | None = None
    """Spelling without the dashes, where it cannot be the field's name (`from`)."""
    deprecated: tuple[str, ...] = ()
    """Former names; accepted with a note on stderr."""
    metavar: str | None = None
    """Stands for the value in the help; None derives it from the type."""
    positional: bool = False
    """An argument without a name."""
    const: Any = None
    """The value of an option that is given without one, () for an option of several values; None requires a value."""
    at_least: float | None = None
    at_most: float | None = None
    """None: LARGEST_NUMBER."""
    called: tuple[str, ...] = ()
    """Arguments and configuration keys that mean it in messages of the library, beside its own name."""
    choices: Sequence[str] = ()
    """Accepted strings, where they are not a Literal."""
    parse: Callable[[str], Any] | None = None
    """Makes the value of a string; the text of its ValueError follows "--option is 'value', but "."""


class OptionField:
    """A field of an options class as an option."""

    def __init__(self, field: dataclasses.Field[Any], hint: Any, help_text: str) -> None:
        self.name, self.help = field.name, help_text
        hint, annotated = _bare(hint)
        self.option = next((one for one in annotated if isinstance(one, Option)), Option())
        self.default = field.default
        if field.default_factory is not dataclasses.MISSING:
            self.default = field.default_factory()
        self.required = self.default is dataclasses.MISSING
        # `tuple[int, int]` is one value, which `parse` makes; list[X] and tuple[X, ...] are several.
        self.many = get_origin(hint) is list or (get_origin(hint) is tuple and get_args(hint)[1:] == (...,))
        self.collection = get_origin(hint) if self.many else None
        self.type = get_args(hint)[0] if self.many else hint
        if self.option.parse is not None:
            self.type = str
        self.spelling = self.option.name or field.name
        self.label = self.metavar if self.option.positional else f"--{self.spelling}"

    @property
    def is_flag(self) -> bool:
        """Whether it is given without a value."""
        return self.type is bool and self.default is False

    @property
    def choices(self) -> tuple[str, ...]:
        """Accepted values of an enumeration."""
        if get_origin(self.type) is Literal:
            return tuple(str(one) for one in get_args(self.type))
        return tuple(self.option.choices)

    @property
    def metavar(self) -> str:
        """Stands for a value in the help."""
        if self.option.metavar:
            return self.option.metavar
        if self.option.positional:
            return self.spelling.upper()
        if self.choices:
            joined = f"{{{','.join(self.choices)}}}"
            return joined if len(joined) <= 40 else "NAME"
        return {int: "INT", float: "FLOAT", Path: "PATH", bool: "BOOL"}.get(self.type, "TEXT")

    @property
    def accepted(self) -> str:
        """Accepted values, for error messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kinds = {int: "an integer", float: "a number", Path: "a path", bool: "true or false"}
        kind = kinds.get(self.type, "text") if self.option.parse is None else self.metavar
        bounds = {"of at least": self.option.at_least, "of at most": self.option.at_most}
        if None not in bounds.values():
            return f"{kind} from {self.option.at_least} to {self.option.at_most}"
        limits = [f"{words} {limit}" for words, limit in bounds.items() if limit is not None]
        return " ".join([kind, *limits])

    def value(self, given: Any) -> Any:
        """Converts a value parsed by jsonargparse to the field's type, checked."""
        if given is None or given == self.option.const:
            return given
        if self.many and self.collection is not None:
            return self.collection(self._checked(one) for one in given)
        return self._checked(given)

    def _checked(self, given: Any) -> Any:
        if self.option.parse is not None:
            try:
                return self.option.parse(given)
            except ValueError as error:
                raise UserError(f"{self.label} is '{given}', but {error}.") from error
        right = not self.choices or str(given) in self.choices
        if isinstance(given, int | float) and not isinstance(given, bool):
            least, most = self.option.at_least, self.option.at_most
            if (least is None or given >= least) and most is None and abs(given) > LARGEST_NUMBER:
                sign = "at most " if given > 0 else "at least -"
                raise UserError(
                    f"{self.label} is '{given}', but must be {self.accepted}, {sign}{LARGEST_NUMBER}."
                )
            right = (
                math.isfinite(given) and (least is None or given >= least) and (most is None or given <= most)
            )
        if not right:
            hint = nearest(str(given), self.choices)
            raise UserError(f"{self.label} is '{given}', but must be {self.accepted}{hint}.")
        return given

    def add_to(self, parser: jsonargparse.ArgumentParser) -> None:
        """Declares it."""
        shown = self.help.replace("%", "%%")
        if self.choices and self.metavar == "NAME":
            shown += f" One of {', '.join(self.choices)}."
        if self.required:
            shown += " (required)" if not self.option.positional else ""
        elif self.default is not None and self.default is not False and self.default != ():
            shown += f" (default: {_as_typed(self.default)})"
        if self.is_flag:
            parser.add_argument(
                f"--{self.spelling}",
                dest=self.name,
                action="store_true",
                default=argparse.SUPPRESS,
                help=shown,
            )
            return
        keywords: dict[str, Any] = {"type": self.type, "help": shown, "metavar": self.metavar}
        if self.many:
            no_value = self.option.const is not None or (self.option.positional and not self.required)
            keywords["nargs"] = "*" if no_value else "+"
        elif self.option.const is not None:
            keywords |= {"nargs": "?", "const": self.option.const}
        if self.option.positional:
            parser.add_argument(self.name, **keywords)
        else:
            keywords |= {"dest": self.name, "required": self.required, "default": argparse.SUPPRESS}
            parser.add_argument(f"--{self.spelling}", **keywords)


def fields_of(options_class: type[Any]) -> list[OptionField]:
    """The options of a class, required ones first; those of the class itself before those of its bases."""
    texts: dict[str, str] = {}
    order: dict[str, int] = {}
    for depth, base in enumerate(options_class.__mro__[:-1]):
        for name in inspect.get_annotations(base):
            order.setdefault(name, depth)
        for parameter in docstring_parser.parse_from_object(base).params:
            texts.setdefault(parameter.arg_name, " ".join((parameter.description or "").split()))
    hints = typing.get_type_hints(options_class, include_extras=True)
    fields = dataclasses.fields(options_class)
    missing = [field.name for field in fields if not texts.get(field.name)]
    assert not missing, f"{options_class.__name__}: no docstring under {', '.join(missing)}"
    ordered = sorted(fields, key=lambda field: order[field.name])
    options = [OptionField(field, hints[field.name], texts[field.name]) for field in ordered]
    return sorted(options, key=lambda one: not one.required)


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type of a value that is given, without None and Annotated, and what Annotated says of it."""
    if get_origin(hint) is Annotated:
        bare, inner = _bare(get_args(hint)[0])
        return bare, (*get_args(hint)[1:], *inner)
    if get_origin(hint) in (Union, types.UnionType):
        return _bare(next(one for one in get_args(hint) if one is not types.NoneType))
    return hint, ()


def _as_typed(value: Any) -> str:
    """A default as it would be typed."""
    return " ".join(map(str, value)) if type(value) in (tuple, list) else str(value)
