"""One generator for evaluation, callbacks, the demo and the shell, with several backends."""
