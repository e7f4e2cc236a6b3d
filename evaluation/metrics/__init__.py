"""Torchmetrics modules and the functions they are built on."""
