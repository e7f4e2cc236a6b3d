"""Generated images saved in the layout of other benchmarks.

| layout | files | read by |
|---|---|---|
| `flat` | `000000.png`, or the name in the prompt file; the caption in a .txt file beside it | `--images`, DPG-Bench |
| `geneval` | `00000/metadata.jsonl`, `00000/samples/00000.png` | GenEval's evaluation/evaluate_images.py |
| `t2i_compbench` | `samples/PROMPT_000000.png` | T2I-CompBench |

DPG-Bench reads one image per prompt, named after the prompt's file: give its folder of .txt prompts as --captions.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from sdxs_lightning.core.errors import UserError

ImageLayout = Literal["flat", "geneval", "t2i_compbench"]
MANIFEST = "images.json"


@dataclass(frozen=True)
class SavedImages:
    """A folder of images whose names depend on number and prompt alone, so that an interrupted run can resume."""

    folder: str
    prompts: tuple[str, ...]
    names: tuple[str, ...] | None = None
    """Names from the prompt file, for `flat`."""
    records: tuple[Mapping[str, Any], ...] | None = None
    """Rows of the prompt file, for GenEval's metadata."""
    layout: ImageLayout = "flat"

    def path(self, number: int) -> Path:
        """Path of an image."""
        folder = Path(self.folder)
        if self.layout == "geneval":
            return folder / f"{number:05d}" / "samples" / "00000.png"
        if self.layout == "t2i_compbench":
            return folder / "samples" / f"{_file_name(self.prompts[number])}_{number:06d}.png"
        return folder / f"{f'{number:06d}' if self.names is None else self.names[number]}.png"

    def begin(self, origin: Mapping[str, Any]) -> None:
        """Create the folder, or check that its images have the same origin.

        Raises:
            UserError: for a folder with other content, or duplicate names.
        """
        folder, described = Path(self.folder), json.loads(json.dumps({**origin, "layout": self.layout}))
        paths = [self.path(number) for number in range(len(self.prompts))]
        if len(set(paths)) < len(paths) or any(
            folder.resolve() not in path.resolve().parents for path in paths
        ):
            raise UserError(
                "--save_images: the names in the prompt file repeat, or lead out of the folder; give a file without names."
            )
        manifest = folder / MANIFEST
        if manifest.is_file():
            stored = json.loads(manifest.read_text())
            changed = sorted(key for key in {*stored, *described} if stored.get(key) != described.get(key))
            if changed:
                raise UserError(
                    f"--save_images '{folder}' holds images that were made otherwise ({', '.join(changed)}); give "
                    "another folder."
                )
            return
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"--save_images '{folder}' holds other files; give an empty folder, or one that does not exist."
            )
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps(described, indent=2) + "\n")

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether all of these images exist."""
        return all(self.path(number).is_file() for number in numbers)

    def write(self, number: int, image: Image.Image) -> None:
        """Write an image atomically, after its caption."""
        path = self.path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.layout == "geneval":
            record = {} if self.records is None else dict(self.records[number])
            _write(
                path.parent.parent / "metadata.jsonl",
                json.dumps({**record, "prompt": self.prompts[number]}) + "\n",
            )
        elif self.layout == "flat":
            _write(path.with_suffix(".txt"), self.prompts[number] + "\n")
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".", suffix=".partial", delete=False
        ) as file:
            image.save(file, format="PNG")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Read saved images.

        Raises:
            UserError: for one that cannot be read, as a machine that lost its power leaves it.
        """
        images = []
        for number in numbers:
            path = self.path(number)
            try:
                with Image.open(path, formats=("PNG",)) as opened:
                    images.append(opened.convert("RGB"))
            except (OSError, SyntaxError) as error:  # Pillow raises the latter for a broken chunk of a PNG
                raise UserError(
                    f"--save_images: '{path}' cannot be read ({error}); remove it, and it is made again."
                ) from error
        return images


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _file_name(prompt: str) -> str:
    """A prompt as part of a file name; T2I-CompBench reads the prompt from the part before the last underscore."""
    return prompt.replace("/", " ").replace("\0", " ").encode()[:200].decode(errors="ignore")
