"""`python -m data.prepare verify`."""
