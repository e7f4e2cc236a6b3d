"""One-step distillation; the training step is in `step.py`."""
