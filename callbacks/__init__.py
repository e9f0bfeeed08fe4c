"""Lightning adapters; import them as ``kfac_dist.callbacks``."""

from kfac_dist.callbacks.kfac import KFAC

__all__ = ["KFAC"]
