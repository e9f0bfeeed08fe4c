"""A study's report, made of its runs' files alone: ``report.md`` with pictures beside it, and ``report.html``."""

from __future__ import annotations

from pathlib import Path

from kfac_dist.study.report.as_html import to_html
from kfac_dist.study.report.collect import collect
from kfac_dist.study.report.page import page
from kfac_dist.study.report.study import Study

__all__ = ["Study", "write_report"]


def write_report(study: Study, runs_folder: Path, output_folder: Path) -> None:
    """Write ``report.md``, ``report.html`` and ``pictures/*.png``; what has not finished is said to be missing.

    Args:
        study: its contents.
        runs_folder: of the runs' files.
        output_folder: of the report; files of an earlier one are replaced.
    """
    output_folder.mkdir(parents=True, exist_ok=True)
    text = page(study, collect(study, runs_folder), output_folder)
    (output_folder / "report.md").write_text(text, encoding="utf-8")
    (output_folder / "report.html").write_text(to_html(text, study.title, output_folder), encoding="utf-8")
