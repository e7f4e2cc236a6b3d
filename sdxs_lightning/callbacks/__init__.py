"""Callbacks around a training: checkpoints, interruptions, a guard against NaN, export."""
