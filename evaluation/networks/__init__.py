"""Frozen networks that metrics read, and the resizing in front of them."""
