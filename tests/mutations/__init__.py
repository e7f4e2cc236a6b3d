"""Mistakes that a reviewer would try, and the fast test that each must make fail."""
