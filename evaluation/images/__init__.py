"""Where images come from: folders, zip files, shards, models; and the prompts they were made of."""
