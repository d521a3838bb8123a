from __future__ import annotations

from pathlib import Path

import pytest

from dinobench.page.pictures import Album, data_uri, harmless
from pretrain.errors import DinobenchError

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 100


@pytest.mark.parametrize(
    "inner",
    [
        "<script>alert(1)</script>",
        "<foreignObject><iframe/></foreignObject>",
        '<image href="https://example.org/x.png"/>',
        '<use xlink:href="file:///etc/passwd"/>',
        '<a href="javascript:alert(1)"><path/></a>',
        '<path onclick="alert(1)"/>',
        '<path style="fill: url(https://example.org/x)"/>',
        "<style>@import 'https://example.org/x.css';</style>",
        '<set attributeName="href" to="javascript:alert(1)"/>',
    ],
)
def test_an_svg_is_left_without_what_runs_or_loads(inner: str) -> None:
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    clean = harmless(f"<svg {names}>{inner}</svg>".encode()).decode()
    assert "alert" not in clean
    assert "example.org" not in clean
    assert "file:" not in clean
    assert "iframe" not in clean


def test_an_svg_keeps_its_drawing() -> None:
    inner = '<defs><path id="a" d="M0 0"/></defs><use xlink:href="#a" style="fill: url(#b)"/>'
    inner += "<style>path {fill: red}</style>"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    clean = harmless(f"<svg {names}>{inner}</svg>".encode()).decode()
    for kept in ('d="M0 0"', 'href="#a"', "url(#b)", "path {fill: red}"):
        assert kept in clean


@pytest.mark.parametrize("content", [b"<svg", b"<html/>", b'<svg xmlns="https://example.org"/>', b"\xff\xfe"])
def test_what_is_no_svg_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_bytes(content)
    with pytest.raises(DinobenchError, match="not an SVG"):
        data_uri(tmp_path / "a.svg")


def test_what_does_not_fit_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("a", "b"):
        (tmp_path / "figures" / f"{name}.png").write_bytes(PNG)
    (tmp_path / "figures" / "c.png").write_bytes(b"GIF")
    album = Album(max_bytes=200)
    assert [picture.name for picture in album.add_all(tmp_path / "figures")] == [f"{tmp_path.name}/a"]
    fits, unread = album.notes()
    assert fits.startswith(f"figures {tmp_path.name}/b left out: the page holds")
    assert unread == f"figures {tmp_path.name}/c left out: neither PNG nor SVG, or damaged"


def test_of_two_formats_the_sharp_one_is_shown(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (picture,) = Album().add_all(tmp_path)
    assert picture.uri.startswith("data:image/svg+xml;base64,")
