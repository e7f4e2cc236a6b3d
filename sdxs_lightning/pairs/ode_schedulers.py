"""The schedulers of diffusers that pairs can be sampled with. Imported before torch: keep it light."""

ODE_SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that map noise to latents deterministically, as pairs need. Ancestral, SDE and LCM schedulers draw noise between
steps."""


def check_scheduler(name: str) -> None:
    """Raises ValueError unless `name` is one of ODE_SCHEDULERS."""
    if name not in ODE_SCHEDULERS:
        raise ValueError(
            f"scheduler '{name}' is not known as one that draws no noise of its own; accepted are "
            f"{', '.join(ODE_SCHEDULERS)}."
        )
