"""Figures as data URIs for <img>, where a browser neither runs scripts of an SVG nor loads what it refers to.

For readers who open a figure by itself, all of that is taken out of an SVG as well.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from pretrain.errors import DinobenchError

MAX_BYTES = 12 * 2**20
"""Most bytes of figures on one page: what mail programs still send."""
SUFFIXES = (".svg", ".png")
"""By preference."""
MAX_NAMES = 5
"""Most left-out figures that the note names."""
_PNG = b"\x89PNG\r\n\x1a\n"
_SVG = "http://www.w3.org/2000/svg"
_DROPPED = {"script", "foreignobject", "metadata", "iframe", "set", "animate", "animatetransform", "animatemotion"}
_ELSEWHERE = re.compile(r"url\(\s*['\"]?\s*(?!#)[^\s'\")]|@import|javascript:", re.IGNORECASE)

ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


@dataclass(frozen=True)
class Picture:
    """A figure on the page."""

    name: str
    uri: str


@dataclass
class Album:
    """The figures of a page, up to a size; what did not fit or could not be read is kept by name."""

    max_bytes: int = MAX_BYTES
    size: int = 0
    too_much: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def add(self, name: str, file: Path) -> Picture | None:
        """A file as a picture; None where it is left out."""
        try:
            uri = data_uri(file)
        except (DinobenchError, OSError):
            self.unreadable.append(name)
            return None
        if self.size + len(uri) > self.max_bytes:
            self.too_much.append(name)
            return None
        self.size += len(uri)
        return Picture(name, uri)

    def add_all(self, folder: Path) -> list[Picture]:
        """The figures of a folder, each once whatever its formats."""
        files = {file.stem: file for suffix in reversed(SUFFIXES) for file in folder.glob(f"*{suffix}")}
        found = (self.add(f"{folder.parent.name}/{stem}", files[stem]) for stem in sorted(files))
        return [picture for picture in found if picture is not None]

    def notes(self) -> list[str]:
        """What a reader of the page does not see."""
        limit = f"the page holds {self.max_bytes / 2**20:.0f} MiB of figures"
        reasons = {limit: self.too_much, "neither PNG nor SVG, or damaged": self.unreadable}
        return [f"{_some(names)} left out: {reason}" for reason, names in reasons.items() if names]


def data_uri(file: Path) -> str:
    """A PNG or an SVG as `data:` URI.

    Raises:
        DinobenchError: it is neither.
        OSError: it cannot be read.
    """
    content = file.read_bytes()
    if content.startswith(_PNG):
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"
    if file.suffix != ".svg":
        raise DinobenchError(f"{file} is not a figure: expected PNG or SVG")
    return f"data:image/svg+xml;base64,{base64.b64encode(harmless(content)).decode()}"


def harmless(svg: bytes) -> bytes:
    """An SVG without scripts, event handlers, embedded pages, animations and references to anything outside it.

    Raises:
        DinobenchError: it is not an SVG.
    """
    try:
        root = ElementTree.fromstring(svg)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise DinobenchError("not an SVG: it is damaged") from error
    if root.tag != f"{{{_SVG}}}svg":
        raise DinobenchError(f"not an SVG: its outermost element is {root.tag}")
    for element in list(root.iter()):
        for name in [name for name, value in element.attrib.items() if not _is_harmless(name, value)]:
            del element.attrib[name]
        for child in [child for child in element if _is_dropped(child)]:
            element.remove(child)
    return ElementTree.tostring(root)


def _is_harmless(name: str, value: str) -> bool:
    local = _local(name)
    if local == "href":
        return value.startswith(("#", "data:image/png;"))
    return not local.startswith("on") and not _ELSEWHERE.search(value)


def _is_dropped(element: ElementTree.Element) -> bool:
    local = _local(element.tag)
    return local in _DROPPED or (local == "style" and bool(_ELSEWHERE.search("".join(element.itertext()))))


def _local(name: str) -> str:
    return name.rpartition("}")[2].lower()


def _some(names: Iterable[str]) -> str:
    named = list(names)
    more = f" and {len(named) - MAX_NAMES} more" if len(named) > MAX_NAMES else ""
    return f"figures {', '.join(named[:MAX_NAMES])}{more}"
