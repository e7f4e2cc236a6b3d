"""Pruned students: what is kept of a U-Net, and where each of their weights comes from."""
