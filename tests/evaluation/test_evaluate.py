"""The command that scores a model or images: equal numbers by every way, restarts, and one sentence for bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from data.prepare.common.options import DeviceOptions
from data.prepare.common.shared_work import LocalProcesses, SetProgress, ShardJob
from data.shards.writer import ShardWriter
from evaluation import reference
from evaluation.evaluate import main
from evaluation.images.generate import SampledImages
from evaluation.images.samples import ModelSamples, PipelineImages, load_pipeline, stacked
from evaluation.metrics.diversity import diversity
from evaluation.metrics.estimates import mean_estimate
from evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.networks.image_steps import apply_steps
from evaluation.protocols.image_protocol import ImageProtocol, Measurement
from evaluation.protocols.protocols import IMAGE_PROTOCOLS, PROTOCOLS
from evaluation.runner.scores import ProtocolNetworks, score_images
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.networks.lora import LoRA, add_lora
from sdxs_lightning.networks.lora_files import hash_lora, live_adapters, write_lora
from sdxs_lightning.publishing.calling import Settings
from sdxs_lightning.publishing.runs import Run
from sdxs_lightning.publishing.scores import read_scores
from tests.helpers.metric_networks import random_images
from tests.helpers.ranks.evaluation_worker import shared_evaluation
from tests.helpers.ranks.processes import in_ranks
from tests.helpers.refusals import refusal
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl, tiny_sd_unet
from tests.helpers.tiny_distillation import distillation
from tests.networks.test_lora import move

CAPTIONS = [
    f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square")
] * 5
STEPS = ("crop", "resize 24 lanczos")


def small(name: str = "small", **changes: Any) -> ImageProtocol:
    """EvaluationResult by the tiny CLIP of the tests, which stands in for every network."""
    settings: dict[str, Any] = {
        "measurements": (
            Measurement("fid", "clip_image:vit-b-32", STEPS, STEPS),
            Measurement("clip_score", "clip_text:vit-b-32"),
        ),
        "samples": 30,
    }
    return ImageProtocol(name, **settings | changes)


@pytest.fixture
def protocols(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Protocols `small` and `small-lossless`; returns the options that name the metric networks."""
    monkeypatch.setitem(IMAGE_PROTOCOLS, "small", small())
    monkeypatch.setitem(IMAGE_PROTOCOLS, "lossless", small("lossless", lossless=True))
    monkeypatch.setattr("evaluation.evaluate.PROTOCOL_NAMES", (*PROTOCOLS, *IMAGE_PROTOCOLS))
    monkeypatch.setattr("evaluation.reference.PROTOCOL_NAMES", (*PROTOCOLS, *IMAGE_PROTOCOLS))
    return ["--weights", f"clip_image={world / 'clip'}", f"clip_text={world / 'clip'}"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 `images` (with captions), 40 images `real` of several sizes, and a `captions.txt`."""
    root = tmp_path_factory.mktemp("sets")
    for name, count, seed in (("images", 30, 0), ("real", 40, 1)):
        (root / name).mkdir()
        for number, image in enumerate(random_images(count, seed, 40)):
            content = Image.fromarray(image.permute(1, 2, 0).numpy())
            if name == "real" and number % 2:
                content = content.resize((50, 36))
            content.save(root / name / f"{number:03d}.png")
    (root / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return root


def run(out: Path, arguments: Sequence[object]) -> dict[str, Any]:
    """The command in this process; its result."""
    main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def numbers(result: dict[str, Any], name: str) -> list[float]:
    """A metric's value, interval and count."""
    return [value for value in result["metrics"][name].values() if isinstance(value, int | float)]


def on_images(sets: Path, protocols: list[str], *more: object) -> list[object]:
    """Arguments that score the folder of images."""
    return [
        "--images", sets / "images", "--reference", sets / "real", "--captions", sets / "captions.txt",
        "--protocol", "small", "--batch_size", 8, *protocols, *more,
    ]  # fmt: skip


def test_an_exported_student_scores_as_it_did_in_training(
    world: Path, toy_networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = distillation(world / "sd-epsilon")
    module.configure_model()
    assert module.ema is not None
    protocol, device = PROTOCOLS["toy"], torch.device("cpu")
    maker = SampledImages(module.ema, module.family, device, protocol.seed)
    in_training = score_images(maker, protocol.captions(), ProtocolNetworks.load(protocol), device)

    unet, timestep = module.ema.denoiser.unet, module.ema.conditioning_timestep
    folder = export_pipeline(unet, module.family, tmp_path / "pipeline", timestep, torch.float32)
    exported = run(tmp_path / "scores.json", ["--model", folder])
    # A grey level may tip over where the two paths round differently.
    assert exported["fid"] == pytest.approx(in_training.fid, rel=1e-3)
    assert exported["clip_score"] == pytest.approx(in_training.clip_score, abs=0.02)
    assert exported["caption_accuracy"] == in_training.caption_accuracy
    assert exported["attribute_accuracy"] == in_training.attribute_accuracy
    assert exported["protocol"]["fingerprint"] == protocol.fingerprint()
    assert {entry["hash"] for entry in exported["metrics"].values()} == {protocol.fingerprint()}
    assert exported["ms_per_image"] > 0
    assert "| FID ↓ |" in capsys.readouterr().out
    card = read_scores(
        Run(tmp_path, "pipeline", {}, {}), Settings(1, 0.0, None), folder
    )  # what publish reads
    assert {one.metric: one.value for one in card.numbers} == {
        name: entry["value"] for name, entry in exported["metrics"].items()
    }
    said = refusal(main, ["--model", folder, "--captions", "x.txt"], capsys)
    assert "protocol toy is the toy world's own: " in said and "leave out --captions" in said
    assert "it measures a --model" in refusal(main, ["--images", folder], capsys)


def test_numbers_equal_a_direct_computation(
    world: Path, sets: Path, protocols: list[str], tmp_path: Path
) -> None:
    result = run(tmp_path / "a.json", on_images(sets, protocols))
    clip = FrozenClip(world / "clip")

    def features(name: str) -> torch.Tensor:
        images = [Image.open(path).convert("RGB") for path in sorted((sets / name).iterdir())]
        ready = [apply_steps(image, STEPS) for image in images]
        return torch.cat([clip.image_features(stacked([image], torch.device("cpu"))) for image in ready])

    fake, real = (FeatureStatistics.from_features(features(name)) for name in ("images", "real"))
    direct = frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
    assert result["fid"] == pytest.approx(direct, rel=1e-4)  # float32 features in batches of 8 and of 1
    images = [Image.open(path).convert("RGB") for path in sorted((sets / "images").iterdir())]
    cosines = 100 * clip.cosine(stacked(images, torch.device("cpu")), CAPTIONS)
    expected = mean_estimate(cosines)
    entry = result["metrics"]["clip_score"]
    assert (entry["value"], entry["low"]) == pytest.approx((expected.value, expected.low), rel=1e-5)
    fid = result["metrics"]["fid"]
    assert fid["samples"] == 30
    assert fid["low"] < fid["value"] < fid["high"]
    assert "infinity" not in fid  # 30 images are less than three for each of the 16 dimensions
    assert fid["hash"] != entry["hash"]
    assert fid["settings"]["reference_steps"] == list(STEPS)
    page = (tmp_path / "a.html").read_text()
    assert page.count("<img") == 24 + 24
    assert "a red circle" in page
    assert f"{fid['value']:.5g}" in (tmp_path / "a.md").read_text()


def test_zip_shards_npz_processes_and_restarts_give_the_same_numbers(
    sets: Path, protocols: list[str], tmp_path: Path
) -> None:
    weights = [*protocols, f"clip_unit={protocols[1].partition('=')[2]}"]
    metrics = ["--metrics", "fid", "clip_score", "cmmd"]
    first = run(tmp_path / "a.json", on_images(sets, weights, *metrics))
    assert first["images"] == str(sets / "images")
    shutil.make_archive(str(tmp_path / "images"), "zip", sets / "images")
    with ShardWriter(tmp_path / "shards", samples_per_shard=11) as writer:
        for path, caption in zip(sorted((sets / "images").iterdir()), CAPTIONS, strict=True):
            writer.write({"png": path.read_bytes(), "txt": caption}, path.stem)
    reference.main(
        ["--protocol", "small", "--images", str(sets / "real"), "--metrics", "fid", "cmmd", *weights,
         "--out", str(tmp_path / "real.npz"), "--batch_size", "8", "--device", "cpu"]
    )  # fmt: skip
    ways: list[list[object]] = [
        ["--images", tmp_path / "images.zip", "--captions", sets / "captions.txt"],
        ["--images", tmp_path / "shards"],
        ["--images", sets / "images", "--captions", sets / "captions.txt", "--processes", 2],
    ]
    for number, way in enumerate(ways):
        arguments = [*way, "--reference", tmp_path / "real.npz", "--protocol", "small", "--batch_size", 8]
        found = run(tmp_path / f"{number}.json", [*arguments, *metrics, *weights])
        for name in ("fid", "clip_score", "cmmd"):
            assert numbers(found, name) == pytest.approx(numbers(first, name), rel=1e-9), (way, name)
            assert found["metrics"][name]["settings"] == first["metrics"][name]["settings"]
            assert found["metrics"][name]["hash"] == first["metrics"][name]["hash"]

    # Killed after its first batches: what is there is kept, what is missing is measured.
    batches = sorted((tmp_path / "0.work").glob("clip_image-*/batch_*.npz"))
    assert len(batches) == 4
    before = batches[0].stat().st_mtime_ns
    batches[2].unlink()
    again = run(tmp_path / "0.json", [*ways[0], "--reference", tmp_path / "real.npz", "--protocol", "small",
                "--batch_size", 8, *metrics, *weights])  # fmt: skip
    assert again["fid"] == pytest.approx(first["fid"], rel=1e-9)
    assert batches[0].stat().st_mtime_ns == before
    assert batches[2].is_file()


def levels(image: Image.Image) -> Any:
    """Grey levels that may be subtracted."""
    return np.asarray(image).astype(np.int16)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_model_makes_the_same_images_in_any_batch_and_size(kind: str, tmp_path: Path) -> None:
    base = (save_tiny_sd if kind == "sd" else save_tiny_sdxl)(tmp_path / kind)
    prompts = tuple(CAPTIONS[:5])
    made = [ModelSamples(str(base), prompts, steps, 2.0).open(torch.device("cpu")) for steps in (1, 3)]
    together, apart = made[1]([0, 1, 2, 3, 4]), [made[1]([number])[0] for number in (3, 1)]
    for image, number in zip(apart, (3, 1), strict=True):
        # A grey level may tip over where batches round differently.
        assert np.abs(levels(image) - levels(together[number])).max() <= 1
    assert not np.array_equal(levels(together[0]), levels(made[0]([0])[0]))
    larger = ModelSamples(str(base), prompts, image_px=64).open(torch.device("cpu"))
    assert larger([0])[0].size == (64, 64)
    assert together[0].size == (32, 32)


def test_scheduler_and_timesteps_are_those_that_were_asked_for(tmp_path: Path) -> None:
    base = str(save_tiny_sd(tmp_path / "sd"))
    prompts, cpu = tuple(CAPTIONS[:2]), torch.device("cpu")
    asked = ModelSamples(base, prompts, 2, 2.0, scheduler="euler", timesteps=(900, 300))
    maker = asked.maker(cpu)
    assert isinstance(maker, PipelineImages)
    assert type(maker.pipeline.scheduler) is EulerDiscreteScheduler
    own = load_pipeline(base).scheduler.config
    for name in ("num_train_timesteps", "beta_schedule", "prediction_type"):
        assert maker.pipeline.scheduler.config[name] == own[name]
    seen: list[int] = []
    maker.pipeline.unet.register_forward_pre_hook(lambda unet, given: seen.append(int(given[1])))
    made = maker(prompts, torch.arange(2))
    assert seen == [900, 300]
    assert not torch.equal(made, ModelSamples(base, prompts, 2, 2.0).maker(cpu)(prompts, torch.arange(2)))
    assert (asked.origin()["scheduler"], asked.origin()["timesteps"]) == ("euler", [900, 300])
    assert not {"scheduler", "timesteps"} & ModelSamples(base, prompts).origin().keys()
    with pytest.raises(
        UserError, match="takes no --timesteps; give --scheduler, one of ddpm, dpmsolver, euler"
    ):
        ModelSamples(base, prompts, scheduler="pndm", timesteps=(900,)).maker(cpu)
    with pytest.raises(UserError, match="begin at 1000, but the model's schedule ends at 999"):
        ModelSamples(base, prompts, scheduler="euler", timesteps=(1000,)).maker(cpu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m", "--timesteps", "249", "999"], "--timesteps 249 999 do not descend"),
        (["--model", "m", "--timesteps", "9", "9"], "--timesteps 9 9 do not descend"),
        (["--model", "m", "--steps", "4", "--timesteps", "9", "8"], "--steps 4 and 2 --timesteps contradict"),
        (["--images", "i", "--scheduler", "ddim"], "are those of a --model"),
        (["--model", "m", "--scheduler", "euler_b"], "--scheduler is 'euler_b', but must be one of"),
    ],
)
def test_contradicting_samplers_are_one_sentence(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(main, options, capsys)


def test_a_models_lora_counts_with_its_scale(tmp_path: Path) -> None:
    base, prompts, device = save_tiny_sd(tmp_path / "base"), ("a red circle",), torch.device("cpu")
    unet = add_lora(tiny_sd_unet(), LoRA(rank=2))
    move(unet, 0.5)
    path = write_lora(tmp_path, live_adapters(unet.state_dict(), None))
    plain = ModelSamples(str(base), prompts)
    zero, styled = (
        ModelSamples(str(base), prompts, lora=str(path), lora_scale=scale) for scale in (0.0, 1.0)
    )
    images = [np.asarray(samples.open(device)([0])[0]) for samples in (plain, zero, styled)]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()
    origin = styled.origin()
    assert (origin["lora_sha256"], origin["lora_scale"]) == (hash_lora(tmp_path), 1.0)
    assert origin["model_sha256"] == plain.origin()["model_sha256"] and "lora_sha256" not in plain.origin()
    with pytest.raises(UserError, match="--lora: there is no file or folder"):
        ModelSamples(str(base), prompts, lora=str(tmp_path / "none")).check()


def test_a_model_is_scored_on_the_prompts_of_a_file(
    world: Path, sets: Path, protocols: list[str], tmp_path: Path
) -> None:
    base = save_tiny_sd(tmp_path / "sd")
    arguments = [
        "--model",
        base,
        "--captions",
        sets / "captions.txt",
        "--reference",
        sets / "real",
        *protocols,
    ]
    result = run(
        tmp_path / "a.json", [*arguments, "--protocol", "small", "--steps", 2, "--guidance_scale", 3]
    )
    assert (result["nfe"], result["guidance_scale"], result["samples"]) == (2, 3.0, 30)
    assert result["metrics"]["fid"]["settings"]["formats"] == "lossless"
    few = run(
        tmp_path / "b.json",
        [*arguments, "--protocol", "lossless", "--samples", 12, "--metrics", "fid", "diversity"],
    )
    assert few["metrics"]["fid"]["samples"] == 12
    assert few["metrics"]["diversity"]["samples"] == 12 * 8
    maker = ModelSamples(str(base), tuple(CAPTIONS[:12])).maker(torch.device("cpu"))
    direct = diversity(maker, CAPTIONS[:12], FrozenClip(world / "clip"))
    assert few["diversity"] == pytest.approx(direct, rel=1e-3)
    assert few["metrics"]["fid"]["hash"] != result["metrics"]["fid"]["hash"]


def test_two_commands_share_the_images_of_a_model(world: Path, sets: Path, tmp_path: Path) -> None:
    """The same --work; every image is made once, and both have all numbers."""
    named = {"model": save_tiny_sd(tmp_path / "sd"), "captions": sets / "captions.txt"}
    named |= {"work": tmp_path / "work", "protocol": Path("coco2014-30k-256"), "image_px": Path("32")}
    arguments = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    arguments += ["--samples", "30", "--metrics", "clip_score", "--batch_size", "5", "--device", "cpu"]
    arguments += ["--processes", "1", "--weights", f"clip_text={world / 'clip'}"]
    ends = in_ranks(shared_evaluation, (arguments, tmp_path, 2), tmp_path, 2, 200)
    assert [end.code for end in ends] == [0, 0], ends
    made = [[int(line) for line in (tmp_path / f"made-{i}.txt").read_text().split()] for i in range(2)]
    assert sorted(made[0] + made[1]) == list(range(30)) and min(map(len, made)) > 0
    first, second = (json.loads((tmp_path / f"{i}.json").read_text())["metrics"] for i in range(2))
    assert first == second and first["clip_score"]["samples"] == 30
    assert not list((tmp_path / "work").glob("*/.claims/*"))


def test_a_cluster_gets_the_images_of_a_model_and_only_these(
    world: Path, sets: Path, protocols: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Ray, whose drill is `python -m tests.drills "evaluate --model"`; the numbers are those of this machine."""

    class Cluster(LocalProcesses):
        made: ClassVar[list[tuple[str, list[int]]]] = []

        def make(self, job: ShardJob, shards: Sequence[int], on_progress: SetProgress) -> None:
            self.made.append((job.job.device, list(shards)))  # type: ignore[attr-defined]
            super().make(job, shards, on_progress)

    @contextmanager
    def cluster(options: DeviceOptions) -> Iterator[Cluster]:
        assert options.ray == "head:6379" and options.gpus_per_task == 0.5
        yield Cluster("cpu", 1)

    arguments = [
        "--model",
        save_tiny_sd(tmp_path / "sd"),
        "--captions",
        sets / "captions.txt",
        "--protocol",
        "small",
    ]
    arguments += ["--reference", sets / "real", "--image_px", 32, "--batch_size", 12, *protocols]
    here = run(tmp_path / "here.json", [*arguments, "--processes", 1])
    monkeypatch.setattr("evaluation.runner.commands.workforce", cluster)
    main(
        [
            *map(str, arguments),
            "--out",
            str(tmp_path / "ray.json"),
            "--ray",
            "head:6379",
            "--gpus_per_task",
            "0.5",
        ]
    )
    there = json.loads((tmp_path / "ray.json").read_text())
    assert Cluster.made == [("cpu", [0, 1, 2])]
    assert there["metrics"] == here["metrics"] and there["device"] == "tasks of a Ray cluster, on cpu"
    assert "ms_per_image" in here and "ms_per_image" not in there


def test_bad_input_is_one_sentence(
    sets: Path, protocols: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(arguments: Sequence[object]) -> str:
        return refusal(main, [*arguments, "--device", "cpu"], capsys)

    images, real, captions = sets / "images", sets / "real", sets / "captions.txt"
    usual = ["--protocol", "small", "--reference", real, *protocols]
    assert "model_index.json is missing" in refused(["--model", tmp_path, "--captions", captions, *usual])
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert "'run' has not exported one" in refused(["--model", run, "--captions", captions, *usual]).replace(
        f"{tmp_path}/", ""
    )
    (run / "pipeline").mkdir()
    (run / "pipeline" / "model_index.json").touch()
    of_run = refused(["--model", run, "--captions", captions, *usual])
    assert f"is missing); give its folder 'pipeline', '{run}/pipeline'" in of_run
    assert "--model needs --captions" in refused(["--model", tmp_path, *usual])
    assert "clip_score reads captions; give --captions" in refused(["--images", images, *usual])
    assert "fid compares with real images; give --reference" in refused(
        ["--images", images, "--captions", captions, "--protocol", "small", *protocols]
    )
    assert "holds 40 images, but protocol small measures 30" in refused(
        ["--images", real, "--captions", captions, *usual]
    )
    fid = [*usual, "--metrics", "fid"]
    assert "diversity needs several images" in refused(["--images", images, *usual, "--metrics", "diversity"])
    assert "--metrics is 'is', but must be one of" in refused(["--images", images, *usual, "--metrics", "is"])
    assert "kid: FID" not in (said := refused(["--images", images, *usual, "--metrics", "kid"]))
    assert "no Inception weights" in said
    assert "--weights takes KIND=PATH" in refused(
        ["--images", images, "--protocol", "small", "--weights", "x"]
    )
    assert "--weights names clip" in refused(
        ["--images", images, *fid[:4], "--weights", "clip=x", "--metrics", "fid"]
    )

    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    (broken / "007.png").write_bytes(b"not an image")
    assert "007.png: the image cannot be decoded" in refused(["--images", broken, *fid])
    (broken / "007.png").unlink()
    assert "holds 29 images, but protocol small measures 30; give --samples 29" in refused(
        ["--images", broken, *fid]
    )
    Image.new("RGB", (40, 40)).save(broken / "007.jpg")
    lossless = ["--protocol", "lossless", "--reference", real, *protocols, "--metrics", "fid"]
    assert "jpg+png files, but protocol lossless takes lossless ones" in refused(
        ["--images", broken, *lossless]
    )


def test_wrong_statistics_are_one_sentence(
    world: Path, sets: Path, protocols: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(arguments: Sequence[object]) -> str:
        return refusal(main, [*arguments, "--device", "cpu"], capsys)

    images = ["--images", sets / "images", *protocols, "--metrics", "fid", "--protocol", "small"]
    clip = FrozenClip(world / "clip")
    features = clip.image_features(random_images(40))
    FeatureStatistics.from_features(
        features, {"judge": {"weights": "x"}, "steps": [], "reference": "r"}
    ).save(tmp_path / "other.npz")
    assert "was measured otherwise than this protocol does (network." in refused(
        [*images, "--reference", tmp_path / "other.npz"]
    )
    assert "other.kid.npz, which is not there" in refused(
        [*images[:4], "--metrics", "fid", "--protocol", "small", "--reference", tmp_path / "none.npz"]
    ).replace("none.npz", "other.kid.npz")
    np.savez(tmp_path / "no.npz", x=np.zeros(3))
    assert "holds no statistics" in refused([*images, "--reference", tmp_path / "no.npz"])
    np.savez(tmp_path / "tiny.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "both sides have to come from the same feature network" in refused(
        [*images, "--reference", tmp_path / "tiny.npz"]
    )
    # Statistics of another tool say nothing about their origin: they count, under a hash of their own.
    np.savez(tmp_path / "foreign.npz", mu=features.double().mean(0).numpy(), sigma=np.cov(features.T.numpy()))
    result = run(tmp_path / "a.json", [*images, "--reference", tmp_path / "foreign.npz"])
    assert result["metrics"]["fid"]["settings"]["reference"].startswith("npz-")
    assert load_file(world / "clip" / "open_clip_model.safetensors")
