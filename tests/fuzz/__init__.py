"""Random damage for everything that reads foreign bytes: `python -m tests.fuzz --minutes 10`."""
