"""Distributed two-level K-FAC for PyTorch and PyTorch Lightning."""

from kfac_dist.config import CoarseConfig, DistributionConfig
from kfac_dist.preconditioner import KFACPreconditioner
from kfac_dist.rate_free import parameter_groups, rate_free_optimizer

__all__ = ["CoarseConfig", "DistributionConfig", "KFACPreconditioner", "parameter_groups", "rate_free_optimizer"]
__version__ = "0.1.0"
