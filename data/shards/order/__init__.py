"""Sample orders: which sample is at which position, for one data set, mixtures and buckets."""
