"""The report as one HTML file that needs no other: its pictures and its style are inside, and it has no scripts."""

from __future__ import annotations

import base64
import html
import re
from importlib.resources import files
from pathlib import Path

import markdown

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
VERDICTS = re.compile(r"<strong>(helps|does not help|harms|undecided)</strong>")
IMAGES = re.compile(r'src="([^":]+\.png)"')


def to_html(text: str, title: str, folder: Path) -> str:
    """The page, with the pictures that it names below ``folder`` inside.

    Raises:
        FileNotFoundError: a picture is not there.
    """

    def inlined(found: re.Match[str]) -> str:
        data = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    def coloured(found: re.Match[str]) -> str:
        return f'<strong class="{found[1].replace(" ", "-")}">{found[1]}</strong>'

    reader = markdown.Markdown(extensions=["tables", "toc"], extension_configs={"toc": {"toc_depth": "2-2"}})
    body = reader.convert(text)
    contents = re.sub(r'<div class="toc">|</div>', "", reader.toc)
    body = body.replace("</h1>", f"</h1>\n<nav>{contents.strip()}</nav>", 1)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = VERDICTS.sub(coloured, IMAGES.sub(inlined, body))
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return PAGE.format(title=html.escape(title), style=style, body=body)
