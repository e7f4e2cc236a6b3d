"""Expected ways in which a run ends: each has a message for the user and its own exit code.

| exit code | meaning |
|---|---|
| 0 | finished |
| 1 | unexpected: a bug, shown with its traceback |
| 2 | the configuration or an input was rejected; nothing was trained |
| 3 | the training diverged (NaN or infinity); restarting it unchanged would not help |
| 4 | a checkpoint could not be written; the previous one is intact |
| 5 | a rank died or hung; the other ranks ended, and `--ckpt_path auto` resumes |
| 128 + signal (130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM) | interrupted after a checkpoint; `--ckpt_path auto` resumes |

The last row follows the convention of shells, so that a job script can requeue on 138 and 143.
"""

import difflib
import re
import signal as signals
from collections.abc import Iterable


def one_line(message: str) -> str:
    """A message as one line that any terminal shows: line breaks become a space, other control characters escapes.

    Messages quote names and values of files, and these hold anything: a line break in a column's name, a terminal's
    escape sequence in a key, half of a surrogate pair of a JSON string.
    """
    unbroken = " ".join(line.strip() for line in message.splitlines() if line.strip())
    visible = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", unbroken)
    return visible.encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank; the name of its type if there is none, as for `OSError()`."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: in Python or NumPy, on a GPU, or in torch on a CPU, which has no class of its own."""
    refused = ("not enough memory: you tried to allocate", "can't allocate memory: you tried to allocate")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in refused))
    )


class OneLineError(Exception):
    """An error whose message is one line, whatever it quotes."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class RunStopped(OneLineError):
    """Ends a run early with a message instead of a traceback.

    Raised on all ranks or on none: the callbacks that raise it agree first.
    """

    exit_code = 1


class UserError(RunStopped):
    """The configuration, a path or a file is invalid."""

    exit_code = 2


class TrainingDiverged(RunStopped):
    """A loss or a weight is NaN or infinite."""

    exit_code = 3


class CheckpointNotWritten(RunStopped):
    """The disk or quota is full, or the folder is not writable."""

    exit_code = 4


class RankLost(RunStopped):
    """A rank died, was killed, or no longer responds."""

    exit_code = 5


class Interrupted(RunStopped):
    """The run stopped at a step boundary after a signal.

    Args:
        message: for the user.
        signal_number: the signal received.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signals.Signals(signal_number)
        self.exit_code = 128 + int(signal_number)


def nearest(name: str, accepted: Iterable[str], dashes: str = "") -> str:
    """Words that end a message with the accepted name that was probably meant; empty if none is near."""
    near = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.6)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""
