"""Sources of images (folders, zip files, shards, models) and of their prompts."""
