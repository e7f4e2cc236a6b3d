"""Output of diffusers and transformers that asks for no action, switched off."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Switches off the bars of loading, which break a command's own, and the warning of a LoRA without text encoder layers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    logging.getLogger("diffusers.loaders.lora_base").addFilter(_asks_for_action)


def _asks_for_action(record: logging.LogRecord) -> bool:
    return "No LoRA keys associated to CLIPTextModel" not in record.getMessage()
