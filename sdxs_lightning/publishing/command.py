"""`python -m sdxs_lightning.publish`: writes the folder, checks it, uploads it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sdxs_lightning.callbacks.run_folder import ORIGIN
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError
from sdxs_lightning.core.image_formats import readable_formats
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.publishing.calling import CONDITION, partner_folder, prompts_of, snippet_of
from sdxs_lightning.publishing.card import Facts, write_card
from sdxs_lightning.publishing.runs import Run, hub_id, licence_of, read_run
from sdxs_lightning.publishing.scores import Number, check_card, hash_of_export, read_numbers

if TYPE_CHECKING:
    from sdxs_lightning.publish import PublishOptions

MANIFEST = "publish.json"
"""Marks a folder that this command wrote: its name, its run, and the hashes of its weights."""
_REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def publish(options: PublishOptions) -> str:
    """Writes or checks the folder, and uploads it if asked to; returns a report.

    Raises:
        UserError: for an unfinished run, a number that is not the run's, an unknown licence, or a refusal of the hub.
        CheckpointNotWritten: if the disk refuses.
    """
    if options.repo_id is not None and not _REPO_ID.fullmatch(options.repo_id):
        raise UserError(f"--repo_id is '{options.repo_id}'; it has the form org/name.")
    run = read_run(options.run)
    numbers = read_numbers(run, hash_of_export(run))
    known = (options.out / MANIFEST).is_file()
    if options.out.exists() and not known and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(
            f"--out '{options.out}' exists and is not a folder of this command; remove it or give another one."
        )
    if not known:
        write_folder(run, numbers, options)
    check_folder(options.out, run, numbers, options.repo_id)
    lines = [
        f"{'checked' if known else 'written'}: {options.out} ({run.kind}, {len(numbers)} numbers"
        f"{'' if numbers else '; measure with python -m evaluation.evaluate --out ' + str(run.folder / 'scores.json')})"
    ]
    if options.repo_id is not None:
        lines.append(f"uploaded: {upload(options.out, options.repo_id, options.private)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- writing


def write_folder(run: Run, numbers: list[Number], options: PublishOptions) -> None:
    """Writes the folder, completely or not at all."""
    from safetensors import SafetensorError

    from sdxs_lightning.callbacks.checkpoint_folder import write_failure
    from sdxs_lightning.export import new_folder

    licence = licence_of(run, options.base_model, options.licence)
    if run.kind != "pipeline":
        partner_folder(run)
    try:
        with new_folder(options.out) as written:
            shutil.copytree(run.exported, written)
            _add(run, numbers, options, written, licence)
    except (OSError, SafetensorError) as error:
        problem = write_failure(error) or str(error)
        raise CheckpointNotWritten(f"--out '{options.out}' could not be written: {problem}.") from error


def _add(run: Run, numbers: list[Number], options: PublishOptions, folder: Path, licence: str) -> None:
    """Everything beside the exported weights."""
    shutil.copy(run.folder / "config.yaml", folder)
    if (run.folder / ORIGIN).is_file():
        shutil.copy(run.folder / ORIGIN, folder)
    for source in {number.source for number in numbers}:
        (folder / "scores").mkdir(exist_ok=True)
        shutil.copy(run.folder / source, folder / "scores" / Path(source).name)
    if run.kind == "lora":
        _add_kohya(run, folder)
    name = options.repo_id or f"your-name/{run.folder.resolve().name}"
    partner = options.student if run.kind in ("lora", "controlnet") else options.base_model or run.base
    partner = partner or partner_folder(run) if run.kind != "pipeline" else name
    assert partner is not None
    resolution = _resolution(run)
    if run.kind == "controlnet":
        _add_condition(options.condition, folder, resolution)
    prompts = options.prompts or prompts_of(run)
    steps = len(_timesteps(run))
    scale = options.scale if options.scale is not None else (0.8 if run.kind == "controlnet" else 1.0)
    snippets = [
        snippet_of(run, folder, name, partner, prompt, seed, steps, scale)
        for seed, prompt in enumerate(prompts)
    ]
    samples = []
    (folder / "samples").mkdir()
    for index, (prompt, snippet) in enumerate(zip(prompts, snippets, strict=True)):
        file = f"samples/{index}.png"
        snippet.run().save(folder / file)
        samples.append((file, prompt))
    adapted = options.student if run.kind in ("lora", "controlnet") else None
    facts = Facts(
        run=run,
        name=name,
        base_model=hub_id(adapted or options.base_model or run.base) or adapted or options.base_model,
        partner=partner,
        licence=licence,
        numbers=numbers,
        snippet=snippets[0],
        samples=samples,
        resolution=resolution,
        steps=steps,
        scale=scale,
    )
    (folder / "README.md").write_text(write_card(facts))
    (folder / MANIFEST).write_text(
        json.dumps(
            {"name": name, "kind": run.kind, "partner": partner, "weights": _weights(folder)}, indent=2
        )
        + "\n"
    )


def _add_kohya(run: Run, folder: Path) -> None:
    """The same LoRA under kohya's names."""
    from diffusers import UNet2DConditionModel

    from sdxs_lightning.families.sources import resolve_unet
    from sdxs_lightning.families.weights import load_network
    from sdxs_lightning.networks.lora_files import read_lora, write_lora

    unet = load_network(UNet2DConditionModel, resolve_unet(partner_folder(run)))
    (folder / "kohya").mkdir()
    write_lora(folder / "kohya", read_lora(run.exported, unet).adapters, "kohya")


def _add_condition(condition: Path | None, folder: Path, resolution: tuple[int, int]) -> None:
    from PIL import Image, ImageDraw, UnidentifiedImageError

    height, width = resolution
    if condition is not None:
        try:
            Image.open(condition, formats=readable_formats()).convert("RGB").resize((width, height)).save(
                folder / CONDITION
            )
        except (FileNotFoundError, UnidentifiedImageError) as error:
            raise UserError(f"--condition '{condition}' is no image ({error}).") from error
        return
    image = Image.new("RGB", (width, height))
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    ImageDraw.Draw(image).ellipse(box, outline="white", width=max(1, width // 128))
    image.save(folder / CONDITION)


def _resolution(run: Run) -> tuple[int, int]:
    """Height and width, pixels, of the pipeline that is called."""
    from sdxs_lightning.families.folders import vae_factor

    pipeline = run.exported if run.kind == "pipeline" else Path(partner_folder(run))
    side = read_json(pipeline / "unet" / "config.json")["sample_size"]
    height, width = side if isinstance(side, list) else (side, side)
    factor = vae_factor(read_json(pipeline / "vae" / "config.json"))
    return height * factor, width * factor


def _timesteps(run: Run) -> list[int]:
    """Timesteps of a student of several steps; one entry for a one-step student."""
    student = run.settings.get("student")
    arguments = student.get("init_args", {}) if isinstance(student, dict) else {}
    return list(arguments.get("timesteps") or [0])


# ------------------------------------------------------------------------------------------------- checking, uploading


def check_folder(folder: Path, run: Run, numbers: list[Number], repo_id: str | None) -> None:
    """Checks a folder of this command against its run.

    Raises:
        UserError: for other weights than the run's, a number that is not the run's, or another name than the card's.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest["weights"] != _weights(folder):
        raise UserError(
            f"the weights in '{folder}' are not those that were written there; remove the folder and run again."
        )
    exported = {file.relative_to(run.exported).as_posix() for file in run.exported.rglob("*.safetensors")}
    for name in exported:
        if manifest["weights"].get(name) != _digest(run.exported / name):
            raise UserError(
                f"'{folder / name}' is not what the run '{run.folder}' exported; remove the folder and run again."
            )
    if repo_id is not None and manifest["name"] != repo_id:
        raise UserError(
            f"--repo_id is {repo_id}, and the card's code calls {manifest['name']}; remove '{folder}' and run again with "
            "--repo_id."
        )
    check_card((folder / "README.md").read_text(), numbers)


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads a folder to the hub, in one commit; returns its address.

    Raises:
        UserError: without network or token, or if the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo_id=repo_id, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload model",
            ignore_patterns=[".*"],
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"the hub did not take '{repo_id}' ({str(error).strip().splitlines()[0]}); log in with `hf auth login`, or see "
            "HF_TOKEN and HF_HUB_OFFLINE. The folder is complete: the same command uploads it."
        ) from error
    return str(commit)


def _weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): _digest(file) for file in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
