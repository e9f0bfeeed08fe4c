from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from kfac_dist.study.report import write_report
from kfac_dist.study.runner import make_run
from tests.helpers.browser import opened
from tests.helpers.study_lines import made, store, store_method
from tests.helpers.study_report import ONE, PROTOCOL, SCALAR, TWO, study, told
from tests.study.report.test_ranking import measured

NAMES = {"epochs", "seconds", "time_to_target", "error", "error_free", "coarse_gain", "interactions"}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The folder of the report on a complete study with all measures."""
    folder = tmp_path_factory.mktemp("study")
    side = make_run("tiny", "nicolaides:deflated", {}, seed=0, label="side", epochs=10)
    store(side, made(3.0), folder / "runs")
    rates = {"adam": 0.5, ONE: [1.0, 1.1, 0.9, 1.2, 0.8], SCALAR: 1.5, TWO: 2.0, "rate_free_adaptive": 1.8}
    contents = told(folder / "runs", rates, {TWO: 1.5, SCALAR: 1.0, "rate_free_adaptive": 1.1}, side={"tiny": (side,)})
    for run in PROTOCOL.finals(TWO, PROTOCOL.chosen(TWO, folder / "runs") or {}):
        store(run, measured(2.0), folder / "runs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, where a label does not fit
        write_report(contents, folder / "runs", folder / "report")
    return folder / "report"


def test_the_text_names_every_picture_and_they_are_small(report: Path) -> None:
    text = (report / "report.md").read_text()
    named = re.findall(r"!\[[^]]+\]\((pictures/[^)]+)\)", text)
    assert set(named) == {f"pictures/tiny_{name}.png" for name in NAMES}
    assert {str(path.relative_to(report)) for path in (report / "pictures").iterdir()} == set(named)
    for name in named:
        data = (report / name).read_bytes()
        assert data[:4] == b"\x89PNG"
        assert len(data) < 150_000
    assert "Incomplete" not in text
    for heading in ("Verdict", "Winners", "CURVES autoencoder 784-12-4, 96 images", "How it was made"):
        assert f"\n## {heading}\n" in text
    assert "`kfac-dist study made`" in text


def test_html_and_text_say_the_same(report: Path) -> None:
    text, page = ((report / f"report.{kind}").read_text() for kind in ("md", "html"))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    shown = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    assert len(shown) == len(rows) > 20
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == len(NAMES)
    assert 'src="pictures' not in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert '<strong class="helps">helps</strong>' in page


def test_it_opens_in_a_browser_with_all_its_pictures(report: Path, tmp_path: Path) -> None:
    seen = opened(report / "report.html", tmp_path)
    assert seen["console"] == []
    assert len(seen["images"]) == len(NAMES)
    assert all(image["complete"] and image["width"] > 100 and image["alt"] for image in seen["images"])
    assert "The trials rank two-level K-FAC, layer_step_momentum best" in seen["text"]


def test_a_phone_shows_it_without_scrolling_the_page_sideways(report: Path, tmp_path: Path) -> None:
    assert opened(report / "report.html", tmp_path, width=390)["overflow"] <= 0


def test_a_broken_picture_and_an_error_are_seen(report: Path, tmp_path: Path) -> None:
    page = (report / "report.html").read_text()
    first = page.index("base64,") + len("base64,")
    broken = tmp_path / "broken.html"
    broken.write_text(page[:first] + "AAAA" + page[first + 4 :] + "<script>nothing_of_this_name()</script>")
    seen = opened(broken, tmp_path)
    assert [image["width"] > 0 for image in seen["images"]].count(False) == 1
    assert any("nothing_of_this_name is not defined" in line for line in seen["console"])


def test_an_incomplete_study_gives_a_report_of_what_is_there(tmp_path: Path) -> None:
    store_method(PROTOCOL, ONE, [made(1.0)] * 2, tmp_path)
    contents = study("adam", ONE, TWO, profile="Quick.", left_out={"kfac_pytorch": "needs a clone"})
    write_report(contents, tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**Incomplete: 22 runs have not finished; what follows is what is there so far.**" in text
    assert "Without a finished run so far: Adam; two-level K-FAC, layer_step_momentum." in text
    assert "| K-FAC, factored damping (2 seeds so far) |" in text
    assert "no verdict" in text
    assert "kfac-pytorch is left out: it needs a clone" in text
    assert (tmp_path / "report" / "report.html").read_text().count("<img ") == 2  # no first-order method: no target


def test_the_errors_of_failed_runs_are_told(tmp_path: Path) -> None:
    bad = made(1.0, "failed", epochs=3)
    bad[-1] |= {"error": "RuntimeError: shapes"}
    store_method(PROTOCOL, "adam", [made(1.0), bad], tmp_path, [made(1.0), bad])
    write_report(study("adam"), tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "\n- Adam, trial 1: RuntimeError: shapes\n- Adam, seed 1: RuntimeError: shapes\n\n" in text
    store_method(PROTOCOL, "adam", [made(1.0)] * 2, tmp_path)
    write_report(study("adam"), tmp_path, tmp_path / "report")
    assert "ended with an error" not in (tmp_path / "report" / "report.md").read_text()


def test_a_study_without_any_run_gives_a_report_too(tmp_path: Path) -> None:
    write_report(study("adam", ONE), tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Incomplete: 14 runs" in text
    assert "Without a finished run so far: Adam; K-FAC, factored damping." in text
    assert "<img" not in (tmp_path / "report" / "report.html").read_text()
