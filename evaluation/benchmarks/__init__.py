"""Measurements of this project itself: throughput, and the tables of the toy world."""
