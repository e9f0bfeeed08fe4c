"""These tests need a cluster: they are run by ``-m slurm`` only, and then never skipped."""

from __future__ import annotations

import os

import pytest

from tests.launch.runs import references

__all__ = ["references"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave them out unless they are asked for."""
    if "slurm" in config.option.markexpr:
        return
    ours = [item for item in items if item.get_closest_marker("slurm")]
    config.hook.pytest_deselected(items=ours)
    items[:] = [item for item in items if item not in ours]


@pytest.fixture(scope="session", autouse=True)
def there_is_a_cluster() -> None:
    """Fail where there is none."""
    if "SLURM_CONF" not in os.environ:
        pytest.fail("there is no cluster: run make test-slurm, or tests/slurm/up.sh and export its SLURM_CONF")
