"""Indexes of many shards in one file, which the processes of a node share."""
