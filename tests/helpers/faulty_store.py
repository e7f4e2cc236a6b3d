"""A file system that fsspec knows as `faulty://`: a folder whose server fails at times, and at times answers too late."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

SLOW_SECONDS = 1.0


class FaultyStore(LocalFileSystem):
    """Every ninth request fails; every 61st is answered after `SLOW_SECONDS`."""

    protocol = "faulty"
    root = Path()
    requests = itertools.count(1)
    always = False
    """Whether every request that writes fails."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(cls.root / path.removeprefix("faulty://")) if path.startswith("faulty://") else path

    def _serve(self, writes: bool = False) -> None:
        number = next(self.requests)
        if number % 61 == 0:
            time.sleep(SLOW_SECONDS)
        if number % 9 == 0 or (self.always and writes):
            raise OSError("500 Internal Server Error")

    def ls(self, path: str, detail: bool = False, **more: Any) -> Any:
        self._serve()
        # One request, unlike the local file system's, which asks for each file.
        return [
            {
                "name": entry.path,
                "size": entry.stat().st_size,
                "type": "file" if entry.is_file() else "directory",
            }
            for entry in os.scandir(path)
        ]

    def info(self, path: str, **more: Any) -> Any:
        self._serve()
        return super().info(path, **more)

    def cat_file(self, path: str, *arguments: Any, **more: Any) -> Any:
        self._serve()
        return super().cat_file(path, *arguments, **more)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> Any:
        self._serve(writes=True)
        return super().pipe_file(path, value, mode=mode, **more)

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **more: Any) -> Any:
        self._serve(writes=True)
        return super().put_file(lpath, rpath, *arguments, **more)


def register(root: Path) -> None:
    """Makes `faulty://x` the folder `x` below a folder."""
    FaultyStore.root, FaultyStore.requests, FaultyStore.always = root, itertools.count(1), False
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
