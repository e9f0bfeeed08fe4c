"""The communicator over MPI, under mpirun: the conformance test, and what is MPI's own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_dist import DistributionConfig, KFACPreconditioner
from kfac_dist.comm import CommunicationError, Communicator, make_channel, make_communicator
from tests.comm.test_communicators import conformance, value
from tests.helpers.launched import environment, mpirun, run, run_mpi

pytestmark = pytest.mark.mpi

ALL_REFUSALS = {"some", "single", "order", "backend", "preconditioner"}


def several(rank: int, world_size: int) -> dict[str, object]:
    """Everything that needs three ranks and leaves them alive, in one job."""
    conformed = conformance(rank, world_size, "mpi")
    return {
        "conformance": conformed,
        "half": half_precision(world_size),
        "pieces": pieces(),
        "given": given(rank),
        "closed": closed(),
        "late": late_peer(rank),
    }


def half_precision(world_size: int) -> list[float]:
    """Sums and copies in dtypes that MPI has not; they travel in float32."""
    from mpi4py import MPI  # noqa: PLC0415  starts MPI, which this module's import must not

    comm = make_communicator("mpi", timeout=30.0)
    sums = []
    for dtype in (torch.float16, torch.bfloat16):
        tensor = torch.full((3,), 0.5, dtype=dtype)
        comm.all_reduce(tensor, "sums")
        assert tensor.dtype == dtype
        received = comm.gather(tensor, 0, "sums")
        if received is not None:
            assert all(each.dtype == dtype and torch.equal(each, tensor) for each in received)
        sums.append(float(tensor[0]))
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"MPI cannot send a tensor of {dtype}; convert it to one of float64"):
            comm.all_reduce(torch.zeros(2, dtype=dtype), "sums")
    comm.close()
    assert MPI.COMM_WORLD.size == world_size
    return sums


def pieces() -> bool:
    """Tensors beyond MPI's counts go in pieces; here a piece is four elements."""
    from kfac_dist.comm import mpi  # noqa: PLC0415  the constant is changed in this process only

    comm = make_communicator("mpi", timeout=30.0)
    mpi.MAX_COUNT, before = 4, mpi.MAX_COUNT
    try:
        tensor = torch.arange(11.0) + comm.rank
        received = comm.gather(tensor, 1, "sums")
        if received is not None:
            assert all(torch.equal(each, torch.arange(11.0) + r) for r, each in enumerate(received))
        comm.all_reduce(tensor, "sums")
        comm.broadcast(sent := torch.arange(11.0) * comm.rank, 1, "sums")
    finally:
        mpi.MAX_COUNT = before
    wanted = comm.size * torch.arange(11.0) + sum(range(comm.size))
    return torch.equal(tensor, wanted) and torch.equal(sent, torch.arange(11.0))


def given(rank: int) -> tuple[int, int]:
    """An MPI communicator of some ranks, which stays the caller's."""
    from mpi4py import MPI  # noqa: PLC0415  as above

    part = MPI.COMM_WORLD.Split(color=int(rank > 0), key=-rank)
    comm = make_communicator("mpi", part, timeout=30.0)
    comm.all_reduce(tensor := torch.tensor([float(rank)]), "sums")
    assert tensor.item() == (0.0 if rank == 0 else 3.0)
    seen = comm.rank, comm.size
    comm.close()
    assert part.allreduce(1) == seen[1]
    part.Free()
    with pytest.raises(ValueError, match=r"process_group='all' must be an mpi4py\.MPI\.Comm"):
        make_communicator("mpi", "all")
    return seen


def closed() -> str:
    comm = make_communicator("mpi", timeout=30.0)
    part = comm.split([range(comm.size)])
    comm.close()
    with pytest.raises(CommunicationError, match=r"barrier on rank \d of 3: the communicator is closed"):
        part.barrier("end")
    with pytest.raises(CommunicationError) as caught:
        comm.all_reduce(torch.zeros(1), "factors")
    return str(caught.value)


def late_peer(rank: int) -> str | None:
    """Rank 1 gives up after two seconds; the others come later."""
    from mpi4py import MPI  # noqa: PLC0415  as above

    comm = make_communicator("mpi", timeout=2.0 if rank == 1 else 30.0)
    outcome = None
    begin = time.monotonic()
    if rank == 1:
        with pytest.raises(CommunicationError) as caught:
            comm.all_reduce(torch.zeros(3), "factors")
        assert 2.0 <= time.monotonic() - begin < 10.0
        assert isinstance(caught.value.__cause__, TimeoutError)
        outcome = str(caught.value)
    MPI.COMM_WORLD.Barrier()
    if rank != 1:
        comm.all_reduce(torch.zeros(3), "factors")
    comm.close()
    return outcome


@pytest.fixture(scope="module")
def three_ranks() -> list[dict[str, object]]:
    return run_mpi(3, several)


def results(three_ranks: list[dict[str, object]], name: str) -> list[object]:
    return [result[name] for result in three_ranks]


def test_three_ranks_conform(three_ranks):
    assert results(three_ranks, "conformance") == [(0, 3), (1, 3), (2, 3)]


def test_one_rank_conforms_without_a_launcher():
    """MPI starts by itself then; in a process of its own, so that this one stays free of MPI."""
    code = "from tests.comm.test_communicators import conformance; print(conformance(0, 1, 'mpi'))"
    done = run([sys.executable, "-m", "mpi4py", "-c", code])
    assert (done.returncode, done.output.split("\n")[-2]) == (0, "(0, 1)"), done.output


def test_half_precision_travels_in_single(three_ranks):
    assert results(three_ranks, "half") == [[1.5, 1.5]] * 3


def test_long_tensors_go_in_pieces(three_ranks):
    assert results(three_ranks, "pieces") == [True] * 3


def test_a_given_communicator_is_duplicated_and_left_open(three_ranks):
    assert results(three_ranks, "given") == [(0, 1), (1, 2), (0, 2)]


def test_a_closed_communicator_says_so(three_ranks):
    assert set(results(three_ranks, "closed")) == {
        f"factors: all_reduce on rank {rank} of 3: the communicator is closed" for rank in range(3)
    }


def test_the_time_out_names_phase_operation_rank_and_size(three_ranks):
    first, late, last = results(three_ranks, "late")
    assert (first, last) == (None, None)
    assert late == (
        "factors: all_reduce on rank 1 of 3 failed: no end within 2 s; end this rank, its messages are still open"
    )


def beside_gloo(rank: int, world_size: int, folder: str) -> dict[str, str]:
    """MPI beside a torch process group with the same ranks, with some of them only, and with another order."""
    import torch.distributed as dist  # noqa: PLC0415  this process's own groups

    found: dict[str, str] = {}
    for name, number in (("alike", rank), ("reversed", world_size - 1 - rank)):
        store = dist.FileStore(f"{folder}/{name}", world_size)
        dist.init_process_group("gloo", store=store, rank=number, world_size=world_size)
        fine = make_communicator("torch", timeout=30.0)
        if name == "alike":
            check_channels(fine)
            some = dist.new_group([0, 1])
            if rank < 2:
                found["some"] = refusal(make_channel, "mpi", make_communicator("torch", some))
                found["single"] = refusal(make_channel, "single", fine)
        else:
            found["order"] = refusal(make_channel, "mpi", fine)
            found["backend"] = refusal(make_communicator, "mpi")
            found["preconditioner"] = refusal(coarse_over_mpi)
        fine.close()
        dist.destroy_process_group()
    return found


def check_channels(fine: Communicator) -> None:
    """MPI beside torch, torch beside MPI, torch beside torch, and none at all."""
    total = sum((value(r) for r in range(fine.size)), torch.zeros(2, 3, dtype=torch.float64))
    over_mpi = make_communicator("mpi", timeout=30.0)
    for backend, beside in (("mpi", fine), ("torch", over_mpi), ("torch", fine)):
        channel = make_channel(backend, beside, timeout=30.0)
        assert (channel.rank, channel.size) == (beside.rank, beside.size)
        assert channel.traffic is beside.traffic
        beside.traffic.clear()
        channel.all_reduce(tensor := value(fine.rank), "coarse")
        assert torch.equal(tensor, total)
        assert beside.traffic.collectives == {"coarse": 1}
        channel.close()
        beside.all_reduce(tensor := value(fine.rank), "fine")  # it is still open
        assert torch.equal(tensor, total)
    over_mpi.close()
    assert make_channel(None, fine) is fine


def refusal(build: Callable[..., object], *args: object) -> str:
    with pytest.raises(ValueError, match="ranks") as caught:
        build(*args)
    return str(caught.value)


def coarse_over_mpi() -> KFACPreconditioner:
    distribution = DistributionConfig(coarse_backend="mpi", timeout=30.0)
    return KFACPreconditioner(nn.Linear(2, 2), "categorical", coarse="layer_step", distribution=distribution)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_mpi(3, beside_gloo, str(tmp_path_factory.mktemp("stores")))


def test_an_mpi_world_that_is_not_the_group_is_refused(beside):
    assert [set(found) for found in beside] == [ALL_REFUSALS, ALL_REFUSALS, ALL_REFUSALS - {"some", "single"}]
    wanted = "connects 3 processes, and the fine level has 2: both must have the same ranks; start all of them by one"
    for found in beside[:2]:
        assert f"coarse_backend='mpi' {wanted}" in found["some"]
        assert "coarse_backend='single' connects 1 processes, and the fine level has 3" in found["single"]


@pytest.mark.parametrize("name", ["order", "backend", "preconditioner"])
def test_ranks_in_another_order_are_refused_everywhere_with_the_cure(beside, name):
    other = "torch.distributed" if name == "backend" else "the fine level"
    for found in beside:
        assert f"its ranks 0 .. 2 are the ranks [2, 1, 0] of {other}; number them alike, with" in found[name]
        assert "init_process_group(rank=MPI.COMM_WORLD.rank" in found[name]


def raises_on_one_rank(rank: int, world_size: int) -> None:
    comm = make_communicator("mpi")
    if rank == 1:
        raise RuntimeError("the exception of rank 1")
    comm.barrier("waiting for rank 1")


def test_an_exception_on_one_rank_aborts_the_job(tmp_path):
    with pytest.raises(AssertionError, match="the exception of rank 1") as failure:
        run_mpi(2, raises_on_one_rank, timeout=60)
    assert "failed on 2 MPI ranks" in str(failure.value)  # ended by itself, not by our time-out


def test_the_package_works_without_mpi4py(tmp_path: Path):
    """A folder before all others, in which importing mpi4py fails as it does where it is not installed."""
    (tmp_path / "mpi4py.py").write_text("raise ModuleNotFoundError(\"No module named 'mpi4py'\")\n")
    code = (
        "from kfac_dist.comm import make_communicator\n"
        "assert make_communicator().size == 1\n"
        "try:\n    make_communicator('mpi')\nexcept ValueError as error:\n    print(error)\n"
    )
    variables = environment()
    variables["PYTHONPATH"] = f"{tmp_path}:{variables['PYTHONPATH']}"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the mpi backend needs mpi4py and an MPI library (No module named 'mpi4py'): ")
    assert "pip install 'kfac-dist[mpi]'" in done.stdout


def test_importing_the_package_does_not_start_mpi():
    code = "import sys, kfac_dist, kfac_dist.comm.mpi; print([m for m in sys.modules if m.startswith('mpi4py')])"
    done = run([sys.executable, "-c", code])
    assert done.output.strip() == "[]"


def test_the_command_line_of_this_file_uses_mpi4pys_runner():
    assert mpirun(2, "-c", "pass")[-4:] == ["-m", "mpi4py", "-c", "pass"]
    assert value(1)[0, 0] == 10
