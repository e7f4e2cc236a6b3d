"""`python -m data.prepare pairs`."""
