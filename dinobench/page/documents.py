"""The tables of a results folder, as `dinobench table` wrote them: <results>/tables/**.md with their figures.

Links among these tables, and to results whose receipts are shown, lead to their places on the page; other links would
lead nowhere there, so that their text stays and the file they mean is shown on hovering. A CSV file without a page of
its name is shown as a table.
"""

from __future__ import annotations

import csv
import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from dinobench.page.pictures import Album
from pretrain.errors import DinobenchError

INDEX = "README.md"
HEADING_LEVEL = 3
"""Of a table's title on the page."""


@dataclass(frozen=True)
class Document:
    """One table of the results folder."""

    anchor: str
    html: Markup


def read_documents(results: Path, album: Album, receipts: Mapping[str, str]) -> list[Document]:
    """The tables below a results folder, each folder's index first.

    Args:
        receipts: absolute path of a file -> place of its receipt on the page.

    Raises:
        DinobenchError: a table cannot be read.
    """
    root = results / "tables"
    pages = sorted(root.rglob("*.md"), key=lambda file: (file.parent, file.name != INDEX, file.name))
    bare = [file for file in sorted(root.rglob("*.csv")) if not file.with_suffix(".md").exists()]
    own = {os.path.abspath(file): f"table-{number}" for number, file in enumerate([*pages, *bare], 1)}
    documents = [_page(file, {**receipts, **own}, results, album) for file in pages]
    return documents + [_csv_table(file, own[os.path.abspath(file)]) for file in bare]


def _page(file: Path, anchors: Mapping[str, str], results: Path, album: Album) -> Document:
    # html=False: tags in the text are shown, not obeyed
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _open_table)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(_read(file))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1:]) + HEADING_LEVEL - 1, 6)}"
        if token.attrs.pop("style", "") == "text-align:right":
            token.attrSet("class", "number")
        _place_links(token.children or [], file, anchors)
        for child in token.children or []:
            _place_image(child, file, results, album)
    return Document(anchors[os.path.abspath(file)], Markup(parser.renderer.render(tokens, parser.options, {})))


def _open_table(*_: object) -> str:
    return '<div class="scroll" tabindex="0" role="region" aria-label="table"><table class="sortable">\n'


def _place_links(tokens: Sequence[Token], file: Path, anchors: Mapping[str, str]) -> None:
    tag = "a"  # links do not nest in Markdown
    for token in tokens:
        if token.type == "link_open":
            target = str(token.attrs.pop("href", ""))
            anchor = anchors.get(os.path.abspath(file.parent / unquote(target)))
            tag = "a" if anchor else "span"
            token.attrs = {"href": f"#{anchor}"} if anchor else {"title": target}
        if token.type in ("link_open", "link_close"):
            token.tag = tag


def _place_image(token: Token, file: Path, results: Path, album: Album) -> None:
    if token.type != "image":
        return
    path = file.parent / unquote(str(token.attrs["src"]))
    inside = results.resolve() in path.resolve().parents
    picture = album.add(f"{file.parent.name}/{path.name}", path) if inside else None
    if picture:
        token.attrs["src"] = picture.uri
    else:
        token.type, token.tag, token.content = "text", "", f"[figure {path.name}: left out]"


def _csv_table(file: Path, anchor: str) -> Document:
    rows = list(csv.reader(_read(file).splitlines()))
    head, body = (rows[0], rows[1:]) if rows else ([], [])
    parts = [Markup("<h3>{}</h3>\n").format(file.stem), Markup(_open_table())]
    parts += [Markup("<thead>"), _row("th", head), Markup("</thead>\n<tbody>")]
    parts += [*(_row("td", row) for row in body), Markup("</tbody></table></div>\n")]
    return Document(anchor, Markup("").join(parts))


def _row(tag: str, cells: Sequence[str]) -> Markup:
    inner = Markup("").join(Markup(f"<{tag}>{{}}</{tag}>").format(cell) for cell in cells)
    return Markup("<tr>{}</tr>\n").format(inner)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DinobenchError(
            f"{file} cannot be read: it was altered or damaged; write it with `dinobench table`"
        ) from error
