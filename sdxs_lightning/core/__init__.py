"""The pure layer: batches, noise schedule, timesteps, guidance, seeding. No Lightning, no model loading."""
