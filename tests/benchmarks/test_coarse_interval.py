from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import coarse_interval


def test_smoke(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        coarse_interval.main(["--smoke", "--seeds", "0", "3", "--output", str(tmp_path / "page.md")])
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(rows[0]) == coarse_interval.HEAD
    pairs = [tuple(map(int, row[:2])) for row in rows[2:]]
    assert pairs == [(1, 256), (2, 256), (5, 256), (10, 256), (1, 128), (1, 64), (1, 32)]
    losses = [float(row[2].split()[0]) for row in rows[2:]]
    assert all(0.0 < loss < 0.6931 for loss in losses)  # better than guessing every pixel
    assert all("(" in row[2] for row in rows[2:])  # two seeds have a range
    assert len(set(losses)) > 1
    assert all(float(row[4]) > 0 for row in rows[2:])
