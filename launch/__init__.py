"""The command and the launchers; import them as ``kfac_dist.launch``."""

from kfac_dist.environment import LaunchEnvironment, detect_environment
from kfac_dist.launch.connect import connect

__all__ = ["LaunchEnvironment", "connect", "detect_environment"]
