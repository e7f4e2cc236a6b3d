"""Makes data/FAULTS.md: each kind of damage is given to the reader and to the commands, and what they do is written down.

python -m tests.helpers.fault_table     # writes the table anew
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import struct
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from data.prepare.__main__ import main as prepare
from data.shards.datamodule import ShardDataModule
from data.shards.faults import Faults
from sdxs_lightning.core.errors import UserError

TABLE = Path(__file__).resolve().parents[2] / "data" / "FAULTS.md"
HEAD = """# What happens to damaged data

Written by `python -m tests.helpers.fault_table` and checked by `tests/data/test_fault_table.py`: of six samples one is
damaged, or their tar is. Names are those of the shard and of the sample's key; "counted" is in the run's
`quarantine.jsonl` (`data.faults.budget` allows so many, one more stops the run with exit code 2).

| input | training | training with `data.faults` | `prepare verify --contents ...` | `prepare images` |
|---|---|---|---|---|
"""
FIELDS = {"original_height": 8, "original_width": 8, "crop_top": 0, "crop_left": 0, "noise_seed": 5}
BAD = "000004"
Members = dict[str, bytes]
Change = Callable[[list[tuple[str, Members]]], Any]


def _image(kind: str = "PNG", size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def _latents(shape: tuple[int, ...] = (4, 2, 2), value: float = 1.0, dtype: type = np.float16) -> bytes:
    return safetensors.numpy.save({"latents": np.full(shape, value, dtype)})


def _json(**changes: Any) -> bytes:
    return json.dumps({**FIELDS, "caption": "a red square", **changes}).encode()


def _member(name: str, content: bytes | None) -> Change:
    def change(samples: list[tuple[str, Members]]) -> None:
        members = dict(samples)[BAD]
        if content is None:
            del members[name]
        else:
            members[name] = content

    return change


def _melted(samples: list[tuple[str, Members]]) -> None:
    samples[:] = [("v1", {f"{key}.{name}": one for key, members in samples for name, one in members.items()})]


def _numbered(samples: list[tuple[str, Members]]) -> None:
    for _, members in samples:
        members["1.png"] = members["2.png"] = members.pop("png")


def _bomb() -> bytes:
    png = bytearray(_image())
    png[16:24] = struct.pack(">II", 20_000, 20_000)
    return bytes(png)


def _sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _image("PNG", exif=exif)


def _deep_grey() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x4000, dtype=np.uint16)).save(stream, "PNG")
    return stream.getvalue()


def _float_grey() -> bytes:
    stream = io.BytesIO()
    Image.new("F", (8, 8), 7).save(stream, "TIFF")
    return stream.getvalue()


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _ends_in_zeros(content: bytes) -> bytes:
    return _half(content).ljust(len(content), b"\0")


SAMPLES: dict[str, Change] = {
    "an image that is no image": _member("png", b"<html>404</html>"),
    "an image cut short": _member("png", _image()[:-40]),
    "a JPEG that ends in zeros": _member("png", _image("JPEG", (64, 64))[:900] + bytes(3000)),
    "a PNG that ends in zeros": _member("png", _ends_in_zeros(_image(size=(64, 64)))),
    "a WebP that ends in zeros (no checksum shows it)": _member(
        "png", _ends_in_zeros(_image("WEBP", (64, 64)))
    ),
    "an image of more than 100,000,000 pixels": _member("png", _bomb()),
    "a format that is not opened (EPS)": _member("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "grey of 32 bits": _member("png", _float_grey()),
    "grey of 16 bits": _member("png", _deep_grey()),
    "an image on its side (EXIF)": _member("png", _sideways()),
    "no image": _member("png", None),
    "a caption that is not UTF-8": _member("txt", b"\xff\xfe\0"),
    "a caption with zero bytes": _member("txt", b"a red" + bytes(7)),
    "an empty caption": _member("txt", b" \n"),
    "json that cannot be parsed": _member("json", b'{"a": '),
    "json with a key twice": _member("json", b'{"original_width": 8, ' + _json()[1:]),
    "json with half a surrogate pair": _member("json", _json(caption="\ud800")),
    "json nested 1,000 deep": _member("json", b'{"a":' * 1000 + b"1" + b"}" * 1000),
    "original_width of -5": _member("json", _json(original_width=-5)),
    "no original_width": _member("json", json.dumps({"caption": "a"}).encode()),
    "keys with dots": _melted,
    "`k.1.png`, `k.2.png`": _numbered,
}
LATENTS: dict[str, Change] = {
    "latents cut short": _member("latent.safetensors", _latents()[:-1]),
    "a header that lies": _member("latent.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
    "latents of another shape": _member("latent.safetensors", _latents((4, 2, 3))),
    "latents of another number of channels": _member("latent.safetensors", _latents((16, 2, 2))),
    "latents in float32 beside float16": _member("latent.safetensors", _latents(dtype=np.float32)),
    "latents with NaN": _member("latent.safetensors", _latents(value=float("nan"))),
    "no latents": _member("latent.safetensors", None),
    "noise_seed of 1e30": _member("json", _json(noise_seed=1e30)),
    "noise_seed of 10^30": _member("json", _json(noise_seed=10**30)),
    "noise_seed of true": _member("json", _json(noise_seed=True)),
}


def _changed_header(content: bytes, by: bytes) -> bytes:
    start = content.index(f"{BAD}.png".encode())
    return content[:start] + by + content[start + len(by) :]


TARS: dict[str, Callable[[bytes], bytes]] = {
    "a tar cut in the middle": _half,
    "a tar whose second half is zeros": _ends_in_zeros,
    "a header of zeros": lambda content: _changed_header(content, bytes(512)),
    "two tars, one after the other": lambda content: content + content,
    "a flipped bit in a header": lambda content: _changed_header(content, b"8"),
    "an empty tar": lambda content: b"",
}


def _tar(samples: list[tuple[str, Members]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for key, members in samples:
            for name, content in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _samples(latents: bool, side: int = 8) -> list[tuple[str, Members]]:
    content = {"latent.safetensors": _latents()} if latents else {"png": _image(size=(side, side))}
    return [(f"{n:06d}", {**content, "txt": b"a red square", "json": _json()}) for n in range(6)]


def _named(text: str) -> str:
    """What a message names; one of several lines names nothing."""
    return (
        "the sample"
        if f"'{BAD}'" in text or f"/{BAD} " in text
        else "the shard"
        if "set.tar" in text
        else "nothing"
    )


def _training(folder: Path, contents: list[Any], faults: Faults | None) -> str:
    data = ShardDataModule(str(folder), 2, contents=contents, faults=faults, resolution=8)
    loader = data.train_dataloader()
    batches = list(itertools.chain.from_iterable(itertools.repeat(loader, 2)))
    loader.close()
    return f"{sum(map(len, batches)) // 2} read"


def strict(folder: Path, contents: list[Any]) -> str:
    """What a training does."""
    try:
        return _training(folder, contents, None)
    except (UserError, ValueError, OSError) as error:
        return f"refused, naming {_named(str(error))}"


def tolerant(folder: Path, contents: list[Any]) -> str:
    """What a training with a budget does."""
    path = folder.parent / "quarantine.jsonl"
    path.unlink(missing_ok=True)
    try:
        told = _training(folder, contents, Faults(10, str(path)))
    except (UserError, ValueError) as error:
        told = "refused" if "\n" not in str(error) else "several lines"
    lines = path.read_text().splitlines() if path.exists() else []
    keys = {json.loads(line)["key"] for line in lines}
    if not lines:
        return "read" if told == "6 read" else told
    what = "the sample" if keys == {BAD} else f"{len(lines)} fault{'s' * (len(lines) > 1)}"
    return f"{what} counted" + (", then refused" if told == "refused" else " and replaced")


def _command(*arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            prepare(list(arguments))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    text = out.getvalue() + errors.getvalue()
    assert "Traceback" not in text, text
    return code, text


def verify(folder: Path, contents: list[Any]) -> str:
    """What `verify` does."""
    code, text = _command("verify", str(folder), "--processes", "1", "--contents", "captions", *contents)
    return "no fault" if code == 0 else f"reports {_named(text)}" if code == 2 else f"exit code {code}"


def images(folder: Path) -> str:
    """What `images` does."""
    out = folder.parent / "images"
    code, text = _command("images", "--from", str(folder), "--out", str(out), "--processes", "1")
    if code:
        return f"refused, naming {_named(text)}" if code == 2 else f"exit code {code}"
    stats: Mapping[str, Any] = json.loads((out / "00000_stats.json").read_text())
    if stats["successes"] == 6:
        return "kept"
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(stats["status_dict"].items()))
    return f"left out ({reasons})"


def row(name: str, content: bytes, latents: bool) -> str:
    """One line of the table."""
    contents = ["latents", "noise_seeds", "sizes"] if latents else ["images", "sizes"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        (folder / "set.tar").write_bytes(content)
        cells = [strict(folder, contents), tolerant(folder, contents)]
        for sidecar in folder.glob("*.npz"):
            sidecar.unlink()
        cells += [verify(folder, contents), "" if latents else images(folder)]
    return f"| {name} | {' | '.join(cells)} |\n"


def table() -> str:
    """The file as it should be."""
    rows = []
    for latents, changes in ((False, SAMPLES), (True, LATENTS)):
        for name, change in changes.items():
            samples = _samples(latents)
            change(samples)
            rows.append(row(name, _tar(samples), latents))
    rows += [row(name, damage(_tar(_samples(False, side=64))), False) for name, damage in TARS.items()]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    TABLE.write_text(table())
