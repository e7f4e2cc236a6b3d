"""Frozen feature networks of the metrics, and their preprocessing."""
