"""Tiny students, made once for the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxs_lightning.networks.guidance_input import add_guidance_input
from tests.helpers.students import KINDS, save_student

Students = Callable[[str], Path]


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Students:
    """The folder of a student of KINDS; do not write to it."""
    root = tmp_path_factory.mktemp("students")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            save_student(root, name, **KINDS[name])  # type: ignore[arg-type]
        return root / name

    return folder


@pytest.fixture(scope="session")
def guided(student: Students, tmp_path_factory: pytest.TempPathFactory) -> Students:
    """The same with a guidance scale as an input that matters."""
    root = tmp_path_factory.mktemp("guided")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            shutil.copytree(student(name), root / name)
            shutil.copytree(f"{student(name)}-controlnet", root / f"{name}-controlnet")
            unet = UNet2DConditionModel.from_pretrained(student(name) / "unet")
            add_guidance_input(unet, 16)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                unet.time_embedding.cond_proj.weight.normal_(std=0.5, generator=generator)
            unet.save_pretrained(root / name / "unet")
        return root / name

    return folder
