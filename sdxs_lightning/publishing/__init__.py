"""A hub folder from a finished run: weights, samples, model card, and the checks of its numbers."""
