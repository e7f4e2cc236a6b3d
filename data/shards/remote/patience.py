"""How long a remote shard is waited for: a time limit for each answer, and pauses between tries over minutes."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from data.shards.tar_headers import BrokenShardError

_log = logging.getLogger(__name__)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 30.0
_PASSING_STATUS = (408, 425, 429)
"""Answers of the 400s that another try may change: time-out, too early, too many requests."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Patience:
    """Limits of waiting for remote shards.

    Raises:
        ValueError: for a limit out of range.
    """

    timeout_s: float = 30.0
    """Seconds for one answer of the server; one that takes longer counts as a failure."""
    retry_s: float = 600.0
    """Seconds over which failures are retried before the shard counts as unreadable; 0 tries once."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(
                f"data.remote_timeout_s is {self.timeout_s}, but it must be a number of seconds above 0."
            )
        if not self.retry_s >= 0:
            raise ValueError(
                f"data.remote_retry_s is {self.retry_s}, but it must be a number of seconds, 0 or more."
            )

    def call(self, ask: Callable[[], _T], location: str) -> _T:
        """`retry` of calls that take at most `timeout_s` each."""
        return self.retry(lambda: self.answer(ask), location)

    def retry(self, ask: Callable[[], _T], location: str) -> _T:
        """Calls until it succeeds; each wait is logged with its reason.

        Args:
            ask: may be called several times.
            location: of the shard, for messages.

        Raises:
            FileNotFoundError, PermissionError, BrokenShardError: at once, as they came, if there is no such file.
            OSError: for an answer that no other try changes (such as 401), or when the time is over.
        """
        end = time.monotonic() + self.retry_s
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return ask()
            except (PermissionError, BrokenShardError):
                raise
            except Exception as error:  # file system packages define their own exceptions
                if _is_missing(error):
                    raise
                left = end - time.monotonic()
                wait = max(pause, _retry_after(error))
                if not _may_pass(error) or wait > left:
                    raise OSError(f"'{location}' cannot be read ({_reason(error)}).") from error
                _log.warning(
                    "'%s' cannot be read (%s); next try in %.1f s, for at most %.0f s more (remote_retry_s).",
                    location,
                    _reason(error),
                    wait,
                    left,
                )
                time.sleep(wait)
                pause = min(4 * pause, _LONGEST_PAUSE_SECONDS)

    def answer(self, ask: Callable[[], _T]) -> _T:
        """Calls once, for at most `timeout_s`.

        In a thread, because each file system package has its own time-outs, or none; a call that never returns leaves its
        thread behind.

        Raises:
            OSError: if no answer came in time.
            Exception: of the call.
        """
        results: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put((ask(), None))
            except BaseException as error:
                results.put((None, error))

        threading.Thread(target=run, daemon=True).start()
        try:
            value, error = results.get(timeout=self.timeout_s)
        except queue.Empty:
            raise OSError(f"no answer within {self.timeout_s:g} s, data.remote_timeout_s") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # None where the call returns None


def _is_missing(error: Exception) -> bool:
    """Whether there is no such file; fsspec raises FileNotFoundError from every failure of an HTTP server's HEAD."""
    missing = isinstance(error, FileNotFoundError)
    return missing and (error.__cause__ is None or http_status(error.__cause__) in (404, 410))


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def http_status(error: BaseException) -> int | None:
    """HTTP status of an error of aiohttp (`status`) or botocore (`response`), or of its cause.

    None for an answer that is no HTTP, to which aiohttp gives status 400 (and the parser's error as cause).
    """
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
    status = getattr(error, "status", None) if error.__cause__ is None else None
    for found in (status, metadata.get("HTTPStatusCode")):
        if isinstance(found, int):
            return found
    return http_status(error.__cause__) if error.__cause__ is not None else None


def _may_pass(error: BaseException) -> bool:
    status = http_status(error)
    return status is None or not 400 <= status < 500 or status in _PASSING_STATUS


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait, as a number or a date, at most an hour; 0 if it does not say."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
    for headers in (getattr(error, "headers", None), metadata.get("HTTPHeaders")):
        value: Any = headers.get("Retry-After", headers.get("retry-after")) if headers else None
        if value is not None and (seconds := _seconds(str(value))) is not None:
            return min(max(seconds, 0.0), 3600.0)
    return _retry_after(error.__cause__) if error.__cause__ is not None else 0.0


def _seconds(text: str) -> float | None:
    if text.isdigit():
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None
