"""`python -m sdxs_lightning.publish`: writes the folder, checks it, uploads it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxs_lightning.callbacks.run_folder import ORIGIN
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError, first_line
from sdxs_lightning.core.image_formats import fitted, readable_formats
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.publishing.calling import (
    CONDITION,
    Settings,
    partner_folder,
    prompts_of,
    settings_of,
    snippet_of,
)
from sdxs_lightning.publishing.card import Facts, write_card
from sdxs_lightning.publishing.runs import Run, hub_id, licence_of, read_run
from sdxs_lightning.publishing.scores import Number, check_card, read_scores

if TYPE_CHECKING:
    from sdxs_lightning.publish import PublishOptions

MANIFEST = "publish.json"
"""Marks a folder that this command wrote: its name, code, licence, how the code calls it, and the hashes of its files."""
NOTED = {"name", "calling", "code", "licence", "files"}
"""What it has to hold."""
ADDED = {"", ".md", ".txt", ".png", ".jpg", ".webp", ".gif"}
"""Kinds of files that may be added to a folder by hand: the licence, pictures for the card."""


def publish(options: PublishOptions) -> str:
    """Writes or checks the folder, and uploads it if asked to; returns a report.

    Raises:
        UserError: for an unfinished run, a number that is not the run's, an unknown licence, or a refusal of the hub.
        CheckpointNotWritten: if the disk refuses.
    """
    _check_repo_id(options.repo_id)
    run = read_run(options.run)
    _check_options(options, run)
    known = (options.out / MANIFEST).is_file()
    if options.out.exists() and not known and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(
            f"--out '{options.out}' exists and is not a folder of this command; remove it or give another one."
        )
    if options.out.resolve().is_relative_to(run.exported.resolve()):
        raise UserError(
            f"--out '{options.out}' is inside of '{run.exported}', which is copied; give another folder."
        )
    partner = partner_folder(run, options.partner)
    settings = (
        _stored_settings(options)
        if known
        else settings_of(run, partner, options.steps, options.guidance_scale, options.scale)
    )
    scores = read_scores(run, settings, partner)
    if not known:
        write_folder(run, scores.numbers, settings, partner, options)
    check_folder(options.out, run, scores.numbers, options.repo_id)
    count = len(scores.numbers)
    hint = f"; measure with python -m evaluation.evaluate --out {run.folder / 'scores.json'}"
    lines = [
        f"{'checked' if known else 'written'}: {options.out} ({run.kind}, {count} numbers{'' if count else hint})"
    ]
    if scores.skipped:
        lines.append(f"not read as scores, without metrics and hashes: {', '.join(scores.skipped)}")
    if options.repo_id is not None:
        lines.append(f"uploaded: {upload(options.out, options.repo_id, options.private)}")
    return "\n".join(lines)


def _check_options(options: PublishOptions, run: Run) -> None:
    """Raises UserError for options that would be without effect."""
    if options.base_model is not None and hub_id(options.base_model) is None:
        raise UserError(f"--base_model is '{options.base_model}'; give the base's hub id (org/name).")
    students = "LoRAs and ControlNets of a student"
    useless = {
        "student": (run.for_base or run.kind == "pipeline", students),
        "partner": (run.kind == "pipeline", "LoRAs, ControlNets and decoders"),
        "condition": (run.kind != "controlnet", "ControlNets"),
    }
    for name, (is_useless, whose) in useless.items():
        if getattr(options, name) is not None and is_useless:
            raise UserError(f"--{name} is of {whose}, and this run made a {run.kind}; leave it out.")


def _check_repo_id(repo_id: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if repo_id is None:
        return
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id is '{repo_id}': {' '.join(str(error).split())}") from error
    if "/" not in repo_id:
        raise UserError(f"--repo_id is '{repo_id}'; it has the form org/name.")


# ------------------------------------------------------------------------------------------------------------- writing


def write_folder(
    run: Run, numbers: Sequence[Number], settings: Settings, partner: Path, options: PublishOptions
) -> None:
    """Writes the folder, completely or not at all."""
    from safetensors import SafetensorError

    from sdxs_lightning.callbacks.checkpoint_folder import write_failure
    from sdxs_lightning.export import new_folder

    licence = licence_of(run, options.base_model, options.licence)
    try:
        with new_folder(options.out) as written:
            shutil.copytree(run.exported, written)
            _add(run, numbers, settings, partner, options, written, licence)
    except (OSError, SafetensorError) as error:
        problem = write_failure(error) or str(error)
        raise CheckpointNotWritten(f"--out '{options.out}' could not be written: {problem}.") from error


def _add(
    run: Run,
    numbers: Sequence[Number],
    settings: Settings,
    partner: Path,
    options: PublishOptions,
    folder: Path,
    licence: str,
) -> None:
    """Everything beside the exported weights."""
    for name, source in _copies(run, numbers).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, folder / name)
    if run.kind == "lora":
        _add_kohya(run, partner, folder)
    name = options.repo_id or f"your-name/{run.folder.resolve().name}"
    # A LoRA or ControlNet of a student is one of the student for the hub too; all else is made from the base.
    of_student = run.kind in ("lora", "controlnet") and not run.for_base
    used = options.student if of_student else options.base_model or hub_id(run.base)
    partner_name = name if run.kind == "pipeline" else used or str(partner)
    resolution = _resolution(partner)
    if run.kind == "controlnet":
        _add_condition(options.condition, folder, resolution)
    prompts = options.prompts or prompts_of(run)
    snippets = [
        snippet_of(run, (name, partner_name), (folder, partner), prompt, seed, settings)
        for seed, prompt in enumerate(prompts)
    ]
    samples = []
    (folder / "samples").mkdir()
    for index, (prompt, snippet) in enumerate(zip(prompts, snippets, strict=True)):
        file = f"samples/{index}.png"
        snippet.run().save(folder / file)
        samples.append((file, prompt))
    facts = Facts(
        run=run,
        name=name,
        base_model=(hub_id(options.student) if of_student else None)
        or hub_id(options.base_model or run.base),
        partner=partner_name,
        licence=licence,
        numbers=numbers,
        snippet=snippets[0],
        samples=samples,
        resolution=resolution,
        settings=settings,
    )
    (folder / "README.md").write_text(write_card(facts), encoding="utf-8")
    content = {"name": name, "kind": run.kind, "partner": partner_name, "calling": asdict(settings)}
    content |= {"code": snippets[0].code, "licence": licence, "files": _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def _copies(run: Run, numbers: Sequence[Number]) -> dict[str, Path]:
    """Files of the run that stand in the folder as they are: name there, file here.

    Raises:
        UserError: for two score files of one name.
    """
    found = {name: run.folder / name for name in ("config.yaml", ORIGIN) if (run.folder / name).is_file()}
    for source in sorted({number.source for number in numbers}):
        name = f"scores/{Path(source).name}"
        if name in found:
            raise UserError(
                f"'{found[name]}' and '{run.folder / source}' have one name, and the folder has one place for it; rename one."
            )
        found[name] = run.folder / source
    return found


def _add_kohya(run: Run, partner: Path, folder: Path) -> None:
    """The same LoRA under kohya's names."""
    from diffusers import UNet2DConditionModel

    from sdxs_lightning.families.sources import resolve_unet
    from sdxs_lightning.families.weights import load_network
    from sdxs_lightning.networks.lora_files import read_lora, write_lora

    unet = load_network(UNet2DConditionModel, resolve_unet(str(partner), "--partner"))
    (folder / "kohya").mkdir()
    try:
        write_lora(folder / "kohya", read_lora(run.exported, unet).adapters, "kohya")
    except ValueError as error:  # of another network than the partner's, or never trained
        raise UserError(str(error)) from error


def _add_condition(condition: Path | None, folder: Path, resolution: tuple[int, int]) -> None:
    from PIL import Image, ImageDraw

    height, width = resolution
    if condition is not None:
        try:
            with Image.open(condition, formats=readable_formats()) as opened:
                fitted(opened, (height, width)).save(folder / CONDITION)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"--condition '{condition}' cannot be read as an image ({error}).") from error
        return
    image = Image.new("RGB", (width, height))
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    ImageDraw.Draw(image).ellipse(box, outline="white", width=max(1, width // 128))
    image.save(folder / CONDITION)


def _resolution(pipeline: Path) -> tuple[int, int]:
    """Height and width, pixels, of the pipeline that is called."""
    from sdxs_lightning.families.folders import vae_factor

    side = read_json(pipeline / "unet" / "config.json")["sample_size"]
    height, width = side if isinstance(side, list) else (side, side)
    factor = vae_factor(read_json(pipeline / "vae" / "config.json"))
    return height * factor, width * factor


# ------------------------------------------------------------------------------------------------- checking, uploading


def _stored_settings(options: PublishOptions) -> Settings:
    """How the card's code in a folder of this command calls the model.

    Raises:
        UserError: for a folder of an older version, or options that say something else.
    """
    found = _manifest(options.out)
    settings = Settings(**found["calling"])
    for name in ("steps", "guidance_scale", "scale"):
        given = getattr(options, name)
        if given is not None and given != getattr(settings, name):
            raise UserError(
                f"--{name} is {given}, and the card's code in '{options.out}' has {getattr(settings, name)}; remove the folder "
                "and run again."
            )
    return settings


def _manifest(folder: Path) -> dict[str, Any]:
    """What this command noted of a folder; raises UserError for that of another version, or a damaged one."""
    try:
        found = read_json(folder / MANIFEST)
    except ValueError as error:
        raise UserError(f"{error} Remove '{folder}' and run again.") from error
    names = {field.name for field in fields(Settings)}
    if (
        not found.keys() >= NOTED
        or not isinstance(found["calling"], dict)
        or found["calling"].keys() != names
    ):
        raise UserError(
            f"'{folder}' is of another version of this command, which noted other things; remove it and run again."
        )
    return found


def check_folder(folder: Path, run: Run, numbers: Sequence[Number], repo_id: str | None) -> None:
    """Checks a folder of this command against its run.

    Raises:
        UserError: for other files than were written or than the run's, a number that is not the run's, or another name than
            the card's.
    """
    manifest = _manifest(folder)
    written, found = manifest["files"], _files(folder)
    if not (folder / "README.md").is_file():
        raise UserError(f"'{folder / 'README.md'}' is missing; remove the folder and run again.")
    for name in sorted(written.keys() | found.keys()):
        added = name not in written and Path(name).suffix in ADDED and not name.startswith("scores/")
        if written.get(name) != found.get(name) and not added:
            what = "is missing" if name not in found else "is not what was written there"
            raise UserError(f"'{folder / name}' {what}; remove the folder and run again.")
    of_run = {path.relative_to(run.exported).as_posix(): path for path in _paths(run.exported)}
    for name, file in (of_run | _copies(run, numbers)).items():
        if found.get(name) != _digest(file):
            raise UserError(
                f"'{folder / name}' is not what is in the run '{run.folder}'; remove the folder and run again."
            )
    if repo_id is not None and manifest["name"] != repo_id:
        raise UserError(
            f"--repo_id is {repo_id}, and the card's code calls {manifest['name']}; remove '{folder}' and run again with "
            "--repo_id."
        )
    text = (folder / "README.md").read_text(encoding="utf-8")
    if manifest["code"] not in text:
        raise UserError(
            f"'{folder / 'README.md'}' has other code than made the samples and was measured; remove the folder and run again."
        )
    check_card(text, numbers, manifest["licence"])


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads a folder to the hub, in one commit; returns its address.

    Raises:
        UserError: without network or token, or if the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

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
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise UserError(
            f"the hub did not take '{repo_id}' ({first_line(error)}); log in with `hf auth login`, or see "
            "HF_TOKEN and HF_HUB_OFFLINE. The folder is complete: the same command uploads it."
        ) from error
    return str(commit)


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the card, which may be edited, and the list itself; hidden ones are not uploaded."""
    named = {path.relative_to(folder).as_posix(): path for path in _paths(folder)}
    return {name: _digest(path) for name, path in named.items() if name not in ("README.md", MANIFEST)}


def _paths(folder: Path) -> list[Path]:
    """The files of a folder, without hidden ones."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
