"""One-step, real-time text-to-image models from Stable Diffusion."""
