"""What every stage trains with: manual optimization, gradient averaging, sharding, optimizers and schedules."""
