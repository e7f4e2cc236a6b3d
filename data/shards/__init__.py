"""WebDataset tars: reproducible writing, indexing, and reading in an order that is a function of the position."""
