"""The model card of a run, in the hub's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sdxs_lightning.publishing.calling import Settings, Snippet
from sdxs_lightning.publishing.runs import FAMILIES, Kind, Run
from sdxs_lightning.publishing.scores import SECTION, Number, cell, table

WHAT: dict[Kind, str] = {
    "pipeline": "A {steps} text-to-image student",
    "lora": "A style LoRA for a {model}",
    "controlnet": "A ControlNet for a {model}",
    "decoder": "A tiny image decoder",
}
NAMES = {
    "creativeml-openrail-m": "CreativeML Open RAIL-M",
    "openrail++": "CreativeML Open RAIL++-M",
    "apache-2.0": "Apache License 2.0",
}


@dataclass(frozen=True)
class Facts:
    """What a card is written from."""

    run: Run
    name: str
    """Hub id of the model."""
    base_model: str | None
    """Hub id of the base, or of the student for its LoRA or ControlNet; None leaves the field out."""
    partner: str
    """Name of the pipeline that a LoRA, ControlNet or decoder is used with."""
    licence: str
    """In the hub's spelling."""
    numbers: Sequence[Number]
    snippet: Snippet
    samples: Sequence[tuple[str, str]]
    """File and prompt of each sample."""
    resolution: tuple[int, int]
    """Height and width of the training images, pixels."""
    settings: Settings
    """Of the call."""


def write_card(facts: Facts) -> str:
    """The text of README.md."""
    parts = [
        f"---\n{_header(facts)}---",
        f"# {facts.name.rpartition('/')[2]}",
        _opening(facts),
        "## How to call it",
        f"```python\n{facts.snippet.code}```",
        _calling(facts),
        "## Samples",
        "| | prompt |\n|---|---|\n"
        + "\n".join(f"| ![]({file}) | {cell(prompt)} |" for file, prompt in facts.samples),
        SECTION,
        _measured(facts),
        "## Made from",
        _made_from(facts),
        "## Licence",
        _licence(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _header(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    run = facts.run
    results = [number.result() for number in facts.numbers]
    relation = {"lora": "adapter", "controlnet": "adapter"}.get(run.kind, "finetune")
    tags = [*([] if run.for_base else ["sdxs", "one-step"]), FAMILIES[run.family_name]]
    tags += {"lora": ["lora"], "controlnet": ["controlnet"], "decoder": ["autoencoder"]}.get(run.kind, [])
    settings: dict[str, Any] = {"base_model": facts.base_model, "base_model_relation": relation}
    data = ModelCardData(
        license=facts.licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        model_name=facts.name.rpartition("/")[2],
        eval_results=results or None,
        **(settings if facts.base_model else {}),
    )
    text: str = yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True)
    return text


def _opening(facts: Facts) -> str:
    run = facts.run
    steps = "one-step" if facts.settings.steps == 1 else f"{facts.settings.steps}-step"
    model = "text-to-image base in its many steps" if run.for_base else f"{steps} text-to-image student"
    style = (
        "trained with its denoising loss on images of the style"
        if run.for_base
        else f"which stays {steps}: trained by score distillation towards its base with a style"
    )
    more = {
        "pipeline": f", distilled from `{run.base}`. It draws in {_steps(facts.settings.steps)}, without guidance.",
        "lora": f", for `{facts.partner}`, {style}.",
        "controlnet": f", for `{facts.partner}`.",
        "decoder": f" (`AutoencoderTiny`) for the latents of `{run.base}`.",
    }[run.kind]
    what = WHAT[run.kind].format(steps=steps, model=model)
    return f"{what}{more} Made with sdxs-lightning, stage `{run.stage}`."


def _calling(facts: Facts) -> str:
    height, width = facts.resolution
    run, settings = facts.run, facts.settings
    lines = [f"- Size: {width}x{height} px. Others near by run, with falling quality."]
    if run.kind == "decoder":
        lines += ["- Use it as `vae` of any pipeline with these latents."]
    if run.for_base:
        lines += [
            f"- Steps and guidance are those of the base: {settings.steps} and {settings.guidance_scale:g} in the code above."
        ]
    else:
        lines += [
            f"- Steps: {settings.steps}. More do not make it better.",
            "- `guidance_scale=0`: guidance is trained in. A negative prompt does nothing.",
        ]
    lines += ['- On a GPU: `.to("cuda", torch.float16)` after `from_pretrained`.']
    if run.kind == "lora":
        plain = "base" if run.for_base else "student"
        lines += [
            f"- Scale: {settings.scale:g} by default; 0 is the {plain} itself, values above 1 exaggerate the style.",
            "- `kohya/lora.safetensors` has kohya's names, for other programs.",
        ]
    if run.kind == "controlnet":
        lines += [f"- `controlnet_conditioning_scale`: {settings.scale:g} in the code above; lower is freer."]
    return "\n".join(lines)


def _measured(facts: Facts) -> str:
    if not facts.numbers:
        return "Nothing was measured."
    return (
        "95 % intervals; numbers of another hash are not comparable. The score files are in `scores/`.\n\n"
        + table(facts.numbers)
    )


def _made_from(facts: Facts) -> str:
    run, origin = facts.run, facts.run.origin
    rows = [
        (
            "base",
            f"`{run.base}`"
            + (
                f" ([{facts.base_model}](https://huggingface.co/{facts.base_model}))"
                if facts.base_model
                else ""
            ),
        )
    ]
    if run.kind in ("lora", "controlnet"):
        partner = "used with" if run.for_base else "student"
        rows += [(partner, f"`{run.partner}`, used here as `{facts.partner}`")]
    style = run.settings.get("style")
    if style:
        rows += [("style", f"`{style['path']}`, scale {style.get('scale', 1.0):g}, in the real score only")]
    versions = ", ".join(f"{name} {version}" for name, version in (origin.get("versions") or {}).items())
    commit = origin.get("commit")
    changed = " with uncommitted changes" if origin.get("changed") else ""
    rows += [
        ("data", run.data),
        ("configuration", "`config.yaml`, resolved"),
        ("code", f"commit `{commit}`{changed}" if commit else "commit unknown"),
        ("versions", versions or "unknown"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in rows)])


def _licence(facts: Facts) -> str:
    name = NAMES.get(facts.licence, facts.licence)
    text = (
        f"The base `{facts.run.base}` is under the {name} (`{facts.licence}`); what was made from it is a derivative and "
        "carries its terms."
    )
    if "openrail" in facts.licence:
        text += (
            " It may be used, sold and changed, but not for the uses that its attachment A forbids (harm to minors, illegal "
            "acts, disinformation meant to harm, discrimination, medical advice, and others: read it). Whoever passes on "
            "this model or something made from it, also as a service, has to pass these restrictions on as enforceable "
            "terms, and a copy of the licence, and to say what was changed."
        )
    return text + " Captions and images of the training data keep the terms of their source."


def _steps(count: int) -> str:
    return "one step" if count == 1 else f"{count} steps"
