"""Timed comparisons, outside the test suite; each is run with ``python -m benchmarks.<name>``."""
