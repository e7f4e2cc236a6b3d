"""Named protocols: metrics, images and references."""
