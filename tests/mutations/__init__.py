"""Mistakes that a reviewer would try in the distillation, and the fast test that each must make fail."""
