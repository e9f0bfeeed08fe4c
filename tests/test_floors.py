"""The floors of the house: a file imports only from lower floors, or from its own folder's ``base.py``."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kfac_dist"

# Bottom to top: files and folders of kfac_dist/ by name. "__init__" is the public face, kfac_dist/__init__.py.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("config", "registry", "environment", "compat", "draws", "metrics", "roll_call", "balance", "machine"),
    ("factors", "inverse", "assignment", "fused", "schedules", "restrict", "coarse_solver"),
    ("state", "coarse_state", "networks"),
    ("layers", "likelihoods", "comm", "costs"),
    ("samples", "sample_rows", "kept_rows", "trust"),
    ("coarse",),
    ("capture", "statistics", "loss_check", "sample_order", "replicas", "clip", "basis", "notices"),
    ("subset",),
    ("curvature", "directions", "fisher", "correction", "fine_damping"),
    ("one_level", "rank_b", "fine", "rate_free"),
    ("two_level",),
    ("checkpoint", "update", "summary", "spectra"),
    ("planning",),
    ("preconditioner",),
    ("__init__",),
    ("callbacks", "study"),
    ("launch",),
)
# Folders of alternatives: their files know base.py, never one another.
REGISTRIES = ("layers", "likelihoods", "comm", "coarse")
# What the files of such a folder share, beside its base.py.
SHARED = (
    "layers.watch",
    "layers.linear_map",
    "layers.convolution",
    "layers.autocorrelation",
    "layers.joint",
    "layers.recurrence",
    "layers.repeat",
    "layers.ties",
)
# What only these files and folders may import.
ONLY_IN = {
    "pytorch_lightning": ("callbacks", "study", "launch"),
    "lightning": (),  # the same classes under another name would be other classes
    "torch.distributed": ("comm.torch_dist", "launch"),
    "mpi4py": ("comm.mpi",),
}
# Plain Python, fit to be read and tested without tensors.
WITHOUT_TORCH = ("assignment", "balance", "costs", "environment", "networks", "registry", "roll_call")


def files() -> dict[str, Path]:
    """Dotted name below kfac_dist -> file, through the two links; a folder's ``__init__`` keeps that name."""
    found = {}
    for directory, subdirectories, names in os.walk(PACKAGE, followlinks=True):
        subdirectories[:] = [name for name in subdirectories if name != "__pycache__"]
        for name in names:
            if name.endswith(".py"):
                path = Path(directory, name)
                found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


FILES = files()


def floor_of(name: str) -> int | None:
    top = name.split(".")[0]
    return next((level for level, entries in enumerate(FLOORS) if top in entries), None)


def imported(source: str, name: str = "__init__") -> Iterator[str]:
    """Every module that ``source`` (the file ``name``) imports or reaches into, anywhere in the file."""
    package = ["kfac_dist", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def own_file(target: str) -> str | None:
    """The file of this package that an imported name lies in: the longest prefix that is a file."""
    parts = target.split(".")
    if parts[0] != "kfac_dist":
        return None
    for length in range(len(parts), 0, -1):
        inside = parts[1:length]
        for candidate in (".".join(inside), ".".join([*inside, "__init__"])):
            if candidate in FILES:
                return candidate
    return None


def violation(name: str, target: str) -> str | None:
    """Why the file ``name`` may not import ``target``, or None."""
    for module, allowed in ONLY_IN.items():
        if f"{target}.".startswith(f"{module}.") and not any(f"{name}.".startswith(f"{place}.") for place in allowed):
            return f"{name} imports {target}; only {', '.join(allowed) or 'nobody'} may"
    if name in WITHOUT_TORCH and target.split(".")[0] == "torch":
        return f"{name} imports {target}; it is plain Python"
    other = own_file(target)
    if other is None or other == name:
        return None
    folder, other_folder = name.split(".")[0], other.split(".")[0]
    if folder == other_folder:
        free = folder not in REGISTRIES or name.endswith("__init__") or other.endswith(".base") or other in SHARED
        return None if free else f"{name} imports its neighbour {other}; share through {folder}/base.py"
    here, there = floor_of(name), floor_of(other)
    if here is None or there is None or there < here:
        return None
    return f"{name} (floor {here}) imports {other} (floor {there}); a file imports from lower floors only"


def test_both_linked_folders_are_seen():
    assert {"callbacks.__init__", "launch.__init__"} <= FILES.keys()


@pytest.mark.parametrize("name", sorted(FILES))
def test_file_stands_on_its_floor(name):
    top = name.split(".")[0]
    assert floor_of(name) is not None, (
        f"kfac_dist/{FILES[name].relative_to(PACKAGE)} is on no floor: add {top!r} to FLOORS in tests/test_floors.py, "
        "on the lowest floor that is above everything it imports"
    )
    found = {violation(name, target) for target in imported(FILES[name].read_text(encoding="utf-8"), name)} - {None}
    assert not found, "\n".join(sorted(map(str, found)))


@pytest.mark.parametrize(
    ("name", "source", "allowed"),
    [
        ("inverse", "from kfac_dist.config import KFACConfig", True),
        ("inverse", "from kfac_dist import config", True),
        ("registry", "from kfac_dist.inverse import x", False),
        ("registry", "def f():\n    from kfac_dist import inverse", False),
        ("registry", "from .inverse import x", False),
        ("factors", "import kfac_dist.inverse", False),
        ("factors", "from kfac_dist import KFACPreconditioner", False),
        ("comm.single", "from kfac_dist.comm.base import Traffic", True),
        ("comm.single", "from .base import Traffic", True),
        ("comm.single", "from kfac_dist.comm.torch_dist import x", False),
        ("comm.__init__", "from kfac_dist.comm import single, torch_dist", True),
        ("comm.torch_dist", "import torch.distributed as dist", True),
        ("launch.train", "import torch.distributed as dist", True),
        ("comm.single", "import torch\ntorch.distributed.barrier()", False),
        ("comm.single", "from torch import distributed", False),
        ("comm.single", "from torch.distributed import barrier", False),
        ("comm.torch_dist", "from mpi4py import MPI", False),
        ("comm.mpi", "from mpi4py import MPI", True),
        ("callbacks.kfac", "import pytorch_lightning as pl", True),
        ("callbacks.kfac", "from lightning.pytorch import Trainer", False),
        ("capture", "from pytorch_lightning import Trainer", False),
        ("assignment", "from torch import Tensor", False),
        ("launch.train", "from kfac_dist.callbacks import KFAC", True),
        ("callbacks.kfac", "from kfac_dist.launch import main", False),
    ],
)
def test_the_rule_itself(name, source, allowed):
    assert all(violation(name, target) is None for target in imported(source, name)) == allowed
