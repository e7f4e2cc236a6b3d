"""The command that scores a folder: the same numbers as in training, from the exported files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evaluation.evaluate import main
from evaluation.generate import SampledImages
from evaluation.protocols import PROTOCOLS
from evaluation.scores import Judges, measure
from sdxs_lightning.export import export_pipeline
from tests.training.tiny_distillation import distillation


def test_an_exported_student_scores_as_it_did_in_training(
    world: Path, judged: dict[str, str], tmp_path: Path
) -> None:
    module = distillation(world / "sd-epsilon")
    module.configure_model()
    assert module.ema is not None
    protocol, device = PROTOCOLS["toy"], torch.device("cpu")
    maker = SampledImages(module.ema, module.family, device, protocol.seed)
    in_training = measure(maker, protocol.captions(), Judges.load(protocol), device)

    unet, timestep = module.ema.denoiser.unet, module.ema.conditioning_timestep
    folder = export_pipeline(unet, module.family, tmp_path / "pipeline", timestep, torch.float32)
    main(["--model", str(folder), "--out", str(tmp_path / "scores.json")])
    exported = json.loads((tmp_path / "scores.json").read_text())
    # A grey level may tip over where the two paths round differently.
    assert exported["fid"] == pytest.approx(in_training.fid, rel=1e-3)
    assert exported["clip_score"] == pytest.approx(in_training.clip_score, abs=0.02)
    assert exported["caption_accuracy"] == in_training.caption_accuracy
    assert exported["protocol"]["fingerprint"] == protocol.fingerprint()


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="model_index.json is missing"):
        main(["--model", str(tmp_path)])
