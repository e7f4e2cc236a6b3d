"""Runs the metrics over the images, resumably and on every GPU."""
