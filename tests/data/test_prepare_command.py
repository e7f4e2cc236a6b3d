"""The command line of `python -m data.prepare`: options, their former spellings, stored settings, and what it imports when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from data.prepare.__main__ import COMMANDS, main
from data.prepare.common.options import SetPart
from data.prepare.images.command import ImageSet
from data.prepare.images.options import ImageOptions
from data.prepare.latents.job import LatentSet
from data.prepare.latents.options import LatentOptions
from data.prepare.pairs.options import PairOptions
from data.prepare.pairs.pair_set import PairSet
from sdxs_lightning.command_line import Command, parse_options
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.pair_noise import SEEDS
from sdxs_lightning.core.timesteps import Spacing

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "lightning", "pyarrow", "webdataset")


def image_options(line: str = "") -> ImageOptions:
    return parse_options(ImageOptions, f"--from photos --out set {line}".split())


def latent_options(line: str = "") -> LatentOptions:
    return parse_options(LatentOptions, f"--model base --from photos --out set {line}".split())


def pair_options(line: str = "--guidance_scale 2") -> PairOptions:
    return parse_options(
        PairOptions, f"--model base --captions prompts.txt --steps 4 --out set {line}".split()
    )


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    listed = capsys.readouterr().out
    assert [f"\n  {command.name} " in listed for command in COMMANDS] == [True] * 4


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_help_has_examples(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command.name, "--help"])
    assert ended.value.code == 0
    assert f"\nexamples:\n  python -m data.prepare {command.name} " in capsys.readouterr().out


def test_light_options_agree_with_modules_that_import_torch() -> None:
    assert get_args(get_type_hints(PairOptions)["spacing"]) == get_args(Spacing)
    assert pair_options(f"--guidance_scale 2 --seed {SEEDS[-1]}").seed == SEEDS[-1]
    with pytest.raises(
        UserError, match=f"--seed is '{SEEDS[-1] + 1}', but must be an integer from 0 to {SEEDS[-1]}"
    ):
        pair_options(f"--guidance_scale 2 --seed {SEEDS[-1] + 1}")


def test_former_spellings_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert pair_options("--guidance 7.5 --batch-size 3") == pair_options(
        "--guidance_scale 7.5 --batch_size 3"
    )
    assert capsys.readouterr().err == "--guidance is now called --guidance_scale.\n"
    assert image_options("--samples-per-shard 5").samples_per_shard == 5


def test_guidance_scale_0_is_1_and_fractions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert pair_options("--guidance_scale 0") == pair_options("--guidance_scale 1")
    assert capsys.readouterr().err == "--guidance_scale 0 is read as 1: no guidance.\n"
    with pytest.raises(UserError, match="--guidance_scale is 0.5, but must be a number of at least 1"):
        pair_options("--guidance_scale 0.5")
    with pytest.raises(UserError, match="--guidance_scale is 'inf', but must be a number from 0 to 100"):
        pair_options("--guidance_scale inf")


def test_options_that_exclude_one_another() -> None:
    assert latent_options("--sizes 32x64 64x32").sizes == ((32, 64), (64, 32))
    assert latent_options("--buckets").buckets == 0
    with pytest.raises(UserError, match="--sizes and --buckets exclude one another"):
        latent_options("--sizes 32x64 --buckets")
    with pytest.raises(UserError, match="--sizes is '32', but must be HEIGHTxWIDTH"):
        latent_options("--sizes 32")


def test_a_part_of_a_set() -> None:
    assert image_options("--part 1/4").part == SetPart(1, 4)
    with pytest.raises(UserError, match="--part is '4/4', but must be I/N with I below N"):
        image_options("--part 4/4")


def test_stored_settings_are_those_of_earlier_versions() -> None:
    """Keys and values that images.json, latents.json and pairs.json of earlier versions hold: such sets are resumed."""
    images = ImageSet(image_options("--resolution 64"), "f" * 16, 9).settings
    assert images == {
        "source": "photos",
        "image_column": None,
        "caption_column": None,
        "source_fingerprint": "f" * 16,
        "count": 9,
        "samples_per_shard": 10000,
        "resolution": 64,
        "crop": "none",
        "image_format": "jpg",
        "quality": 95,
        "min_side": 64,
        "max_aspect": 4.0,
        "min_caption": 1,
        "max_caption": 10000,
        "condition": None,
        "format": 1,
    }
    assert image_options().min_side == 1
    assert LatentSet(latent_options(), "a", "b", 3, ((32, 64), (64, 32))).settings == {
        "source": "photos",
        "model": "base",
        "config": None,
        "vae": None,
        "source_fingerprint": "a",
        "vae_fingerprint": "b",
        "shards": 3,
        "sizes": [[32, 64], [64, 32]],
        "dtype": "float16",
        "store": "mean",
        "vae_dtype": "float32",
        "batch_size": 8,
        "format": 1,
    }
    assert set(PairSet.__dataclass_fields__) == {
        *(
            "model",
            "unet",
            "config",
            "captions",
            "model_fingerprint",
            "captions_fingerprint",
            "pipeline_class",
        ),
        *("resolution", "count", "samples_per_shard", "steps", "guidance", "scheduler", "spacing", "seed"),
        *("dtype", "format"),
    }


def imported(code: str, *arguments: str) -> tuple[int, set[str]]:
    """Exit code, and which of the slow packages were imported, of `main` in a process of its own."""
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('imported', *(name for name in {HEAVY!r} if name in sys.modules)))\n"
        + code
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = run.stdout.splitlines()[-1].split()
    assert last[0] == "imported", run.stderr
    return run.returncode, set(last[1:])


MAIN = "from data.prepare.__main__ import main\nmain(sys.argv[1:])"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("", 0),
        ("images --help", 0),
        ("latents --help", 0),
        ("pairs --help", 0),
        ("verify --help", 0),
        ("pairs --steps 0", 2),
        ("verify --recrod set", 2),
        ("image", 2),
    ],
)
def test_help_and_refusals_import_nothing_slow(arguments: str, code: int) -> None:
    assert imported(MAIN, *arguments.split()) == (code, set())


def test_verify_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"")
    code, names = imported(MAIN, "verify", str(tmp_path), "--processes", "1")
    assert code == 2
    assert names <= {"numpy"}
