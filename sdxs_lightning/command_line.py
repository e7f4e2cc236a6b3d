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
import importlib
import inspect
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import jsonargparse

from sdxs_lightning.command_options import Option, OptionField, fields_of
from sdxs_lightning.core.errors import RunStopped, UserError, first_line, is_out_of_memory, nearest

__all__ = ["Command", "Option", "parse_options", "run_command", "run_subcommand", "terminated_as_exit"]

Options = TypeVar("Options")
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


@contextmanager
def terminated_as_exit() -> Iterator[None]:
    """SIGTERM ends the block like an error, so that its temporary folders and its processes end too."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
            f"{program.rpartition('.')[2].split()[-1]}: '{given[0]}' is not a command{nearest(given[0], names)}; "
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
    fields = fields_of(options_class)
    parser = _parser(options_class, fields, program)
    namespace = parser.parse_args(_current_spelling(arguments, fields, program))
    values = {field.name: field.value(namespace[field.name]) for field in fields if field.name in namespace}
    try:
        return options_class(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


class _Parser(jsonargparse.ArgumentParser):
    """Raises one sentence where jsonargparse prints a usage and a message."""

    fields: Sequence[OptionField] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turns a message of jsonargparse into a sentence.

        Raises:
            UserError: always.
        """
        raise UserError(_sentence(message, self.fields, self.prog)) from ex


def _parser(options_class: type[Any], fields: Sequence[OptionField], program: str) -> _Parser:
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


def _current_spelling(arguments: Sequence[str], fields: Sequence[OptionField], program: str) -> list[str]:
    """The command line with underscores and today's names.

    Raises:
        UserError: for an option that does not exist, or one of several values that is given twice.
    """
    known = {field.spelling: field for field in fields if not field.option.positional}
    former = {old: field.spelling for field in fields for old in field.option.deprecated}
    spelled: list[str] = []
    given: set[str] = set()
    needs_value = False
    for index, argument in enumerate(arguments):
        if argument == "--":
            return [*spelled, *arguments[index:]]
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or name == "help":
            if needs_value and re.match(r"-(?!-|h$)", argument):
                spelled[-1] += f"={argument}"  # argparse would take -1e3 or -inf for another option
            else:
                spelled.append(argument)
            needs_value = False
            continue
        if name in former:
            sys.stderr.write(f"--{name} is now called --{former[name]}.\n")
        elif name not in known:
            hint = nearest(name, [*known, *former], "--")
            raise UserError(f"{argument.partition('=')[0]} is not an option{hint}; see `{program} --help`.")
        current = former.get(name, name)
        # The second would replace the first without a word.
        if known[current].many and current in given:
            raise UserError(f"--{current} is given twice; give it once, with all values: --{current} A B.")
        given.add(current)
        needs_value = not (equals or known[current].many or known[current].is_flag)
        spelled.append(f"--{current}{equals}{value}")
    return spelled


def _sentence(message: str, fields: Sequence[OptionField], program: str) -> str:
    """Condenses a message of jsonargparse to one sentence."""
    by_name = {name: field for field in fields for name in (field.name, field.label)}
    help_hint = f"see `{program} --help`"
    wrong = re.match(r'Parser key "([^"]+)"', message)
    given = re.search(r"(?:Got|Given) value: (.*)", message)
    if wrong and given and wrong[1] in by_name:
        field = by_name[wrong[1]]
        return (
            f"{field.label} is '{given[1]}', but must be {field.accepted}{nearest(given[1], field.choices)}."
        )
    needed = re.match(r"the following arguments are required: (.+)", message)
    if needed:
        names = [by_name[one].label if one in by_name else one for one in needed[1].split(", ")]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} required; {help_hint}."
    valueless = re.match(r"argument ([^:]+): expected (?:at least )?one argument", message)
    if valueless and valueless[1] in by_name:
        field = by_name[valueless[1]]
        return f"{field.label} needs a value, {field.accepted}."
    valued = re.match(r"argument (?:-h/)?([^:]+): ignored explicit argument '(.*)'", message, re.DOTALL)
    if valued:
        return f"{valued[1]} takes no value, got '{valued[2]}'."
    surplus = re.match(r"unrecognized arguments: (.+)", message, re.DOTALL)
    if surplus:
        return f"unexpected argument '{surplus[1]}'; {help_hint}."
    return " ".join(message.split())


def _with_options(message: str, options_class: type[Any]) -> str:
    """A message of the library with the command's options in place of the arguments and configuration keys in it."""
    spelled: dict[str, str] = {}
    for field in fields_of(options_class):
        for called in (f"`{field.name}`", f"data.{field.name}", *field.option.called):
            spelled[called if "." in called else f"`{called.strip('`')}`"] = field.label
    names = "|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))
    # A part of an option's class (data.condition.init_args.model) is given with it; other parts are none of the option.
    mentioned = rf"(?<![\w./])({names})(?:\.init_args(?:\.\w+)*)?(?![\w/]|\.\w)"
    return re.sub(mentioned, lambda found: spelled[found[1]], message)


def _too_large(error: Exception, options_class: type[Any]) -> str:
    given = [field.label for field in fields_of(options_class) if field.name in MEMORY_OPTIONS]
    smaller = f"; give a smaller {' or '.join(given)}" if given else ""
    return f"this machine has not enough memory for it ({first_line(error)}){smaller}."


def _summary(options_class: type[Any]) -> str:
    return inspect.cleandoc(options_class.__doc__ or "")


def _examples(options_class: type[Any]) -> str:
    examples = inspect.cleandoc(getattr(options_class, "EXAMPLES", ""))
    return f"examples:\n{textwrap.indent(examples, '  ')}" if examples else ""


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
