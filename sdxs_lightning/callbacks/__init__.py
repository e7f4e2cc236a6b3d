"""Callbacks for checkpoints, resuming, interruption, NaN detection, monitoring and export."""
