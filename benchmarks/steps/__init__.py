"""What a K-FAC step costs, side by side with SGD and kfac-pytorch: ``python -m benchmarks.steps``."""
