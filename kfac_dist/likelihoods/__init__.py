"""Likelihoods: one file each, registered by its import here. A new one is one new file and one line below."""

from kfac_dist.likelihoods import bernoulli, categorical, gaussian  # noqa: F401 - imported for their registration
from kfac_dist.likelihoods.base import Likelihood, likelihoods

__all__ = ["Likelihood", "likelihoods"]
