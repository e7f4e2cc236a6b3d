"""Data: the toy world, shards, and what prepares them."""
