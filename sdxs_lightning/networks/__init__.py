"""The networks of every stage, trainable and frozen: student, fake score, discriminators, denoiser, taps, EMA, LoRA."""
