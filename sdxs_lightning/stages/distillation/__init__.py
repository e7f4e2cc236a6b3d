"""One-step distillation: `step.py` has the training step."""
