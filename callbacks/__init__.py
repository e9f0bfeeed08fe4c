"""Lightning adapters; import them as ``kfac_dist.callbacks``."""

from kfac_dist.callbacks.kfac import KFAC
from kfac_dist.callbacks.monitor import KFACMonitor

__all__ = ["KFAC", "KFACMonitor"]
