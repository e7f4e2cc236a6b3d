"""What a finished run says of itself: what it made, from what, on which data, with which code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sdxs_lightning.callbacks.run_folder import ORIGIN
from sdxs_lightning.core.errors import UserError, first_line
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
    def data(self) -> str:
        """The data in a few words."""
        arguments = self.config["data"].get("init_args", {})
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
        UserError: for a folder without run, or a run that has not exported anything that can be published.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"'{folder}' is no run (config.yaml is missing); give the folder that train.py wrote, trainer.default_root_dir."
        )
    kind = next((kind for kind in KINDS if (folder / kind).is_dir()), None)
    if kind is None:
        names = ", ".join(f"{kind}/" for kind in KINDS)
        pruned = (
            " A pruned U-Net (unet/) is a step on the way: publish its student." * (folder / "unet").is_dir()
        )
        raise UserError(
            f"'{folder}' has none of {names}, so the run is not finished or was told to export elsewhere; finish it with "
            f"--ckpt_path auto.{pruned}"
        )
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        origin = read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"'{folder}': {first_line(error)}") from error
    if not isinstance(config, dict) or "family" not in (config.get("model") or {}).get("init_args", {}):
        raise UserError(f"'{folder / 'config.yaml'}' is not the configuration of a stage of this project.")
    return Run(folder, kind, config, origin)


def licence_of(run: Run, base_model: str | None, given: str | None) -> str:
    """The licence of the base, in the hub's spelling.

    Raises:
        UserError: if it is not known.
    """
    if given is not None:
        return given
    found = card_licence(Path(run.base))
    if found is not None:
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
