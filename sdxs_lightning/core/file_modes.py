"""Who may read the files that are written."""

import stat
from pathlib import Path


def apply_umask(folder: Path) -> None:
    """Gives every file below a folder the mode of a file that is created now, and keeps what may be executed.

    safetensors (0.8) writes through a temporary file and leaves its mode, 0600: nobody else on a cluster could load an
    export.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode | stat.S_IMODE(path.stat().st_mode) & 0o111)
