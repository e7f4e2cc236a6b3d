"""Names that configurations of earlier versions use, and what they are called now."""

from __future__ import annotations

from collections.abc import Iterator

from sdxs_lightning.config_files import MergedArguments

S, E, T = "sdxs_lightning.", "evaluation.", "data.toy."

MODULES = (
    {
        f"{S}modules.{old}": f"{S}{new}"
        for old, new in {
            "one_step_distillation": "stages.distillation.step",
            "matched_features": "objectives.matched_features",
            "miniaturisation": "stages.prune_distill",
            "decoder_distillation": "stages.decoder",
            "denoising_training": "stages.teacher",
            "student_generator": "networks.student_generator",
            "fake_score": "networks.fake_score",
            "discriminator": "networks.discriminator",
            "projected_discriminator": "networks.projected_discriminator",
            "image_features": "networks.image_features",
            "tiny_decoder": "networks.tiny_decoder",
            "sharding": "training.sharding",
            "lr_schedules": "training.lr_schedules",
            "muon": "training.muon",
        }.items()
    }
    | {
        f"{E}{old}": f"{E}{new}"
        for old, new in {
            "progress": "callbacks.progress",
            "image_metrics": "callbacks.image_metrics",
            "best_checkpoint": "callbacks.best_checkpoint",
            "report": "callbacks.run_report",
        }.items()
    }
    | {
        f"{T}{name}": f"{T}training.{name}"
        for name in ("autoencoder", "classifier", "clip", "text_encoder", "features")
    }
)
"""Old module -> new module."""

CLASSES = {
    f"{S}modules.miniaturisation.Miniaturisation": f"{S}stages.prune_distill.PrunedUNetDistillation",
    f"{S}callbacks.export.ExportPipeline": f"{S}callbacks.export.Export",
    f"{S}callbacks.export_decoder.ExportDecoder": f"{S}callbacks.export.Export",
    f"{S}callbacks.export_unet.ExportUNet": f"{S}callbacks.export.Export",
    f"{T}text_encoder_pair.TextEncoderPairTraining": f"{T}training.text_encoder.TextEncoderPairTraining",
    f"{T}training.text_encoder_pair.TextEncoderPairTraining": f"{T}training.text_encoder.TextEncoderPairTraining",
    f"{E}callbacks.SampleGrids": f"{E}callbacks.sample_grids.SampleGrids",
    f"{E}callbacks.DistillationMetrics": f"{E}callbacks.sample_grids.DistillationMetrics",
}
"""Old class -> new class, where the class has another name too or its module became a package."""

KEYS = {
    "curriculum": "update_schedule",
    "fake_score_warmup_turns": "fake_score_only_iterations",
    "critic_updates_per_student_update": "fake_score_updates_per_student_update",
    "critic_weight": "discriminator_weight",
    "warmup_factor": "first_phase_factor",
    "lr_scheduler.init_args.warmup_updates": "first_phase_updates",
    "init_args.pictures": "columns",
}
"""Old option, or the end of its path -> its new name."""


def new_class(path: str) -> str | None:
    """What the class is called now; None if it was not renamed."""
    module, _, name = path.rpartition(".")
    return CLASSES.get(path) or (f"{MODULES[module]}.{name}" if module in MODULES else None)


def renamed_in(command_line: MergedArguments) -> list[str]:
    """One clause for each old name in the files and flags, with its place."""
    return list(dict.fromkeys(_renamed(command_line)))


def _renamed(command_line: MergedArguments) -> Iterator[str]:
    for file in command_line.files:
        for key, line in file.lines.items():
            yield from _clauses(key, file.texts.get(key), f"{file.name}, line {line}")
    for argument in command_line.arguments:
        name, _, value = argument.partition("=")
        if name.startswith("--") and name != "--config":
            yield from _clauses(name[2:], value, "on the command line")


def _clauses(key: str, value: object, place: str) -> Iterator[str]:
    for old, new in KEYS.items():
        if f".{key}".endswith(f".{old}"):
            yield f"{old.rpartition('.')[2]} is called {new} now ({place})"
    now = new_class(value) if isinstance(value, str) else None
    if now:
        yield f"{value} is called {now} now ({place})"
