"""Reading by position: what a batch holds, what is never decoded, and each refusal."""

import io
import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray
from PIL import Image

from data.prepare.latents.samples import latent_member
from data.shards.dataset import Content, Reading, ShardDataset
from data.shards.decoders import BadSampleError, decode
from data.shards.images import Fitting
from data.shards.index import ShardSet
from data.shards.order.sample_order import SampleOrder
from data.shards.tar_headers import BrokenShardError
from data.shards.writer import ShardWriter, encode_latents
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.seeding import Stream, normal

LATENTS = encode_latents(torch.zeros(4, 2, 2))


def encoded_image(width: int, height: int, kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def dataset(
    folder: Path, samples: list[dict[str, Any]], contents: list[Content], **options: Any
) -> ShardDataset:
    with ShardWriter(folder, overwrite=True) as writer:
        for members in samples:
            writer.write(members)
    return reading(folder, contents, **options)


def reading(folder: Path, contents: list[Content], **options: Any) -> ShardDataset:
    shards = ShardSet.open(folder)
    return ShardDataset(shards, SampleOrder(shards.sizes, shuffle_window_shards=0), contents, **options)


def test_images_of_each_format(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [
        {kind: encoded_image(6, 4, kind), "txt": kind} for kind in ("png", "webp", "jpeg")
    ]
    samples += [{"jpg": samples[2]["jpeg"], "json": {"caption": " jpg "}}]
    batch = dataset(tmp_path, samples, ["images"]).batch([0, 1, 2, 3])
    assert batch.captions == ["png", "webp", "jpeg", "jpg"]
    assert batch.images is not None and batch.images.shape == (4, 3, 4, 6) and batch.latents is None
    with Image.open(io.BytesIO(samples[0]["png"])) as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(batch.images[0], expected, atol=1e-6)
    assert torch.equal(batch.images[2], batch.images[3])


def test_resolution_and_its_record(tmp_path: Path) -> None:
    samples = [
        {"png": encoded_image(60, 40), "txt": "a"},
        {"png": encoded_image(30, 48), "txt": "b"},
        {"png": encoded_image(20, 20), "txt": "c"},
    ]
    batch = dataset(tmp_path, samples, ["images"], resolution=20).batch([0, 1, 2])
    assert batch.images is not None and batch.images.shape == (3, 3, 20, 20)
    assert batch.original_sizes is not None and batch.original_sizes.tolist() == [
        [40, 60],
        [48, 30],
        [20, 20],
    ]
    assert batch.crops is not None and batch.crops.tolist() == [[0, 5], [6, 0], [0, 0]]
    with pytest.raises(BadSampleError, match=r"images of one size, but 00000/000000000 has \(40, 60, 3\)"):
        reading(tmp_path, ["images"]).batch([0, 1])


def test_latents_drawn_from_the_posterior(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    means, logvars = (torch.randn(2, 4, 32, 32, generator=generator) for _ in range(2))
    samples = [
        {"latent.safetensors": latent_member(mean, logvar, "float32"), "txt": "a"}
        for mean, logvar in zip(means, logvars, strict=True)
    ]
    positions = [1, 6, 11]  # samples 1, 0 and 1, in their first, fourth and sixth visits
    plain = dataset(tmp_path, samples, ["latents"]).batch(positions)
    order = [position % 2 for position in positions]
    assert plain.latents is not None and torch.equal(plain.latents, means[order])
    drawing = Reading(draw_latents=True, fitting=Fitting(seed=5))
    batch = reading(tmp_path, ["latents"], reading=drawing).batch(positions)
    noise = normal(5, Stream.VAE_SAMPLE, torch.tensor(positions), (4, 32, 32))
    torch.testing.assert_close(batch.latents, means[order] + (logvars[order] / 2).exp() * noise)
    assert batch.latents is not None and not torch.equal(batch.latents[0], batch.latents[2])
    only_means = dataset(
        tmp_path, [{"latent.safetensors": LATENTS, "txt": "a"}], ["latents"], reading=drawing
    )
    with pytest.raises(BadSampleError, match="complete float16 or float32 tensor named 'logvar'"):
        only_means.batch([0])


def test_several_contents_in_one_batch(tmp_path: Path) -> None:
    latents = torch.arange(16.0).reshape(4, 2, 2)
    sample = {
        "latent.safetensors": encode_latents(latents),
        "png": encoded_image(4, 4),
        "cond.png": encoded_image(4, 4, seed=1),
        "json": {"noise_seed": 2**40, "caption": "not this one"},
        "txt": "this one",
    }
    batch = dataset(tmp_path, [sample], ["noise_seeds", "control_images", "images", "latents"]).batch([3])
    assert batch.captions == ["this one"] and batch.positions.tolist() == [3]
    assert batch.latents is not None and torch.equal(batch.latents[0], latents)
    assert batch.pair_noise_seeds is not None and batch.pair_noise_seeds.tolist() == [2**40]
    assert (
        batch.control_images is not None
        and 0 <= batch.control_images.min() < 0.1 < 0.9 < batch.control_images.max() <= 1
    )


class Harm:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    harm = pickle.dumps(Harm(mark))
    shard = tmp_path / "shards" / "00000.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        kinds = ("pkl", "pyd", "pth", "pt", "npy", "pickle", "latent.pth")
        for name, content in [
            *((kind, harm) for kind in kinds),
            ("latent.safetensors", LATENTS),
            ("txt", b"a"),
        ]:
            info = tarfile.TarInfo(f"0.{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert len(reading(shard.parent, ["latents"]).batch([0, 1])) == 2
    for kind in kinds:
        with pytest.raises(BadSampleError, match=f"here: members of the kind '{kind}' are not read"):
            decode(kind, harm, "here")
    # Under a name that is read, the same bytes are only a file of the wrong format.
    for kind in ("latent.safetensors", "png", "json", "txt"):
        with pytest.raises(BadSampleError, match="here: "):
            decode(kind, harm, "here")
    assert not mark.exists()
    pickle.loads(harm)
    assert mark.exists()  # the bytes would have worked


BAD_MEMBERS: list[tuple[Content, dict[str, Any], str]] = [
    ("images", {"png": encoded_image(8, 8)[:-40], "txt": "a"}, "the image cannot be decoded"),
    ("images", {"jpg": encoded_image(64, 64, "JPEG")[:1500], "txt": "a"}, "the image cannot be decoded"),
    ("images", {"jpg": b"<html>404</html>", "txt": "a"}, "the image cannot be decoded"),
    ("images", {"jpg": b"", "txt": "a"}, "the image cannot be decoded"),
    (
        "latents",
        {"latent.safetensors": LATENTS[:-1], "txt": "a"},
        "does not hold a complete float16 or float32 tensor named",
    ),
    (
        "latents",
        {"latent.safetensors": safetensors.numpy.save({"x": np.zeros((4, 2, 2))}), "txt": "a"},
        "does not hold a complete float16 or float32 tensor named 'latents'",
    ),
    (
        "latents",
        {"latent.safetensors": safetensors.numpy.save({"latents": np.zeros((2, 2), np.float32)}), "txt": "a"},
        r"\(4, h, w\), but these are \(2, 2\)",
    ),
    (
        "latents",
        {
            "latent.safetensors": safetensors.numpy.save({"latents": np.zeros((4, 2, 2), np.int16)}),
            "txt": "a",
        },
        r"float16 or float32 tensor named 'latents' \(its dtype is 'I16'\)",
    ),
    ("latents", {"latent.safetensors": LATENTS, "txt": b"\xff\xfe"}, "the caption is not UTF-8"),
    (
        "latents",
        {"latent.safetensors": LATENTS, "txt": " \n"},
        "the caption is empty; set data.empty_captions to 'keep'",
    ),
    ("latents", {"latent.safetensors": LATENTS, "json": b"{"}, "json member cannot be parsed"),
    ("latents", {"latent.safetensors": LATENTS, "json": b"[1]"}, "json member holds a list"),
    ("latents", {"latent.safetensors": LATENTS, "json": {"text": "a"}}, "has no str named 'caption'"),
    ("noise_seeds", {"json": {"noise_seed": "7"}, "txt": "a"}, "has no int named 'noise_seed'"),
]


@pytest.mark.parametrize(("content", "members", "message"), BAD_MEMBERS)
def test_a_bad_member_is_named(
    tmp_path: Path, content: Content, members: dict[str, Any], message: str
) -> None:
    samples = dataset(tmp_path, [members], [content])
    with pytest.raises(BadSampleError, match=rf"00000\.tar, key '000000000': .*{message}"):
        samples.batch([0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_as_the_safetensors_package_reads_them(dtype: type) -> None:
    tensors: dict[str, Any] = {
        name: np.random.default_rng(0).standard_normal((4, 3, 5)).astype(dtype)
        for name in ("a", "latents", "z")
    }
    content = safetensors.numpy.save(tensors, metadata={"by": "another writer"})
    decoded = decode("latent.safetensors", memoryview(content), "here")
    assert decoded.dtype == dtype and np.array_equal(decoded, safetensors.numpy.load(content)["latents"])
    for length in range(len(content)):
        with pytest.raises(BadSampleError, match="does not hold a complete float16"):
            decode("latent.safetensors", content[:length], "here")


@pytest.mark.parametrize(
    ("tensors", "size", "message"),
    [
        ([("latents", 0)], 40, "states 32 bytes of data, and it has 40"),
        ([("latents", 8)], 40, "leave a gap or overlap at byte 0"),
        ([("latents", 0), ("x", 16)], 48, "leave a gap or overlap at byte 32"),
        ([("latents", 0), ("latents", 0)], 32, "has the key 'latents' twice"),
    ],
)
def test_headers_that_lie(tensors: list[tuple[str, int]], size: int, message: str) -> None:
    entries = [
        f'"{name}": {{"dtype": "F16", "shape": [4, 2, 2], "data_offsets": [{begin}, {begin + 32}]}}'
        for name, begin in tensors
    ]
    header = f"{{{', '.join(entries)}}}".encode()
    content = struct.pack("<Q", len(header)) + header + bytes(size)
    if "twice" not in message:  # of which the safetensors package takes the last
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load(content)
    with pytest.raises(BadSampleError, match=message):
        decode("latent.safetensors", content, "here")


def test_empty_captions_can_be_kept(tmp_path: Path) -> None:
    sample = {"latent.safetensors": LATENTS, "txt": ""}
    assert dataset(tmp_path, [sample], ["latents"], empty_captions="keep").batch([0]).captions == [""]


def test_a_missing_member_is_refused_before_training(tmp_path: Path) -> None:
    whole = {"latent.safetensors": LATENTS, "txt": "a"}
    with pytest.raises(
        BadSampleError, match=r"'000000001': there is no member for 'latents' .* and in 1 more of"
    ):
        dataset(tmp_path, [whole, {"txt": "a"}, {"txt": "a"}], ["latents"])
    with pytest.raises(
        BadSampleError, match=r"key '000000001': there is no caption \(txt, text, caption, json\)"
    ):
        dataset(tmp_path, [whole, {"latent.safetensors": LATENTS}], ["latents"])
    with pytest.raises(BadSampleError, match=r"there is no member for 'images' \(jpg, jpeg, png, webp\)"):
        dataset(tmp_path, [whole], ["images"])
    with pytest.raises(ValueError, match=r"data.contents is \['pictures'\], but it accepts latents"):
        reading(tmp_path, ["pictures"])  # type: ignore[list-item]


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    samples = dataset(tmp_path, [{"latent.safetensors": LATENTS, "txt": "a"}] * 3, ["latents"])
    path = tmp_path / "00000.tar"
    assert len(samples.batch([0])) == 1  # opened
    path.write_bytes(path.read_bytes()[:2000])
    assert len(samples.batch([0])) == 1
    with pytest.raises(BrokenShardError, match=r"00000\.tar ends before its sample '000000001' does"):
        samples.batch([1])


def test_bounded_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.dataset._OPEN_SHARDS", 3)
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for number in range(10):
            writer.write({"latent.safetensors": LATENTS, "json": json.dumps({"caption": str(number)})})
    samples = reading(tmp_path, ["latents"])
    assert samples.batch(list(range(20))).captions == [str(number) for number in range(10)] * 2
    assert len(samples._open) == 3
    # A copy for another process opens its own files.
    copy = pickle.loads(pickle.dumps(samples))
    assert copy.batch([4]).captions == ["4"] and len(copy._open) == 1
    samples.close()
    assert not samples._open


def mirrored(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A condition that can be told apart."""
    return image[:, ::-1]


def test_a_condition_made_on_the_fly(tmp_path: Path) -> None:
    """It sees the image as it was resized and cropped, and needs no content 'images' beside it."""
    samples = [{"png": encoded_image(60, 40), "txt": "a"}]
    both = dataset(tmp_path, samples, ["images", "control_images"], resolution=20, condition=mirrored).batch(
        [0]
    )
    assert both.images is not None and both.control_images is not None
    assert torch.allclose(both.control_images, both.images.flip(3) / 2 + 0.5, atol=1e-6)
    alone = reading(tmp_path, ["control_images"], resolution=20, condition=mirrored).batch([0])
    assert alone.images is None and alone.control_images is not None
    assert torch.equal(alone.control_images, both.control_images)
    with pytest.raises(UserError, match=r"made uint8 \(20, 20\) from an image of \(20, 20, 3\)"):
        reading(tmp_path, ["control_images"], resolution=20, condition=lambda image: image[..., 0]).batch([0])
