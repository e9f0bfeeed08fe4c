"""What the code never does: unpickle more than tensors and numbers, hand text to a shell, or tell what it was told."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_dist import KFACPreconditioner
from kfac_dist.launch import __main__ as command
from tests.test_floors import FILES

ROOT = Path(__file__).parents[1]
BENCHMARKS = {str(path.relative_to(ROOT)): path for path in (ROOT / "benchmarks").rglob("*.py")}
EVERYTHING = FILES | BENCHMARKS
FORBIDDEN = {
    "pickle": "torch.load(weights_only=True) reads what we write",
    "marshal": "it runs what it reads",
    "shelve": "it is pickle",
    "dill": "it is pickle",
    "eval": "no text is a program",
    "exec": "no text is a program",
    "os.system": "a command is a list of words",
    "os.popen": "a command is a list of words",
    "subprocess.getoutput": "a command is a list of words",
}
# mpi4py's lower-case methods pickle, its upper-case ones send buffers; torch's *_object collectives pickle.
PICKLING_METHODS = re.compile(r"(_object|_object_list)$")


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in FORBIDDEN)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN or PICKLING_METHODS.search(name):
            yield f"calls {name}: {FORBIDDEN.get(name, 'it pickles')}"
        if keywords.get("shell", "False") != "False":
            yield f"calls {name} with shell={keywords['shell']}"
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "calls torch.load without weights_only=True"
        if name in ("print", "warnings.warn", "console.print") and "environ" in ast.unparse(node):
            yield f"{name} of the environment"


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_no_file_can_run_what_it_reads(name: str) -> None:
    assert list(offences(EVERYTHING[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "dist.all_gather_object(found, mine)",
        "os.system(text)",
        "print(dict(os.environ))",
    ],
)
def test_the_check_sees_them(source: str) -> None:
    assert len(list(offences(source))) == 1


def test_a_state_is_read_without_running_anything() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    kfac = KFACPreconditioner(
        model, "categorical", coarse="layer_step_momentum", damping=lambda step: 0.1, skip_layers=["none"]
    )
    for _ in range(2):
        logits = model(torch.randn(4, 3))
        kfac.accumulate()
        logits.logsumexp(1).mean().backward()
        kfac.step(closure=lambda: torch.tensor(1.0))
    file = io.BytesIO()
    torch.save(kfac.state_dict(), file)
    file.seek(0)
    kfac.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm"])
def test_dry_runs_do_not_show_the_environment(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-value")
    monkeypatch.setenv("SLURM_JWT", "a-very-secret-value")
    options = {"torchrun": ["-n", "2"], "mpirun": ["-n", "2"], "slurm": ["--folder", str(tmp_path)]}[launcher]
    assert command.main(["launch", launcher, *options, "--dry-run", "--", "fit", "--config", "x.yaml"]) == 0
    captured = capsys.readouterr()
    assert "x.yaml" in captured.out
    assert "a-very-secret-value" not in captured.out + captured.err


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requirements = re.findall(r'"([A-Za-z][\w-]*(?:\[[\w,]*\])?[<>=][^"]*)"', text.split("[project.scripts]")[0])
    assert len(requirements) > 12
    build = "setuptools>=77"  # of the build itself: the newest there is
    assert [r for r in requirements if r != build and not (">=" in r and "<" in r)] == []
