"""kfac-pytorch (github.com/gpauloski/kfac-pytorch, Pauloski et al. 2021) from a local clone, as it is."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

PACKAGE = "kfac-pytorch"
METHODS = ("inverse", "eigen")


def version(clone: Path) -> str:
    """What the clone calls itself."""
    found = re.search(r'^version = "(.+)"', (clone / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "of an unknown version"


def load(clone: Path) -> type[Any]:
    """Its KFACPreconditioner.

    Raises:
        FileNotFoundError: there is no clone.
    """
    if not (clone / "kfac" / "preconditioner.py").exists():
        raise FileNotFoundError(
            f"--kfac-pytorch={clone} holds no kfac/preconditioner.py: give the folder of a clone of "
            "https://github.com/gpauloski/kfac-pytorch"
        )
    installed = importlib.metadata.version

    def told(name: str) -> str:  # it asks for its own version, which only an installation has
        return version(clone) if name == PACKAGE else installed(name)

    sys.path.insert(0, str(clone))
    try:
        with mock.patch.object(importlib.metadata, "version", told):
            return importlib.import_module("kfac.preconditioner").KFACPreconditioner
    finally:
        sys.path.remove(str(clone))
