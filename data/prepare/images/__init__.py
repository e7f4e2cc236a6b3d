"""`python -m data.prepare images`."""
