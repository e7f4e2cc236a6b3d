"""Named protocols: what is measured, on which images, against which reference."""
