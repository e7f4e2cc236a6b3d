"""(noise, latents) pairs of a target sampler: sampled into memory, read from shards, or sampled on the fly."""
