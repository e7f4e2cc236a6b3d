"""Exports can be read by those whom the umask lets read."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxs_lightning.export import new_folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_an_exported_folder_is_readable_by_whom_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "export") as written:
            (written / "unet").mkdir(parents=True)
            save_file({"a": torch.zeros(1)}, written / "unet" / "weights.safetensors")
            (written / "config.json").write_text("{}")
            (written / "start.sh").write_text("")
            (written / "start.sh").chmod(0o700)
    finally:
        os.umask(before)
    files = [one for one in (tmp_path / "export").rglob("*") if one.is_file()]
    found = {one.name: one.stat().st_mode & 0o777 for one in files}
    assert found == {"weights.safetensors": mode, "config.json": mode, "start.sh": mode | 0o100}
