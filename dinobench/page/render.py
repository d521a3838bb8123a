"""The page as one HTML document: nothing is loaded, and nothing runs but the script that sorts tables.

The browser is told so by a Content-Security-Policy that names style and script by their hashes. The time of rendering
is not on the page: of the same results it is the same file, byte for byte.
"""

from __future__ import annotations

import base64
import hashlib
import math
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dinobench.entries import number
from dinobench.page.contents import Page
from dinobench.statistics import MIN_SEEDS

FOLDER = Path(__file__).parent
MAX_SENTENCES = 12
"""Most pairs that get a sentence each; of more, only the differences that are shown."""


def render(page: Page) -> str:
    """The whole document."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"score": number, "exact": _exact, "p": _p, "bounds": _bounds, "when": _when}
    style, script = _own("page.css"), _own("page.js")
    template = environment.get_template("page.html.j2")
    return template.render(
        page=page,
        style=Markup(style),
        script=Markup(script),
        policy=content_security_policy(style, script),
        sentences=_sentences(page),
        min_seeds=MIN_SEEDS,
    )


def content_security_policy(style: str, script: str) -> str:
    """No network, no form, no frame; figures from the page itself; this style and this script alone."""
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _own(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _sentences(page: Page) -> list[str]:
    if page.comparison is None:
        return []
    pairs = page.comparison.pairs
    shown = pairs if len(pairs) <= MAX_SENTENCES else [pair for pair in pairs if pair.shown]
    return [pair.sentence for pair in shown]


def _exact(value: float | None) -> str:
    """A number as the script sorts it; empty comes last."""
    return "" if value is None or math.isnan(value) else f"{value:.9g}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _bounds(interval: tuple[float, float] | None, sign: bool = False) -> str:
    if interval is None:
        return "-"
    return "{:+.1f} to {:+.1f}".format(*interval) if sign else "{:.1f} to {:.1f}".format(*interval)


def _when(created: str) -> str:
    """Like 2026-11-21 08:45 UTC, of 2026-11-21T08:45:02Z."""
    try:
        return f"{datetime.strptime(created, '%Y-%m-%dT%H:%M:%SZ'):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return created
