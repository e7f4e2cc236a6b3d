"""WebDataset tars: written reproducibly, indexed once, read in an order that is a pure function of the position."""
