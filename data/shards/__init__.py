"""WebDataset tars: reproducibly written, indexed once, read in an order computed from the position."""
