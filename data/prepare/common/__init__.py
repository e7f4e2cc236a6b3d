"""Shared by the commands of `python -m data.prepare`."""
