"""What a finished run says of itself: what it made, from what, on which data, with which code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sdxs_lightning.callbacks.run_folder import ORIGIN, last_beginning
from sdxs_lightning.core.errors import UserError, one_line
from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.families.folders import card_licence, read_json

Kind = Literal["pipeline", "lora", "controlnet", "decoder"]
KINDS: tuple[Kind, ...] = ("pipeline", "lora", "controlnet", "decoder")
"""What stages export, and the name of the folder in the run."""

LICENCES = {
    "stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-2-1": "openrail++",
    "stable-diffusion-2-1-base": "openrail++",
    "stable-diffusion-xl-base-1.0": "openrail++",
}
"""Licences of the usual bases, in the hub's spelling, by the last part of their hub id."""

FAMILIES = {"StableDiffusion": "stable-diffusion", "StableDiffusionXL": "stable-diffusion-xl"}
"""Classes of families that a card can be written for, with the hub's tag of each."""


_ENTRIES: tuple[tuple[str, type | tuple[type, ...], bool], ...] = (
    ("model", dict, True),
    ("model.class_path", str, True),
    ("model.init_args.family", dict, True),
    ("model.init_args.family.class_path", str, True),
    ("model.init_args.family.init_args.base", str, True),
    ("model.init_args.student.init_args", dict, False),
    ("model.init_args.student.init_args.controlnet", dict, False),
    ("model.init_args.student.init_args.controlnet.conditioning_scale", (int, float), False),
    ("model.init_args.controlnet", dict, False),
    ("model.init_args.controlnet.conditioning_scale", (int, float), False),
    ("model.init_args.style", dict, False),
    ("model.init_args.style.path", str, False),
    ("model.init_args.style.scale", (int, float), False),
    ("data", dict, True),
    ("data.class_path", str, True),
    ("data.init_args", dict, False),
)
"""Entries of a configuration that are read: name, type, and whether it is required."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    kind: Kind
    config: dict[str, Any]
    """config.yaml, resolved."""
    origin: dict[str, Any]
    """Commit and versions; empty for a run of an older version."""

    @property
    def exported(self) -> Path:
        """The folder with what the run made."""
        return self.folder / self.kind

    @property
    def stage(self) -> str:
        """Class of the stage, without its module."""
        return str(self.config["model"]["class_path"]).rpartition(".")[2]

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the stage."""
        return dict(self.config["model"]["init_args"])

    @property
    def base(self) -> str:
        """The base as the run named it: folder, file or hub id."""
        return str(self.settings["family"]["init_args"]["base"])

    @property
    def family_name(self) -> str:
        """Class of the base's family; with "Pipeline" behind it, diffusers' class."""
        return str(self.settings["family"]["class_path"]).rpartition(".")[2]

    @property
    def student(self) -> str | None:
        """Folder or hub id of the student that a LoRA or ControlNet was trained for."""
        student = self.settings.get("student") or {}
        weights = student.get("init_args", {}).get("weights") if isinstance(student, dict) else None
        return None if weights is None else str(weights)

    @property
    def for_base(self) -> bool:
        """Whether it made something that a base uses in many steps: a decoder, or the LoRA or ControlNet of a base."""
        return self.kind == "decoder" or (self.kind != "pipeline" and self.student is None)

    @property
    def partner(self) -> str:
        """Folder or hub id of the pipeline that a LoRA, ControlNet or decoder was made for."""
        if self.kind == "decoder":
            return self.base
        return self.student or self.settings.get("weights") or self.base

    @property
    def conditioning_scale(self) -> float:
        """The controlnet_conditioning_scale at which a ControlNet was trained, of a student or of a base."""
        holder = self.settings if self.for_base else self.settings["student"]["init_args"]
        return float((holder.get("controlnet") or {}).get("conditioning_scale", 1.0))

    @property
    def data(self) -> str:
        """The data in a few words."""
        arguments = self.config["data"].get("init_args") or {}
        where = arguments.get("shards") or arguments.get("cache") or "unnamed"
        kind = str(self.config["data"]["class_path"]).rpartition(".")[2]
        if kind == "ToyDataModule":
            style = f", style {arguments['style']}" if arguments.get("style") else ""
            return (
                f"the toy world of this project, first {arguments.get('train_images')} training images{style}"
            )
        return f"{where} ({kind})"


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: for a folder without run, a run that has not exported anything that can be published, an export that is not
            of this run, or a configuration of something else.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"'{folder}' is no run (config.yaml is missing); give the folder that train.py wrote, trainer.default_root_dir."
        )
    found = [kind for kind in KINDS if (folder / kind).is_dir()]
    if not found:
        names = ", ".join(f"{kind}/" for kind in KINDS)
        pruned = (
            " A pruned U-Net (unet/) is a step on the way: publish its student." * (folder / "unet").is_dir()
        )
        raise UserError(
            f"'{folder}' has none of {names}, so the run is not finished or was told to export elsewhere; finish it with "
            f"--ckpt_path auto.{pruned}"
        )
    if len(found) > 1:
        raise UserError(
            f"'{folder}' has {' and '.join(f'{kind}/' for kind in found)}, and a run makes one of them; move the others away."
        )
    run = Run(folder, found[0], _config(folder), _origin(folder))
    _check_newer(run)
    return run


def _config(folder: Path) -> dict[str, Any]:
    """config.yaml with the entries that are read here.

    Raises:
        UserError: for a file that is not of a stage, or of a family that no card can be written for.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as YAML ({one_line(str(error))}).") from error
    for name, kind, required in _ENTRIES:
        value = _entry(config, name)
        if not isinstance(value, kind) and (required or value is not None):
            raise UserError(
                f"'{path}' is not the configuration of a stage of this project: {name} is {value!r}."
            )
    family = config["model"]["init_args"]["family"]["class_path"].rpartition(".")[2]
    if family not in FAMILIES:
        raise UserError(
            f"'{path}': the family is {family!r}, and cards are written for {' and '.join(FAMILIES)}."
        )
    found: dict[str, Any] = config
    return found


def _entry(config: Any, name: str) -> Any:
    """The value of a dotted name; None if it, or something on the way to it, is missing or null."""
    for part in name.split("."):
        if config is None:
            return None
        config = config.get(part) if isinstance(config, dict) else config
    return config


def _origin(folder: Path) -> dict[str, Any]:
    path = folder / ORIGIN
    try:
        found = read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise UserError(str(error)) from error
    if not isinstance(found.get("versions") or {}, dict):
        raise UserError(f"'{path}': versions must be a JSON object; remove the file if its run is lost.")
    return found


def _check_newer(run: Run) -> None:
    """Raises UserError if the run began anew after the export was written, which is then another run's."""
    began = last_beginning(run.folder)
    written = max((path.stat().st_mtime for path in run.exported.rglob("*") if path.is_file()), default=0.0)
    if began is not None and written < began.timestamp():
        raise UserError(
            f"'{run.exported}' is older than the run, which began anew on {began:%Y-%m-%d %H:%M} UTC and has not exported "
            "since; finish it with --ckpt_path auto."
        )


def licence_of(run: Run, base_model: str | None, given: str | None) -> str:
    """The licence of the base, in the hub's spelling.

    Raises:
        UserError: if it is not known, or not in that spelling.
    """
    found = card_licence(Path(run.base)) if given is None else given
    if found is not None:
        if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", found) is None:
            named = "--licence" if given is not None else f"the licence in the card of '{run.base}'"
            raise UserError(
                f"{named} is {found!r}; give --licence in the hub's spelling, such as "
                f"{' or '.join(sorted(set(LICENCES.values())))}, or other."
            )
        return found
    for name in (base_model, run.base):
        known = LICENCES.get(Path(name).name) if name else None
        if known:
            return known
    raise UserError(
        f"the licence of the base '{run.base}' is not known, and what was made from it carries it on; read its model card and "
        f"give --licence, such as {' or '.join(sorted(set(LICENCES.values())))}."
    )


def hub_id(name: str | None) -> str | None:
    """The repository of a name that is a hub id and no folder here."""
    if name is None or Path(name).exists() or not is_hub_id(name):
        return None
    return name.partition("@")[0]
