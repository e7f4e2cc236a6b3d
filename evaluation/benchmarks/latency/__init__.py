"""How fast students are, on which backend: `python -m evaluation.latency`."""
