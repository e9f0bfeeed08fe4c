"""Distributed two-level K-FAC for PyTorch and PyTorch Lightning."""

from kfac_dist.config import CoarseConfig, DistributionConfig
from kfac_dist.preconditioner import KFACPreconditioner

__all__ = ["CoarseConfig", "DistributionConfig", "KFACPreconditioner"]
__version__ = "0.1.0"
