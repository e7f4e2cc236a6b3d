"""What real and fake score make of a student's images, on the toy base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from evaluation.benchmarks import score_repair
from evaluation.benchmarks.score_repair import FAKE, REAL, ScoreRepairOptions, main, run, sampled_again
from evaluation.benchmarks.student_scores import ScoreOptions, load_scores
from sdxs_lightning.core.model_hash import hash_weights
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.guidance_input import add_guidance_input
from tests.helpers.refusals import refusal

BASE, STUDENT = "data/toy/base", "data/toy/student"
PROMPTS = ["a large red circle on a blue background", "a small green ring on a white background"]


@torch.no_grad()
def test_sampling_again_is_ddim_from_the_noised_latents() -> None:
    family = detect_family(BASE)
    unet = family.load_unet().eval()
    conditioning = family.encode_prompts(PROMPTS)
    latents, noise = torch.randn(2, 2, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler.from_pretrained(
        BASE, subfolder="scheduler", timestep_spacing="leading", steps_offset=0
    )
    scheduler.set_timesteps(5)  # 800, 600, 400, 200, 0
    expected = scheduler.add_noise(latents, noise, torch.tensor([600]))
    for timestep in scheduler.timesteps[1:4]:
        text = conditioning.doubled().prompt_embeds
        uncond, cond = unet(torch.cat([expected, expected]), timestep, text).sample.chunk(2)
        stepped = scheduler.step(uncond + 1.5 * (cond - uncond), timestep, expected)
        expected = stepped.prev_sample
    denoiser = Denoiser(unet, family.schedule, family.prediction_type)
    found = sampled_again(denoiser, latents, noise, 600, conditioning, 1.5, steps=3)
    torch.testing.assert_close(found, stepped.pred_original_sample, atol=1e-5, rtol=1e-4)


def test_two_equal_scores_mend_alike_and_a_broken_one_spoils_what_was_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_repair, "TIMESTEPS", (1, 700))
    options = ScoreRepairOptions(
        student=STUDENT,
        fake_score=BASE,
        guidance_scale=1.0,
        steps=1,
        samples=24,
        out=tmp_path / "repair.json",
    )
    shown = run(options)
    written = json.loads((tmp_path / "repair.json").read_text())
    assert (written["student"], written["fake_score"]) == (STUDENT, BASE)
    hashes = [hash_weights(f"{folder}/unet") for folder in (STUDENT, BASE)]
    assert [written["student_sha256"], written["fake_score_sha256"]] == hashes
    for by in written["captions_right"].values():
        assert by[REAL] == by[FAKE]
    assert 0 < written["captions_right_before"] < 1
    # At timestep 1 hardly anything is noised, so all stays as it was.
    nearly = written["captions_right"]["1"][REAL]
    assert (nearly["right"], nearly["wrong"], nearly["all"]) == (1.0, 0.0, written["captions_right_before"])
    assert f"| 1 | {written['captions_right_before']:.1%} |" in shown
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", torch_dtype=torch.float32)
    torch.nn.init.zeros_(unet.conv_out.weight)
    unet.save_pretrained(tmp_path / "broken")
    broken = score_repair.measure(
        ScoreRepairOptions(**{**vars(options), "fake_score": str(tmp_path / "broken")})
    )
    at_700 = broken["captions_right"]["700"]
    assert at_700[REAL] == written["captions_right"]["700"][REAL]
    assert at_700[FAKE]["right"] < 0.2 < at_700[REAL]["right"]


def test_a_place_that_cannot_be_written_and_a_missing_fake_score_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--student", STUDENT, "--fake_score", BASE]
    assert (
        refusal(main, [*line, "--out", tmp_path], capsys)
        == f"score_repair: '{tmp_path}' is a folder; give a file."
    )
    line = ["--student", STUDENT, "--fake_score", "nowhere"]
    assert "--fake_score 'nowhere'" in refusal(main, line, capsys)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped student as one of four steps, as a U-Net alone, and with the guidance scale as an input; a larger base."""
    path, source = tmp_path_factory.mktemp("students"), Path(STUDENT).resolve()
    (path / "four" / "scheduler").mkdir(parents=True)
    (path / "four" / "unet").symlink_to(source / "unet")
    four = {
        "_class_name": "LCMScheduler",
        "num_train_timesteps": 700,
        "original_inference_steps": 4,
        "prediction_type": "v_prediction",
    }
    (path / "four" / "scheduler" / "scheduler_config.json").write_text(json.dumps(four))
    (path / "alone").symlink_to(source / "unet")
    guided = detect_family(BASE).load_unet(STUDENT)
    add_guidance_input(guided, 8)
    guided.save_pretrained(path / "guided")
    shutil.copytree(BASE, path / "large")
    config = path / "large" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 32}))
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"student": "four"},
            "is a student of the timesteps [699, 524, 349, 174], and one of one step is measured",
        ),
        (
            {"student": "alone"},
            "has no scheduler beside its U-Net that tells its timestep; give --conditioning_timestep.",
        ),
        (
            {"student": "guided", "conditioning_timestep": 699},
            "guided' takes the guidance scale as an input (time_cond_proj_dim), which is not given here",
        ),
        ({"fake_score": "guided"}, "guided' takes the guidance scale as an input"),
        (
            {"base": "large"},
            "large' has images of 64 px, and captions are read from those of the toy world, of 32 px",
        ),
    ],
)
def test_what_is_no_student_of_one_step_or_no_base_of_it_is_refused(
    settings: dict[str, object], message: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {name: folders / value if isinstance(value, str) else value for name, value in settings.items()}
    given = {"student": STUDENT, "fake_score": BASE} | made
    line = [part for name, value in given.items() for part in (f"--{name}", value)]
    assert message in refusal(main, [*line, "--samples", 1, "--steps", 1], capsys)


def test_the_students_timestep_is_its_pipelines_unless_one_is_given(folders: Path) -> None:
    for student, timestep in ((STUDENT, 699), (BASE, 999)):
        assert load_scores(ScoreOptions(student=student, fake_score=BASE)).timestep == timestep
    given = ScoreOptions(student=str(folders / "four"), fake_score=BASE, conditioning_timestep=524)
    assert load_scores(given).timestep == 524
