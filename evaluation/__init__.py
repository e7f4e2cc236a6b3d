"""Evaluation of text-to-image models: FID, CLIP score, caption accuracy, under named protocols."""
