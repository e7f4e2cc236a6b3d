"""Callbacks that evaluate during training."""
