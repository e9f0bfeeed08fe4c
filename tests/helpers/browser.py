"""A page in headless Chromium: what its console said, and whether its pictures are there."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# The page lies in a frame, unchanged; the script outside looks at it and writes what it sees where --dump-dom shows it.
OUTSIDE = """<!DOCTYPE html>
<html><body>
<iframe id="page" width="{width}" height="900" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{
  const inside = frame.contentDocument;
  const said = {{
    images: [...inside.images].map(i => ({{alt: i.alt, complete: i.complete, width: i.naturalWidth}})),
    text: inside.body.innerText,
    overflow: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
  }};
  const seen = document.createElement("pre");
  seen.id = "seen";
  seen.textContent = JSON.stringify(said);
  document.body.append(seen);
}});
</script>
</body></html>
"""
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The browser's path; without one the test is skipped, in continuous integration it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing: apt-get install chromium")
        pytest.skip("chromium is missing: apt-get install chromium (make test does it for root)")
    return found


def dump(address: str, folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts, and what the console said."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"]
    options += ["--enable-logging=stderr", "--v=0", "--dump-dom", address]
    done = subprocess.run([chromium(), *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def opened(page: Path, folder: Path, width: int = 1200) -> dict[str, Any]:
    """What a reader of the page finds.

    Returns:
        ``console`` (its lines, of the page by itself and in the frame), ``images`` (each one's ``alt``, whether it is
        ``complete``, and its natural ``width``, 0 for a broken one), ``text``, and ``overflow``: by how many pixels
        the page is wider than its window.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outside = folder / "outside.html"
    text = OUTSIDE.format(width=width, page=html.escape(page.read_text(encoding="utf-8"), quote=True))
    outside.write_text(text, encoding="utf-8")
    _, alone = dump(page.resolve().as_uri(), folder)
    document, framed = dump(outside.resolve().as_uri(), folder)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', document, re.DOTALL)
    assert seen is not None, f"the page did not load:\n{document[-2000:]}"
    return {"console": alone + framed, **json.loads(html.unescape(seen[1]))}
