"""Callbacks that measure while a stage trains."""
