"""The command and the launchers; import them as ``kfac_dist.launch``."""
