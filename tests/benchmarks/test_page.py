from __future__ import annotations

from pathlib import Path

from benchmarks.page import TITLE, table, write_sections


def test_a_section_takes_the_place_of_the_one_of_its_title(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    write_sections({"Steps": "one\n\n### deeper\n\ntext", "Scaling": "two\n"}, page)
    write_sections({"Steps": "three", "Memory": "four"}, page)
    assert page.read_text() == f"{TITLE}\n## Steps\n\nthree\n\n## Scaling\n\ntwo\n\n## Memory\n\nfour\n"
    write_sections({"Scaling": "five\n\n### deeper\n\n#### and deeper"}, page)
    assert "## Scaling\n\nfive\n\n### deeper\n\n#### and deeper\n\n## Memory" in page.read_text()
    assert "three" in page.read_text()


def test_tables_align_numbers_to_the_right() -> None:
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |\n"
