"""Benchmarks of this project: throughput, and the tables of the toy world."""
