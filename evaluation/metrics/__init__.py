"""Metrics, as torchmetrics modules and the arithmetic under them."""
