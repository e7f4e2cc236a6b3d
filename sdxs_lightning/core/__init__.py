"""Batches, noise schedule, timesteps, guidance and seeding, without Lightning and model loading."""
