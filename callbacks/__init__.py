"""Lightning adapters; import them as ``kfac_dist.callbacks``."""
