"""`python -m data.prepare latents`."""
