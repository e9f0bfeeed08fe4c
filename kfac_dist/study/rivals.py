"""Other implementations, from where the user says they are: nothing of them is needed or brought along."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock


@dataclass(frozen=True)
class Clone:
    """A clone of a repository, named by an environment variable.

    Attributes:
        variable: its name.
        package: the folder of the package in it.
        cure: what to do where it is missing.
    """

    variable: str
    package: str
    cure: str

    def folder(self) -> Path:
        """Where the clone is said to be."""
        return Path(os.environ.get(self.variable) or os.devnull)

    def given(self) -> bool:
        """Whether the variable names a folder that holds the package."""
        return (self.folder() / self.package / "__init__.py").exists()


KFAC_PYTORCH = Clone("KFAC_PYTORCH", "kfac", "needs a clone of kfac-pytorch: name its folder in KFAC_PYTORCH")


def import_kfac_pytorch() -> ModuleType:
    """``kfac.preconditioner`` of the clone that KFAC_PYTORCH names.

    Raises:
        ModuleNotFoundError: there is none.
    """
    if not KFAC_PYTORCH.given():
        raise ModuleNotFoundError(KFAC_PYTORCH.cure)
    if "kfac" not in sys.modules:
        sys.path.insert(0, str(KFAC_PYTORCH.folder()))
        # The package asks for its installed version when it is imported; a clone has none.
        with mock.patch.object(importlib.metadata, "version", return_value="clone"):
            importlib.import_module("kfac")
    return importlib.import_module("kfac.preconditioner")
