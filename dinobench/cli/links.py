"""Where to look at what was logged: the pages of MLflow that a verb has filled."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from dinobench.addresses import database_file, is_server, without_credentials

LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where `dinobench ui` listens unless told otherwise."""


def full_links(pages: Mapping[str, str], uri: str, output: Path) -> dict[str, str]:
    """Name -> address, after what starts a server where there is none yet.

    Args:
        pages: below the address of a server, as a store gives them.
        output: the folder that `dinobench ui` is to show.
    """
    if not pages:
        return {}
    server = without_credentials(uri) if is_server(uri) else LOCAL_SERVER
    links = {name: f"{server}{page}" for name, page in pages.items()}
    if is_server(uri):
        return links
    file = database_file(uri)
    folder = file.parent if file and file.name == "mlflow.db" else output
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    return {"pages": f"start `{shlex.join(['dinobench', 'ui', '--output', str(shown)])}`, then open", **links}


def say_links(pages: Mapping[str, str], uri: str, output: Path, say: Callable[[str], None]) -> None:
    """One line each."""
    for name, link in full_links(pages, uri, output).items():
        say(f"{name:<24}{link}")
