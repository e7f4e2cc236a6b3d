"""(noise, latents) pairs of a target sampler: sampled in memory, or read from shards."""
