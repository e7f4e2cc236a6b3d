"""Command lines from settings dataclasses: every option is a field, its docstring is the help.

    @dataclass(frozen=True, kw_only=True)
    class ResizeOptions:
        '''Resizes images.'''

        EXAMPLES: ClassVar[str] = "python -m resize --from photos/ --side_px 64"

        source: Annotated[str, Option(name="from")]
        '''Folder of the images.'''
        side_px: Annotated[int, Option(at_least=1)] = 512
        '''Side of the output, pixels.'''

    def main(arguments: Sequence[str] | None = None) -> None:
        run_command("python -m resize", ResizeOptions, "resize.command.run", arguments)

The implementation is named by its dotted path and imported after the options were accepted, so that `--help` and refused
options do not wait for torch; this module and the modules of the options classes must not import it either. Options are
spelled with underscores; hyphens are accepted. Every error ends with one sentence on stderr and the exit code of
`sdxs_lightning.core.errors`, 2 for refused options. Checks of several fields belong in `__post_init__`: the text of its
ValueError is the sentence. Messages of the library name arguments (in backticks) and configuration keys; the command shows
the options in their place.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import math
import re
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import docstring_parser
import jsonargparse

from sdxs_lightning.core.errors import RunStopped, UserError, first_line, is_out_of_memory

Options = TypeVar("Options")
LARGEST_NUMBER = 2**31 - 1
"""Of an option without a bound of its own; larger ones are typing errors, and overflow what takes them."""
MEMORY_OPTIONS = (
    "batch_size",
    "batch_sizes",
    "size",
    "size_px",
    "image_px",
    "check_size_px",
    "resolution",
    "processes",
)
"""What the memory of a command grows with."""


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


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand of a program."""

    name: str
    options: str
    """Dotted path of its options dataclass, whose docstring begins with the summary."""
    run: str
    """Dotted path of its implementation, as for `run_command`."""


def run_command(
    program: str,
    options_class: type[Options],
    run: str | Callable[[Options], str | None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Parses a command line, runs the command and prints what it returns; errors end the process with their exit code.

    Args:
        program: how the command is called, "python -m evaluation.evaluate".
        options_class: a frozen dataclass.
        run: takes an instance of it; its dotted path where importing it is slow.
        arguments: the command line; None takes that of the process.
    """
    name = program.removeprefix("python -m ").rpartition(".")[2]
    try:
        options = parse_options(options_class, sys.argv[1:] if arguments is None else arguments, program)
        command = _imported(run) if isinstance(run, str) else run
        result = command(options)
    except RunStopped as stop:
        sys.stderr.write(f"{name}: {_with_options(str(stop), options_class)}\n")
        sys.exit(stop.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"{name}: {_too_large(error, options_class)}\n")
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted.\n")
        sys.exit(128 + signal.SIGINT)
    if result:
        sys.stdout.write(f"{result}\n")


def run_subcommand(
    program: str, description: str, commands: Sequence[Command], arguments: Sequence[str] | None = None
) -> None:
    """Runs the subcommand that the first argument names; without arguments, or with --help, lists them.

    Args:
        program: how the program is called, "python -m data.prepare".
        description: of the program.
        commands: what it knows.
        arguments: the command line; None takes that of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        width = max(len(command.name) for command in commands)
        lines = [
            f"  {command.name:<{width}}  {_summary(_imported(command.options)).splitlines()[0]}"
            for command in commands
        ]
        listed = "\n".join(lines)
        sys.stdout.write(
            f"usage: {program} COMMAND ...\n\n{description}\n\ncommands:\n{listed}\n\n"
            f"`{program} COMMAND --help` lists the options of a command.\n"
        )
        return
    chosen = next((command for command in commands if command.name == given[0]), None)
    if chosen is None:
        names = [command.name for command in commands]
        sys.stderr.write(
            f"{program.rpartition('.')[2].split()[-1]}: '{given[0]}' is not a command{_nearest(given[0], names)}; "
            f"accepted are {', '.join(names)}.\n"
        )
        sys.exit(UserError.exit_code)
    run_command(f"{program} {chosen.name}", _imported(chosen.options), chosen.run, given[1:])


def parse_options(
    options_class: type[Options], arguments: Sequence[str], program: str = "COMMAND"
) -> Options:
    """The settings that a command line gives; prints the help and exits where it asks for it.

    Args:
        options_class: a frozen dataclass.
        arguments: the command line without the program.
        program: named by the help and by errors.

    Raises:
        UserError: for a command line that is not accepted.
    """
    fields = _fields(options_class)
    parser = _parser(options_class, fields, program)
    namespace = parser.parse_args(_current_spelling(arguments, fields, program))
    values = {field.name: field.value(namespace[field.name]) for field in fields if field.name in namespace}
    try:
        return options_class(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


class _Field:
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
            hint = _nearest(str(given), self.choices)
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
        if self.type is bool and self.default is False:
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


class _Parser(jsonargparse.ArgumentParser):
    """Raises one sentence where jsonargparse prints a usage and a message."""

    fields: Sequence[_Field] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turns a message of jsonargparse into a sentence.

        Raises:
            UserError: always.
        """
        raise UserError(_sentence(message, self.fields, self.prog)) from ex


def _parser(options_class: type[Any], fields: Sequence[_Field], program: str) -> _Parser:
    parser = _Parser(
        prog=program,
        description=_summary(options_class),
        epilog=_examples(options_class),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.fields = fields
    for field in fields:
        field.add_to(parser)
    return parser


def _fields(options_class: type[Any]) -> list[_Field]:
    """Required ones first; those of the class itself before those of its bases."""
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
    options = [_Field(field, hints[field.name], texts[field.name]) for field in ordered]
    return sorted(options, key=lambda one: not one.required)


def _current_spelling(arguments: Sequence[str], fields: Sequence[_Field], program: str) -> list[str]:
    """The command line with underscores and today's names.

    Raises:
        UserError: for an option that does not exist.
    """
    known = {field.spelling: field.spelling for field in fields if not field.option.positional}
    former = {old: field.spelling for field in fields for old in field.option.deprecated}
    spelled: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return [*spelled, *arguments[index:]]
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or name == "help":
            spelled.append(argument)
            continue
        if name in former:
            sys.stderr.write(f"--{name} is now called --{former[name]}.\n")
        elif name not in known:
            hint = _nearest(name, [*known, *former], "--")
            raise UserError(f"{argument.partition('=')[0]} is not an option{hint}; see `{program} --help`.")
        spelled.append(f"--{former.get(name, name)}{equals}{value}")
    return spelled


def _sentence(message: str, fields: Sequence[_Field], program: str) -> str:
    """Condenses a message of jsonargparse to one sentence."""
    by_name = {name: field for field in fields for name in (field.name, field.label)}
    help_hint = f"see `{program} --help`"
    wrong = re.match(r'Parser key "([^"]+)"', message)
    given = re.search(r"(?:Got|Given) value: (.*)", message)
    if wrong and given and wrong[1] in by_name:
        field = by_name[wrong[1]]
        return (
            f"{field.label} is '{given[1]}', but must be {field.accepted}{_nearest(given[1], field.choices)}."
        )
    needed = re.match(r"the following arguments are required: (.+)", message)
    if needed:
        names = [by_name[one].label if one in by_name else one for one in needed[1].split(", ")]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} required; {help_hint}."
    valueless = re.match(r"argument ([^:]+): expected (?:at least )?one argument", message)
    if valueless and valueless[1] in by_name:
        field = by_name[valueless[1]]
        return f"{field.label} needs a value, {field.accepted}."
    surplus = re.match(r"unrecognized arguments: (.+)", message, re.DOTALL)
    if surplus:
        return f"unexpected argument '{surplus[1]}'; {help_hint}."
    return " ".join(message.split())


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type of a value that is given, without None and Annotated, and what Annotated says of it."""
    if get_origin(hint) is Annotated:
        bare, inner = _bare(get_args(hint)[0])
        return bare, (*get_args(hint)[1:], *inner)
    if get_origin(hint) in (Union, types.UnionType):
        return _bare(next(one for one in get_args(hint) if one is not types.NoneType))
    return hint, ()


def _with_options(message: str, options_class: type[Any]) -> str:
    """A message of the library with the command's options in place of the arguments and configuration keys in it."""
    spelled: dict[str, str] = {}
    for field in _fields(options_class):
        for called in (f"`{field.name}`", f"data.{field.name}", *field.option.called):
            spelled[called if "." in called else f"`{called.strip('`')}`"] = field.label
    names = "|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))
    # A part of an option's class (data.condition.init_args.model) is given with it; other parts are none of the option.
    mentioned = rf"(?<![\w./])({names})(?:\.init_args(?:\.\w+)*)?(?![\w/]|\.\w)"
    return re.sub(mentioned, lambda found: spelled[found[1]], message)


def _too_large(error: Exception, options_class: type[Any]) -> str:
    given = [field.label for field in _fields(options_class) if field.name in MEMORY_OPTIONS]
    smaller = f"; give a smaller {' or '.join(given)}" if given else ""
    return f"this machine has not enough memory for it ({first_line(error)}){smaller}."


def _summary(options_class: type[Any]) -> str:
    return inspect.cleandoc(options_class.__doc__ or "")


def _examples(options_class: type[Any]) -> str:
    examples = inspect.cleandoc(getattr(options_class, "EXAMPLES", ""))
    return f"examples:\n{textwrap.indent(examples, '  ')}" if examples else ""


def _as_typed(value: Any) -> str:
    """A default as it would be typed."""
    return " ".join(map(str, value)) if type(value) in (tuple, list) else str(value)


def _nearest(name: str, accepted: Sequence[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(name, accepted, n=1, cutoff=0.6)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
