"""Training infrastructure of the stages: manual optimisation, gradient averaging, sharding, optimizers and schedules."""
