"""Runs metrics over images, resumable and on all GPUs."""
