"""Preparing data before a training: `python -m data.prepare COMMAND`."""
