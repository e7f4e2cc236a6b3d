"""What is fuzzed: for each target its seeds, its own mutations, and the exceptions that are its answer to damage."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image

from data.shards.checks import SampleCheck
from data.shards.decoders import BadSampleError, decode
from data.shards.index import index_shard
from data.shards.layout import Part, sample_rows
from data.shards.sample_decoder import Reading, SampleDecoder
from data.shards.sidecar import load_sidecar, save_sidecar
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError, tar_members
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_condition import ImageCondition
from tests.fuzz.mutations import Mutation, json_value, move_block, safetensors_header, tar_field


@dataclass(frozen=True)
class Target:
    """One reader of foreign bytes."""

    seeds: tuple[bytes, ...]
    run: Callable[[bytes, Path], None]
    """Reads the bytes; may raise `accepted` and nothing else. The folder is for files."""
    accepted: tuple[type[Exception], ...]
    mutations: tuple[Mutation, ...] = ()


def _image(kind: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def _images() -> tuple[bytes, ...]:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000).save(deep, "PNG")
    kinds = [_image("JPEG", exif=exif), _image("JPEG", "CMYK"), _image("JPEG", "L", progressive=True)]
    kinds += [_image("PNG", mode) for mode in ("RGBA", "L", "LA", "P", "1")]
    kinds += [_image("WEBP", exif=exif), _image("WEBP", "RGBA", lossless=True), deep.getvalue()]
    return (
        *kinds,
        _image("BMP"),
        _image("GIF", "P"),
        _image("TIFF"),
        _image("TIFF", "L", compression="tiff_lzw"),
    )


def _latents() -> tuple[bytes, ...]:
    mean, logvar = np.ones((4, 2, 3), np.float16), np.zeros((4, 2, 3), np.float16)
    return tuple(
        safetensors.numpy.save(tensors)
        for tensors in (
            {"latents": mean},
            {"latents": mean, "logvar": logvar},
            {"latents": mean.astype(np.float32)},
        )
    )


_FIELDS = {
    "noise_seed": 5,
    "original_height": 9,
    "original_width": 12,
    "crop_top": 0,
    "crop_left": 1,
    "caption": "a",
}
_JSON = json.dumps(_FIELDS | {"crc32": {"txt": 1}, "deep": [[{"a": "b"}]]}).encode()


def _tars() -> tuple[bytes, ...]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as made:
            for number in range(3):
                long = "n" * 120 if form != tarfile.USTAR_FORMAT and number == 1 else ""
                members = {
                    "latent.safetensors": _latents()[1],
                    "txt": b"words",
                    "json": _JSON,
                    "png": _image("PNG"),
                }
                for name, content in members.items():
                    info = tarfile.TarInfo(f"{long}{number}.{name}")
                    info.size = len(content)
                    info.pax_headers = {"mtime": "1.5"} if form == tarfile.PAX_FORMAT else {}
                    made.addfile(info, io.BytesIO(content))
        found.append(stream.getvalue())
    return tuple(found)


def _member(extension: str) -> Callable[[bytes, Path], None]:
    def run(content: bytes, folder: Path) -> None:
        decode(extension, memoryview(bytearray(content)), "here")

    return run


def _headers(content: bytes, folder: Path) -> None:
    path = folder / "s.tar"
    path.write_bytes(content)
    for member in tar_members(path):
        assert member.offset >= 0 and member.size >= 0 and member.offset + member.size <= len(content)


def _shard(content: bytes, folder: Path) -> None:
    """As a training and `verify` read it: index, sidecar, each sample."""
    path = folder / "s.tar"
    path.write_bytes(content)
    for sidecar in folder.glob("*.npz"):
        sidecar.unlink()
    index = index_shard(path, tolerant=True)
    kept = index_shard(path, tolerant=True)
    assert kept.fingerprint == index.fingerprint and kept.faults == index.faults
    check, decoders = SampleCheck(None, "refuse"), [SampleDecoder(*one) for one in _READINGS]
    file = ShardStore().open(str(path), index.stamp)
    try:
        sample_rows(index, [Part("captions", ("txt", "json"))])
        for row in range(len(index)):
            members = {
                name: bytes(file.read(int(index.offsets[row, column]), int(index.sizes[row, column])))
                for column, name in enumerate(index.extensions)
                if index.offsets[row, column] >= 0
            }
            for reason in check.sample(index.key(row), members):
                _is_one_sentence(reason)
            for decoder in decoders:
                try:
                    decoder.decode_members(members, row, "here")
                except BadSampleError as error:
                    _is_one_sentence(str(error))
    finally:
        file.close()
    for fault in index.faults:
        _is_one_sentence(fault.reason)
    list(check.shard())


def _is_one_sentence(reason: str) -> None:
    assert reason and "\n" not in reason and len(reason) < 1500, reason
    assert not reason.rstrip(").").endswith("()"), reason
    for unexpected in (
        "TypeError",
        "KeyError",
        "IndexError",
        "AttributeError",
        "AssertionError",
        "UnboundLocalError",
    ):
        assert f"cannot be decoded ({unexpected}" not in reason, reason


def _negative(
    image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return 255 - image


_CONDITION: ImageCondition = _negative
_READINGS = [
    (("latents", "noise_seeds", "sizes"), Reading(caption_fields=("caption", "deep"))),
    (("images", "control_images", "sizes"), Reading(condition=_CONDITION)),
    ((), Reading(empty_captions="keep")),
]


def _sidecars() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.tar"
        path.write_bytes(_tars()[0])
        index = index_shard(path)
        assert index.stamp is not None
        save_sidecar(path.with_suffix(".npz"), index, index.stamp)
        return (path.with_suffix(".npz").read_bytes(),)


def _sidecar(content: bytes, folder: Path) -> None:
    path = folder / "s.npz"
    path.write_bytes(content)
    index = load_sidecar(path, "s.tar", None)
    if index is not None:
        for row in range(len(index)):
            index.key(row)
            index.members(row)
        sample_rows(index, [Part("captions", ("txt", "json"))])


def _prompts(ending: str) -> Callable[[bytes, Path], None]:
    def run(content: bytes, folder: Path) -> None:
        from evaluation.images.prompt_files import read_prompts  # imports torch

        path = folder / f"prompts.{ending}"
        path.write_bytes(content)
        read_prompts(path).of_images(["1.png", "2.png"], str(path))

    return run


def _statistics(content: bytes, folder: Path) -> None:
    from evaluation.metrics.statistics import FeatureStatistics

    path = folder / "reference.npz"
    path.write_bytes(content)
    FeatureStatistics.load(path)


def _npz() -> tuple[bytes, ...]:
    plain, packed = io.BytesIO(), io.BytesIO()
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "n": np.int64(5)}
    np.savez(plain, **arrays, protocol=np.array('{"a": 1}'))  # type: ignore[arg-type]
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    return plain.getvalue(), packed.getvalue()


_COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "caption": "a"}, {"id": 2, "image_id": 2, "caption": "b"}],
}


def targets() -> dict[str, Target]:
    """By name."""
    bad, refused = (BadSampleError,), (UserError,)
    return {
        "tar headers": Target(_tars(), _headers, (BrokenShardError,), (tar_field, move_block)),
        "shards": Target(_tars(), _shard, (), (tar_field, move_block, json_value)),
        "sidecars": Target(_sidecars(), _sidecar, ()),
        "images": Target(_images(), _member("jpg"), bad),
        "text": Target((b"a red square", "\ufeffä".encode()), _member("txt"), bad),
        "json": Target((_JSON, b'{"a": [1, {"b": null}]}'), _member("json"), bad, (json_value,)),
        "prompts json": Target(
            (json.dumps(_COCO).encode(), b'["a", "b"]', b'{"1": {"prompt": "a"}}'),
            _prompts("json"),
            refused,
            (json_value,),
        ),
        "prompts jsonl": Target(
            (b'{"prompt": "a", "tag": "x"}\n{"prompt": "b"}\n',), _prompts("jsonl"), refused, (json_value,)
        ),
        "prompts csv": Target((b'caption,file_name\n"a, b",1.png\nc,2.png\n',), _prompts("csv"), refused),
        "prompts tsv": Target((b"Prompt\tCategory\na\tx\nb\ty\n",), _prompts("tsv"), refused),
        "statistics": Target(_npz(), _statistics, (ValueError, UserError)),
        "safetensors": Target(_latents(), _member("latent.safetensors"), bad, (safetensors_header,)),
    }
