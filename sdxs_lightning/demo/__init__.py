"""A web demo of a student: `python -m sdxs_lightning.demo`."""
