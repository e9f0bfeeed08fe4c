"""One MPI rank of :func:`tests.helpers.launched.run_mpi`: it runs the job in the folder and leaves its result there."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from mpi4py import MPI


def main(folder: str) -> None:
    """Run ``job.pkl``, a function and its arguments, and write ``<rank>.pkl``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    function, args = pickle.loads(Path(folder, "job.pkl").read_bytes())
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(function(rank, size, *args)))


if __name__ == "__main__":
    main(sys.argv[1])
