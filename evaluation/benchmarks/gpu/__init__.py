"""`python -m evaluation.benchmarks.gpu`: everything that only a GPU can prove, in one command."""
