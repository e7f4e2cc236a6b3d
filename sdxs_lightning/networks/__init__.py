"""Networks of all stages, trainable and frozen: student, fake score, discriminators, denoiser, feature taps, EMA, LoRA."""
