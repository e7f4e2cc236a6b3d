"""How shards are read: local files, servers with patience, whole files in a cache, fetching ahead."""
