"""The generator on PyTorch: equal to diffusers' pipelines of the same folder, and what it refuses."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from evaluation.images.samples import ModelSamples, PipelineImages, StudentImages, load_pipeline
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.latents import to_uint8
from sdxs_lightning.inference.generator import NotFiniteWarning, OneStepGenerator, sample_images
from sdxs_lightning.inference.inputs import image_tensor
from sdxs_lightning.inference.model_folder import is_student
from sdxs_lightning.lora import ConvertOptions, convert
from sdxs_lightning.networks.controlnet import controlnet_from_unet, save_controlnet
from tests.helpers.students import KINDS, PROMPTS, SEEDS, condition, stock_images

SIZES = [(32, 32), (24, 40), (48, 32), (40, 40)]
Students = Callable[[str], Path]


def pixels(generator: OneStepGenerator, **given: Any) -> Tensor:
    return (generator.sample(PROMPTS, SEEDS, **given).float() / 2 + 0.5).clamp(0, 1)


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_stock_pipeline(name: str, student: Students) -> None:
    generator = OneStepGenerator.load(student(name), device="cpu")
    assert len(generator.plan.steps) == (4 if "4" in name else 1)
    for size in SIZES:
        expected = stock_images(student(name), size)
        assert largest(pixels(generator, size=size), expected) <= 1e-5
    images = generator.generate(PROMPTS, SEEDS, size=size)
    levels = (images.int() - to_uint8(expected * 2 - 1).int()).abs()
    # Equal but where 1e-5 decides between two levels.
    assert images.dtype == torch.uint8 and int(levels.max()) <= 1 and float(levels.float().mean()) <= 0.01
    assert float(expected.std()) > 0.05  # not all black or grey


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd-midless", "sdxl-4-steps"])
def test_equals_the_stock_pipeline_in_half_precision(name: str, student: Students) -> None:
    generator = OneStepGenerator.load(student(name), device="cpu", dtype="fp16")
    expected = stock_images(student(name), dtype=torch.float16)
    assert largest(pixels(generator), expected) <= 2e-2
    assert float((pixels(generator) - expected).abs().mean()) <= 1e-3


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd-midless", "sdxl-4-steps"])
def test_controlnet_equals_the_stock_pipeline(name: str, student: Students) -> None:
    folder = student(name)
    generator = OneStepGenerator.load(folder, controlnet=f"{folder}-controlnet", device="cpu")
    without = pixels(generator, size=(24, 40))
    for scale in (1.0, 0.4):
        images = condition(2, (24, 40))
        expected = stock_images(folder, (24, 40), control_images=images, control_scale=scale)
        found = pixels(generator, control_images=images, control_scale=scale, size=(24, 40))
        assert largest(found, expected) <= 1e-5
        assert largest(found, without) > 0.02
        other = pixels(
            generator, control_images=condition(2, (24, 40), 7), control_scale=scale, size=(24, 40)
        )
        assert largest(found, other) > 1e-3
    assert largest(without, pixels(OneStepGenerator.load(folder, device="cpu"), size=(24, 40))) == 0


@pytest.mark.parametrize("name", ["sd", "sdxl-midless"])
def test_lora_equals_the_stock_pipeline_at_every_scale(name: str, student: Students) -> None:
    folder = student(name)
    plain = pixels(OneStepGenerator.load(folder, device="cpu"))
    generator = OneStepGenerator.load(folder, lora=f"{folder}-lora", device="cpu", lora_scale=0.5)
    for scale in (0.5, 1.0, 0.0):
        generator.set_lora_scale(scale)
        expected = stock_images(folder, lora_scale=scale)
        assert largest(pixels(generator), expected) <= 1e-5
    assert torch.equal(pixels(generator), plain)  # scale 0 restores the weights bit by bit
    generator.set_lora_scale(1.0)
    assert largest(pixels(generator), plain) > 0.02


@pytest.mark.parametrize(
    ("name", "strength"),
    [
        ("sd", 0.5),
        ("sdxl", 0.25),
        ("sd-midless", 0.5),
        ("sd-4-steps", 0.5),
        ("sdxl-4-steps", 0.75),
        ("sd", 1.0),
    ],
)
def test_image_to_image_equals_the_stock_pipeline(name: str, strength: float, student: Students) -> None:
    image = condition(2, (32, 32))
    generator = OneStepGenerator.load(student(name), device="cpu")
    expected = stock_images(student(name), image=image, strength=strength)
    assert largest(pixels(generator, image=image, strength=strength), expected) <= 1e-5
    one = pixels(generator, image=Image.fromarray(image[0].permute(1, 2, 0).numpy()), strength=strength)
    assert torch.allclose(one[0], expected[0], atol=1e-5)  # one image for all prompts
    assert largest(pixels(generator, image=condition(2, (32, 32), 9), strength=strength), expected) > 1e-3


def test_an_image_is_a_function_of_its_prompt_and_seed(student: Students) -> None:
    generator = OneStepGenerator.load(student("sd-4-steps"), device="cpu")
    both = generator.generate(PROMPTS, SEEDS)
    for i in (0, 1):
        assert int((generator.generate(PROMPTS[i], SEEDS[i])[0].int() - both[i].int()).abs().max()) <= 1
    assert torch.equal(generator.generate(PROMPTS, 3), generator.generate(PROMPTS, [3, 4]))
    array = np.asarray(condition(1, (32, 32))[0].permute(1, 2, 0))
    given = generator.generate(PROMPTS, SEEDS, image=array, strength=0.5)
    assert torch.equal(given, generator.generate(PROMPTS, SEEDS, image=condition(1, (32, 32)), strength=0.5))


def test_evaluate_samples_students_with_it(student: Students) -> None:
    """The images that the metrics of an exported student see are those of its stock pipeline, from evaluation's noise."""
    for name, steps in (("sd-midless", 1), ("sdxl-4-steps", 4)):
        samples = ModelSamples(str(student(name)), tuple(PROMPTS), steps=steps, seed=5)
        maker = samples.maker(torch.device("cpu"))
        assert isinstance(maker, StudentImages)
        pipeline = load_pipeline(student(name))
        pipeline.set_progress_bar_config(disable=True)
        expected = PipelineImages(pipeline, steps, 1.0, 5)(PROMPTS, torch.tensor([4, 9]))
        found = maker(PROMPTS, torch.tensor([4, 9]))
        assert int((found.int() - expected.int()).abs().max()) <= 1
        assert float((found != expected).float().mean()) < 1e-3
    guided = ModelSamples(str(student("sd")), tuple(PROMPTS), steps=2, guidance_scale=2.0)
    assert isinstance(guided.maker(torch.device("cpu")), PipelineImages)


def test_prompts_are_embedded_once(student: Students) -> None:
    generator = OneStepGenerator.load(student("sdxl"), device="cpu")
    calls: list[int] = []
    encode = generator.networks.encode_prompts
    generator.networks.encode_prompts = lambda ids: calls.append(len(ids[0])) or encode(ids)  # type: ignore
    first = generator.generate([*PROMPTS, PROMPTS[0]], 0)
    assert calls == [2]
    assert torch.equal(generator.generate([*PROMPTS, PROMPTS[0]], 0), first) and calls == [2]


def test_a_prompt_that_is_cut_is_named_once(student: Students) -> None:
    generator = OneStepGenerator.load(student("sd"), device="cpu")
    longest = CLIPTokenizer.from_pretrained(student("sd") / "tokenizer").model_max_length
    fits = " ".join(["red"] * (longest - 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate([fits], [0])
    message = (
        rf"the prompt 'red red .*' has {longest + 1} tokens and the text encoder takes {longest}: 'circle' is"
    )
    with pytest.warns(UserWarning, match=message):
        generator.generate([f"{fits} circle", f"{fits} square"], [0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate([f"{fits} star"], [0])


def test_the_compiled_step_is_one_graph(guided: Students, monkeypatch: pytest.MonkeyPatch) -> None:
    """From noise to pixels, once for a shape; the C++ compiler, which takes minutes, is left out."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    folder = guided("sd-midless")
    controlnet = f"{folder}-controlnet"
    generator = OneStepGenerator.load(folder, controlnet=controlnet, device="cpu", compiled=True)
    plain = OneStepGenerator.load(folder, controlnet=controlnet, device="cpu")
    images = condition(2, (32, 32))
    for i, strength in enumerate(
        (1.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    ):  # torch's own limit is 8 graphs
        given: dict[str, Any] = {
            "image": images,
            "strength": strength,
            "control_images": images,
            "control_scale": i / 8,
            "guidance_scale": 1 + i / 8,
        }
        assert largest(pixels(generator, **given), pixels(plain, **given)) <= 1e-5
    assert len(graphs) == 1
    monkeypatch.setattr("sdxs_lightning.inference.generator.GRAPHS", 1)
    with pytest.raises(UserError, match="more than 1 combinations of batch size, image size and inputs"):
        generator.sample(PROMPTS, SEEDS, size=24, guidance_scale=2.0)


def test_a_compiled_image_stays_what_it_is(student: Students, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs write every image to the same memory."""
    memory: list[Tensor] = []

    def replayed(*given: Any) -> Tensor:
        image = sample_images(*given)
        if not memory:
            memory.append(image)
        return memory[0].copy_(image)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: replayed)
    generator = OneStepGenerator.load(student("sd"), device="cpu", compiled=True)
    first = generator.sample(PROMPTS, SEEDS)
    kept = first.clone()
    generator.sample(PROMPTS, 20)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["sd-4-steps", "sdxl-4-steps"])
def test_timesteps_are_copied_to_the_device_once(
    name: str, student: Students, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers makes a tensor of a Python number at each call, and a host waits for that copy."""
    folder = student(name)
    generator = OneStepGenerator.load(folder, controlnet=f"{folder}-controlnet", device="cpu")
    given: dict[str, Any] = {"control_images": condition(2, (32, 32))}
    expected = generator.sample(PROMPTS, SEEDS, **given)
    made: list[Any] = []
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *one, **named: made.append(one) or make(*one, **named))  # type: ignore
    assert torch.equal(generator.sample(PROMPTS, SEEDS, **given), expected)
    assert len(made) == ("sdxl" in name)  # SDXL's size conditioning, of the caller's size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 36}, r"`size` is 36x36, but height and width must be multiples of 8; the nearest is 32x32"),
        ({"size": (32, 4)}, "`size` is 32x4"),
        (
            {"size": (32, 32, 3)},
            r"`size` is \(32, 32, 3\), but must be a side in pixels, or \(height, width\)",
        ),
        ({"size": 32.0}, r"`size` is 32.0, but must be a side"),
        ({"seeds": [1]}, r"1 seeds for 2 prompt\(s\)"),
        ({"seeds": [1.5, 2]}, "`seeds` has 1.5, but a seed is an integer"),
        ({"seeds": 2**64 - 1}, r"`seeds` has 18446744073709551616, and torch takes those from -2\*\*63 to"),
        ({"prompts": [PROMPTS[0], "a \udcff"]}, r"`prompts`\[1\] is 'a .udcff', which is no text in UTF-8"),
        ({"prompts": None}, r"`prompts`\[0\] is a NoneType, expected text"),
        ({"image": 3, "strength": 0.5}, r"image\[0\] is int64 of shape \(\), expected uint8"),
        (
            {"image": condition(2, (32, 32))},
            "`image` and `strength` belong together, and `strength` is missing",
        ),
        ({"strength": 0.5}, "and `image` is missing"),
        (
            {"image": condition(2, (32, 32)), "strength": 1.5},
            "`strength` is 1.5, but must be above 0 and at most 1",
        ),
        ({"image": condition(2, (24, 32)), "strength": 0.5}, r"image\[0\] is 24x32, and the output 32x32"),
        ({"control_images": condition(2, (32, 32))}, "loaded without ControlNet; give one as `controlnet`"),
    ],
)
def test_inputs_that_do_not_fit(given: dict[str, Any], message: str, student: Students) -> None:
    generator = OneStepGenerator.load(student("sd"), device="cpu")
    with pytest.raises(UserError, match=message):
        generator.generate(**{"prompts": PROMPTS} | given)
    with pytest.raises(UserError, match="there is no prompt"):
        generator.generate([])


def test_wrong_number_and_kind_of_control_images(student: Students) -> None:
    folder = student("sd")
    generator = OneStepGenerator.load(folder, controlnet=f"{folder}-controlnet", device="cpu")
    with pytest.raises(
        UserError, match=r"control_images has 3 image\(s\) for 2 prompt\(s\); give one for each, or one"
    ):
        generator.generate(PROMPTS, control_images=condition(3, (32, 32)))
    with pytest.raises(
        UserError, match=r"control_images\[0\] is torch.float32 of shape \(3, 32, 32\), expected uint8"
    ):
        generator.generate(PROMPTS, control_images=condition(2, (32, 32)) / 255)
    with pytest.raises(UserError, match=r"control_images\[0\] is uint8 of shape \(32, 32\), expected"):
        generator.generate(PROMPTS, control_images=[np.zeros((32, 32), np.uint8)])
    with pytest.raises(UserError, match="`control_scale` is nan, but must be a finite number"):
        generator.generate(PROMPTS, control_images=condition(2, (32, 32)), control_scale=float("nan"))
    no_numbers: tuple[Any, ...] = ("0.5", torch.tensor(0.5), float("nan"))
    for strength in no_numbers:
        with pytest.raises(UserError, match="`strength` is .*, but must be a finite number"):
            generator.generate(PROMPTS, image=condition(2, (32, 32)), strength=strength)


def test_seeds_and_sizes_of_numpy_are_numbers_too(student: Students) -> None:
    generator = OneStepGenerator.load(student("sd"), device="cpu")
    expected = generator.generate(PROMPTS, [3, 4], size=(32, 40))
    for seeds in (np.int64(3), np.array([3, 4]), torch.tensor([3, 4])):
        found = generator.generate(PROMPTS, seeds, size=(np.int64(32), 40))  # type: ignore[arg-type]
        assert torch.equal(found, expected)


def test_broken_images_are_no_silent_black(student: Students) -> None:
    folder = student("sd")
    with pytest.raises(UserError, match="`lora_scale` is inf, but must be a finite number"):
        OneStepGenerator.load(folder, lora=f"{folder}-lora", lora_scale=float("inf"), device="cpu")
    generator = OneStepGenerator.load(folder, lora=f"{folder}-lora", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate(PROMPTS)
    generator.set_lora_scale(1e38)
    with pytest.warns(NotFiniteWarning, match="2 of 2 images have NaN or infinity, .*: perhaps its weights"):
        images = generator.generate(PROMPTS)
    assert int(images.max()) == 0


def test_strength_of_few_steps(student: Students) -> None:
    plan = OneStepGenerator.load(student("sd-4-steps"), device="cpu").plan
    assert [step.timestep for step in plan.from_strength(0.5).steps] == [499, 249]
    with pytest.raises(
        UserError, match="`strength` 0.2 leaves none of the model's 4 steps; give at least 0.25"
    ):
        plan.from_strength(0.2)


def test_folders_that_do_not_fit(student: Students, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model in .*model_index.json is missing"):
        OneStepGenerator.load(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for given in (run, run / "pipeline"):  # a run that was stopped
        with pytest.raises(
            UserError, match=rf"'{run}' has not exported one; continue it by --ckpt_path last"
        ):
            OneStepGenerator.load(given)
    for name in ("unet", "condition_reader"):  # of stages that make no pipeline, however long they go on
        (run / name).mkdir()
        with pytest.raises(
            UserError, match="give the `pipeline` folder that a training exported, or an export"
        ):
            OneStepGenerator.load(run)
        (run / name).rmdir()
    shutil.copytree(student("sd"), run / "pipeline")
    with pytest.raises(UserError, match=rf"give its folder 'pipeline', '{run}/pipeline', or an export"):
        OneStepGenerator.load(run)
    with pytest.raises(
        UserError, match=r"is a diffusers folder, which `backend` torch runs; for onnx export it first"
    ):
        OneStepGenerator.load(student("sd"), backend="onnx")
    broken = tmp_path / "copy"
    shutil.copytree(student("sd"), broken)
    scheduler = broken / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(config | {"_class_name": "EulerDiscreteScheduler"}))
    with pytest.raises(
        UserError, match="has a EulerDiscreteScheduler, and students have a DDIMScheduler or LCM"
    ):
        OneStepGenerator.load(broken)
    for change, message in (
        ({"timestep_spacing": "leading"}, "base of many steps .* with timestep_spacing leading"),
        ({"set_alpha_to_one": False}, "base of many steps .* whose last step leaves noise"),
    ):
        scheduler.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            OneStepGenerator.load(broken)
        assert not is_student(broken, 1) and is_student(student("sd"), 1)
    with pytest.raises(
        UserError, match="lora_scal is no argument of load; further ones of the backend torch: none"
    ):
        OneStepGenerator.load(student("sd"), lora_scal=0.3)
    with pytest.raises(UserError, match="static_shapes is no .* of the backend onnx: providers, threads"):
        OneStepGenerator.load(student("sd"), "onnx", static_shapes=True)
    with pytest.raises(UserError, match="is a student of one step, got `steps` 4"):
        OneStepGenerator.load(student("sd"), steps=4)
    with pytest.raises(UserError, match="`dtype` is 'half', but must be one of fp32, fp16, bf16"):
        OneStepGenerator.load(student("sd"), dtype="half")
    with pytest.raises(UserError, match="`dtype` is 'torch.int8', but must be one of"):
        OneStepGenerator.load(student("sd"), dtype=torch.int8)
    with pytest.raises(UserError, match="`backend` is 'tensorrt', but must be one of torch, onnx, openvino"):
        OneStepGenerator.load(student("sd"), backend="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="down residuals of widths|reads prompts of width"):
        OneStepGenerator.load(student("sdxl"), controlnet=f"{student('sd')}-controlnet")
    unet = UNet2DConditionModel.from_pretrained(student("sd") / "unet")
    for settings, message in (
        ({"stem_widths": (8, 8, 8, 8)}, r"controlnet '.*' makes condition images 8 times smaller"),
        ({"stem_widths": (8, 8), "conditioning_channels": 1}, r"reads condition images of 1 channel\(s\)"),
    ):
        save_controlnet(controlnet_from_unet(unet, **settings), tmp_path / "controlnet")
        with pytest.raises(UserError, match=message):
            OneStepGenerator.load(student("sd"), controlnet=tmp_path / "controlnet")
    with pytest.raises(UserError, match="trained for another base"):
        OneStepGenerator.load(student("sdxl"), lora=f"{student('sd')}-lora")


def test_files_that_are_cut_off(student: Students, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(student("sd"), folder)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    lcm = json.dumps(scheduler | {"_class_name": "LCMScheduler"})
    for file, content, message in (
        ("unet/config.json", "{", "is not readable as JSON"),
        ("vae/config.json", "{", "is not readable as JSON"),
        ("scheduler/scheduler_config.json", lcm, "an LCMScheduler without original_inference_steps"),
        (
            "scheduler/scheduler_config.json",
            json.dumps(scheduler | {"num_train_timesteps": "x"}),
            "cannot take 1 steps: ",
        ),
        ("tokenizer/tokenizer.json", "", "the tokenizer in .* cannot be read .*; was a file cut off"),
    ):
        before = (folder / file).read_text()
        (folder / file).write_text(content)
        with pytest.raises(UserError, match=message):
            OneStepGenerator.load(folder, device="cpu")
        (folder / file).write_text(before)


def test_a_lora_of_text_encoders_too(student: Students, tmp_path: Path) -> None:
    shutil.copy(
        student("sd").with_name("sd-lora") / "pytorch_lora_weights.safetensors", tmp_path / "a.safetensors"
    )
    tensors = load_file(tmp_path / "a.safetensors")
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors |= {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"1 layers of text encoders.*sdxs_lightning.lora convert` writes it without"
    ):
        OneStepGenerator.load(student("sd"), lora=tmp_path / "a.safetensors", device="cpu")
    out = tmp_path / "converted"
    convert(
        ConvertOptions(
            lora=str(tmp_path / "a.safetensors"), model=str(student("sd")), out=out, dtype="float32"
        )
    )
    expected = OneStepGenerator.load(student("sd"), lora=f"{student('sd')}-lora", device="cpu").generate(
        PROMPTS
    )
    found = OneStepGenerator.load(student("sd"), lora=out, device="cpu").generate(PROMPTS)
    assert int((found.int() - expected.int()).abs().max()) <= 1


def test_deep_and_transparent_images_are_read_as_in_training() -> None:
    """Pillow's own conversion clips 16-bit grey to white, and drops alpha."""
    deep = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    (frame,) = image_tensor(Image.fromarray(deep), 1, (4, 4), "image")
    assert np.array_equal(frame.numpy(), np.broadcast_to(deep >> 8, (3, 4, 4)))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert image_tensor(clear, 1, (4, 4), "image").unique().tolist() == [255]
    with pytest.raises(UserError, match=r"image\[0\]: its pixels are 32-bit numbers"):
        image_tensor(Image.new("F", (4, 4)), 1, (4, 4), "image")
