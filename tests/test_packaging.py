from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kfac_dist

ROOT = Path(__file__).parents[1]
LINKS = ("callbacks", "launch")
CURE = "restore the link: rm -rf kfac_dist/{0} && ln -s ../{0} kfac_dist/{0} (git config core.symlinks true)"

# Run from another directory: the modules must come from the installed wheel, and be one class object under one name.
IMPORT_ALL = """
import importlib, pathlib, sys
site = pathlib.Path(sys.argv[1]).resolve()
for name in ("kfac_dist", "kfac_dist.callbacks", "kfac_dist.launch"):
    module = importlib.import_module(name)
    file = pathlib.Path(module.__file__).resolve()
    assert file.is_relative_to(site), f"{name} came from {file}, not from the wheel"
print("imported")
"""

# A user's file: mypy --strict must find fault with the marked lines, and with no other.
CONSUMER = """
import torch
from pytorch_lightning import Trainer
from torch import nn
from typing_extensions import assert_type

from kfac_dist import CoarseConfig, DistributionConfig, KFACPreconditioner, parameter_groups, rate_free_optimizer
from kfac_dist import KFACConfig  # attr-defined
from kfac_dist.callbacks import KFAC, KFACMonitor
from kfac_dist.callbacks import Trial  # attr-defined
from kfac_dist.launch import LaunchEnvironment, connect, detect_environment

net = nn.Linear(3, 2)
kfac = KFACPreconditioner(net, "categorical", coarse=CoarseConfig(space="pcg"), distribution=DistributionConfig())
assert_type(kfac.accumulate(), None)
assert_type(kfac.step(lr=rate_free_optimizer(net, uncovered_lr=0.1), closure=lambda: torch.zeros(())), None)
assert_type(dict(kfac.metrics), dict[str, float])
assert_type(connect().rank, int)
assert_type(detect_environment({}), LaunchEnvironment)
Trainer(callbacks=[KFAC("categorical", coarse="pcg"), KFACMonitor(every_n_steps=4)])
assert_type(kfac.metrics, str)  # assert-type
KFACPreconditioner(net, "categorical", damping_method="exact")  # arg-type
KFACPreconditioner(net, "categorical", dampening=0.1)  # call-arg
kfac.step(lr="fast")  # arg-type
parameter_groups(net)  # call-arg
CoarseConfig(max_samples="64")  # arg-type
KFAC(likelihood=3)  # arg-type
KFACMonitor(every_n_steps="4")  # arg-type
connect(timeout="10 s")  # arg-type
"""
# What the types of the public face do not touch is not read, which saves half of the time.
CHECKER = """
[mypy]
strict = true
[mypy-torchmetrics.*,matplotlib.*,numpy.*,rich.*,sympy.*,PIL.*,fsspec.*]
follow_imports = skip
[mypy-torch.fx.*,torch._inductor.*,torch._dynamo.*,torch.onnx.*,torch.distributed.fsdp.*,torch.distributed.tensor.*]
follow_imports = skip
"""


@pytest.mark.parametrize("name", LINKS)
def test_link_is_relative_and_leads_to_the_code(name):
    link = ROOT / "kfac_dist" / name
    cure = CURE.format(name)
    assert link.is_symlink(), cure
    assert os.readlink(link) == f"../{name}", cure
    assert (link / "__init__.py").is_file(), cure


@pytest.mark.parametrize("name", LINKS)
def test_git_keeps_the_link_as_a_link(name):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "--stage", f"kfac_dist/{name}"]
    entry = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert entry.startswith("120000 "), f"git holds {entry!r}; {CURE.format(name)}, then git add kfac_dist/{name}"


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Source distribution and the wheel that is built from it, of a copy without the left-overs of earlier builds."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("kfac_dist", *LINKS):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    run("build", "--no-isolation", "--outdir", str(dist), str(source))
    return dist


@pytest.fixture(scope="module")
def wheel(release) -> Path:
    (built,) = release.glob("*.whl")
    return built


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"


def test_an_index_takes_wheel_and_sources(release):
    files = sorted(str(path) for path in release.iterdir())
    assert [Path(file).suffix for file in files] == [".whl", ".gz"]
    run("twine", "check", "--strict", *files)


def test_one_version_everywhere(release):
    versions = {path.name.split("-")[1].removesuffix(".tar.gz") for path in release.iterdir()}
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert versions == {cited[1]} == {kfac_dist.__version__}


def test_wheel_holds_what_is_no_code_but_read_by_it(wheel):
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kfac_dist").rglob("*.css")}
    assert "kfac_dist/study/report/style.css" in here
    assert here <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_the_linked_code_the_types_and_the_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in LINKS:
        here = {
            path.relative_to(ROOT).as_posix() for kind in ("py", "sbatch") for path in (ROOT / name).rglob(f"*.{kind}")
        }
        missing = {f"kfac_dist/{path}" for path in here} - set(names)
        assert not missing, f"not in the wheel: {sorted(missing)}; {CURE.format(name)}"
    assert "kfac_dist/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    strangers = {name.split("/")[0] for name in names if ".dist-info/" not in name} - {"kfac_dist"}
    assert not strangers, f"only kfac_dist belongs to the wheel, not {sorted(strangers)}"


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """Where the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    run("pip", "install", "--quiet", "--no-input", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def beside(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python in another folder, with the installed wheel on its path."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_wheel_works_from_another_directory(site, tmp_path):
    done = beside(site, tmp_path, "-c", IMPORT_ALL, str(site))
    assert done.stdout.strip() == "imported", done.stdout + done.stderr


def test_a_strict_checker_reads_the_types_of_the_installed_wheel(site, tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "mypy.ini").write_text(CHECKER)
    done = beside(site, tmp_path, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "consumer.py")
    marked = re.findall(r"  # ([a-z-]+)$", CONSUMER, re.MULTILINE)
    lines = [n for n, line in enumerate(CONSUMER.splitlines(), 1) if "  # " in line]
    found = re.findall(r"^consumer\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    assert found == [(str(n), code) for n, code in zip(lines, marked, strict=True)], done.stdout + done.stderr
