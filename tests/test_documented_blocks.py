"""Every fenced block of README, CONTRIBUTING and docs is run or checked; one that nobody knows fails."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import types
import warnings
from importlib.metadata import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from pytorch_lightning import Trainer

import kfac_dist.launch.launch
from kfac_dist.callbacks import KFAC
from kfac_dist.coarse import coarse_spaces
from kfac_dist.comm import communicators
from kfac_dist.launch import __main__ as command
from kfac_dist.launch.base import launchers
from kfac_dist.launch.study import parser_of_studies
from kfac_dist.layers import layers
from kfac_dist.likelihoods import likelihoods

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILE = "configs/digits_cnn.yaml"  # where a command line says FILE
# Blocks of plain text: page and first words -> the test of what they show.
SHOWN = {
    ("docs/cluster.md", "factors: all_reduce on rank"): (
        "comm/test_communicators.py::test_an_error_names_phase_operation_rank_and_size"
    ),
    ("docs/planning.md", "K-FAC of ResNet-50"): (
        "launch/test_plan.py::test_the_documented_plan_is_what_the_program_prints"
    ),
}
# Job scripts that users submit -> the tests of their text and, on two virtual nodes, of what they do.
# Scripts: page and first words -> the test of what they submit.
SCRIPTS = {("docs/study/index.md", "job="): "slurm/test_slurm.py::test_the_tasks_of_an_array_share_a_studys_stage"}
SLURM = "slurm/test_slurm.py::test_"
SUBMITTED = {
    "launch/jobs/srun.sbatch": f"{SLURM}a_copied_job_script_ends_with_the_weights_of_one_process",
    "launch/jobs/torchrun.sbatch": f"{SLURM}torchruns_agents_on_two_nodes_end_with_the_weights_of_one_process",
    "launch/jobs/mpirun.sbatch": f"{SLURM}a_requeued_job_ends_with_the_weights_of_an_uninterrupted_one",
}


class Block(NamedTuple):
    """Of a page, from a line on."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: str, text: str) -> list[Block]:
    """In order.

    Raises:
        ValueError: a block is not closed.
    """
    found: list[Block] = []
    fences = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith("```")]
    if len(fences) % 2:
        raise ValueError(f"{page}: a block is not closed")
    for (first, fence), (last, _) in zip(fences[::2], fences[1::2], strict=True):
        body = text.splitlines()[first : last - 1]
        found.append(Block(page, first, fence.removeprefix("```"), "\n".join(body) + "\n"))
    return found


BLOCKS = [b for p in PAGES for b in blocks(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8"))]


def exists(test: str) -> bool:
    file, _, name = test.partition("::")
    return f"def {name}(" in (TESTS / file).read_text(encoding="utf-8")


# -- one checker for each language -------------------------------------------------------------------------------------


def python(block: Block) -> None:
    """Run it; a line that imports nothing is one of a longer program."""
    module = types.ModuleType("documented")
    sys.modules["documented"] = module  # where a dataclass looks for its types
    if "import" not in block.text:
        module.__dict__.update(Trainer=Trainer, KFAC=KFAC)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(many workers|treespec|`srun`).*")
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), module.__dict__)


def yaml(block: Block) -> None:
    """Hand it to the parser of ``kfac-dist study`` or ``fit``, as a configuration."""
    Path("block.yaml").write_text(block.text, encoding="utf-8")
    if block.text.startswith("plan:"):
        studies("block.yaml")
    else:
        parses("fit", "--config", "block.yaml")


def text(block: Block) -> None:
    """Find the test of what it shows."""
    named = [t for (page, start), t in SHOWN.items() if page == block.page and block.text.strip().startswith(start)]
    assert len(named) == 1, "name the test of what it shows in SHOWN"
    assert exists(named[0]), f"there is no {named[0]}"


def bash(block: Block) -> None:
    """Run or check each of its commands; of a script with a loop, its syntax, its files and its test."""
    for (page, start), test in SCRIPTS.items():
        if page == block.page and block.text.startswith(start):
            assert exists(test), f"there is no {test}"
            assert [
                p for p in re.findall(r"\b(?:configs|launch)/[\w./-]+", block.text) if not (ROOT / p).exists()
            ] == []
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, timeout=30)
            return
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert commands, "no command in it"
    for words in commands:
        check(words)


CHECKERS = {"python": python, "yaml": yaml, "text": text, "bash": bash}


# -- one rule for each program -----------------------------------------------------------------------------------------


def check(words: list[str]) -> None:
    """Run or check a command line; one that is not known fails."""
    variables = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
    program, *arguments = [word for word in words if word not in variables]
    if program == "make" and not variables:
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{re.escape(word)}:", targets, re.MULTILINE) for word in arguments), words
    elif program == "kfac-dist" and not variables:
        kfac_dist(arguments)
    elif program == "sbatch":
        sbatch(variables, arguments)
    elif program == "pip" and arguments[0] == "install":
        installs(arguments[1:])
    else:
        pytest.fail(f"no rule for {shlex.join(words)}")


def kfac_dist(arguments: list[str]) -> None:
    """``launch`` shows what it would start, trainings and studies are only parsed, what only shows something runs."""
    arguments = [str(ROOT / FILE) if word == "FILE" else word for word in arguments]
    if "--" in arguments:
        split = arguments.index("--")
        assert arguments[0] == "launch"
        assert command.main([*arguments[:split], "--dry-run", *arguments[split:]]) == 0
        kfac_dist(arguments[split + 1 :])
    elif arguments[0] in ("fit", "validate", "test", "predict"):
        parses(*arguments)
    elif arguments[0] == "study":
        studies(*arguments[1:])
    elif arguments[0] in ("inspect", "plan"):
        assert command.main(arguments) == 0
    else:
        pytest.fail(f"no rule for kfac-dist {shlex.join(arguments)}")


def studies(file: str, *options: str) -> None:
    """The plan is built, with the options; a study takes too long to be run here."""
    parser = parser_of_studies()
    parser.instantiate(parser.parse_args(["--config", file, *options]))


def parses(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([*arguments, "--print_config"])
    assert end.value.code == 0


def sbatch(variables: list[str], arguments: list[str]) -> None:
    """The script is tested; it reads the variables; what it runs is a command line of ``kfac-dist``."""
    script = next(word for word in arguments if not word.startswith("--"))
    assert exists("launch/test_jobs.py::test_job_scripts_pass_shellcheck")  # of all job scripts
    assert exists(SUBMITTED[script]), f"there is no {SUBMITTED[script]}"
    for variable in variables:
        assert variable.split("=")[0] in (ROOT / script).read_text(encoding="utf-8"), variable
    directives = (ROOT / "launch" / "slurm.py").read_text(encoding="utf-8")
    split = arguments.index(script)
    for option in arguments[:split]:
        assert option.split("=")[0] in directives, f"kfac-dist launch slurm does not know {option}"
    kfac_dist(arguments[split + 1 :])


def installs(requirements: list[str]) -> None:
    """This distribution, with extras that it has."""
    installed = metadata("kfac-dist")
    for requirement in requirements:
        name, extras = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        assert name == installed["Name"]
        assert set((extras or "").split(",")) - {""} <= set(installed.get_all("Provides-Extra")), requirement


# -- the tests ---------------------------------------------------------------------------------------------------------


def examine(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within ``folder``, where the configurations are; what the block registers is forgotten."""
    assert block.language in CHECKERS, f"no rule for a block of {block.language!r}: {', '.join(CHECKERS)}"
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["kfac-dist"])  # the options of pytest are none of the command's
    monkeypatch.delitem(sys.modules, "documented", raising=False)
    for registry in (layers, coarse_spaces, likelihoods, communicators, launchers):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    CHECKERS[block.language](block)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("block", BLOCKS, ids=[f"{b.page}:{b.line}" for b in BLOCKS])
def test_every_block_is_run_or_checked(block, tmp_path, monkeypatch, capsys):
    examine(block, tmp_path, monkeypatch)


def test_every_page_and_every_language_has_its_blocks():
    assert {block.language for block in BLOCKS} == set(CHECKERS)
    assert {"README.md", "CONTRIBUTING.md", "docs/cluster.md", "docs/extending.md"} <= {block.page for block in BLOCKS}
    readme = [block.text for block in BLOCKS if block.page == "README.md"]
    assert any("Trainer(" in program for program in readme)
    assert any("kfac.step(" in program for program in readme)


def test_every_entry_of_the_tables_is_in_use():
    named = [*SHOWN, *SCRIPTS]
    assert [(p, start) for p, start in named if not any(b.page == p and start in b.text for b in BLOCKS)] == []
    assert {path for path in SUBMITTED if any(path in block.text for block in BLOCKS)} == set(SUBMITTED)


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("```\nno language\n```", "no rule for a block of ''"),
        ("```fortran\nend\n```", "no rule for a block of 'fortran'"),
        ("```python\nimport kfac_dist\nkfac_dist.nothing\n```", "no attribute 'nothing'"),
        ("```yaml\ntrainer: {max_epoch: 1}\n```", "max_epoch"),
        ("```text\nnobody tests this\n```", "name the test of what it shows"),
        ("```bash\ncurl example.org\n```", "no rule for curl"),
        ("```bash\nmake coffee\n```", "coffee"),
        ("```bash\nkfac-dist fit --config configs/none.yaml\n```", "none.yaml"),
        ("```bash\nkfac-dist launch torchrun -n 4 --nonsense -- fit --config FILE\n```", "--nonsense"),
        ("```bash\nkfac-dist launch torchrun -n 4 -- fit --config FILE --trainer.epochs=1\n```", "trainer.epochs"),
        ("```yaml\nplan: {title: x, problems: {nothing: {epochs: 1, seconds: 1}}, methods: [adam]}\n```", "nothing"),
        ("```bash\nkfac-dist study configs/study/quick.yaml --nonsense\n```", "nonsense"),
        ("```bash\nkfac-dist plan --layers resnet51\n```", "resnet51"),
        ("```bash\nsbatch launch/jobs/none.sbatch fit --config FILE\n```", "none.sbatch"),
        ("```bash\nsbatch --nonsense=2 launch/jobs/srun.sbatch fit --config FILE\n```", "--nonsense"),
        ("```bash\nNONSENSE=4 sbatch launch/jobs/srun.sbatch fit --config FILE\n```", "NONSENSE"),
        ("```bash\npip install 'kfac-dist[nothing]'\n```", "nothing"),
        ("```bash\n# a comment is no command\n```", "no command"),
    ],
)
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_a_wrong_block_fails(block, complaint, tmp_path, monkeypatch, capsys):
    (made,) = blocks("page.md", block)
    with pytest.raises(
        (AssertionError, AttributeError, KeyError, SystemExit, ValueError, pytest.fail.Exception)
    ) as caught:
        examine(made, tmp_path, monkeypatch)
    assert complaint in f"{caught.value} {capsys.readouterr().err}"


def test_a_block_that_is_not_closed_is_an_error():
    with pytest.raises(ValueError, match="not closed"):
        blocks("page.md", "```bash\nmake demo\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_a_line_name_what_exists(page):
    """``kfac-dist SUBCOMMAND`` and ``python -m MODULE``."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text(encoding="utf-8"))
    subcommands = {words[1] for s in spans if (words := s.split())[0] == "kfac-dist" and len(words) > 1}
    assert subcommands <= set(command.SUBCOMMANDS)
    modules = {m for s in spans for m in re.findall(r"^(?:\S*/)?python -m ([\w.]+)", s)}
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
