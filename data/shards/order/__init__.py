"""Which sample stands at which position: of one set, of a mixture, in buckets."""
