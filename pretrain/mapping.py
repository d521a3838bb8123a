"""YAML that a user wrote: recipes, presets, suite definitions, values on the command line. Plain values, and no code.

A few lines with aliases (`a: &a [*b, *b]`) can stand for more values than any machine holds; such a document is
refused before it is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UsageError

MAX_BYTES = 1 << 20
"""Of a file; the largest of ours has 10 KB."""
MAX_VALUES = 100_000
"""In a document, those behind an alias counted each time."""
MAX_DEPTH = 50
"""Lists and mappings inside each other."""
MAX_DIGITS = 100
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""That of libyaml wherever PyYAML has it: ten times as fast, and a table reads hundreds of recipes."""


def read_mapping(path: Path, *, kind: str, holds: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        kind: what it is, for messages: "recipe".
        holds: what belongs in it, for messages: "sections (key: value)".

    Raises:
        UsageError: the file cannot be read, is not valid YAML, or holds something else.
    """
    content = parse_yaml(_text_of(path, kind), str(path))
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold {holds}, found {type(content).__name__}")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """The plain value that a YAML text stands for.

    Raises:
        UsageError: it is no YAML, asks for an object, or stands for too much; the message begins with `where`.
    """
    try:
        _refuse_deep(text)
        loader = LOADER(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _num_values(node, {}, MAX_DEPTH) > MAX_VALUES:
                raise UsageError(f"{where} stands for more than {MAX_VALUES} values: write fewer aliases (*name)")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply for YAML that somebody wrote") from error
    # PyYAML lets out what its conversions raise: a ValueError for the date 2001-99-99, a KeyError for `!!bool x`.
    except Exception as error:
        raise UsageError(f"{where} is not valid YAML: {' '.join(str(error).split())[:300]}") from error


def _refuse_deep(text: str) -> None:
    """Level by level: libyaml makes its tree by calling itself, and would end the process at a hundred thousand."""
    depth = 0
    for event in yaml.parse(text, LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecursionError


def _text_of(path: Path, kind: str) -> str:
    try:
        if not path.is_file() and path.exists():
            raise UsageError(f"cannot read the {kind} {path}: it is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except ValueError as error:  # a path with NUL or half of a character
        raise UsageError(f"cannot read the {kind} {str(path)!r}: {error}") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"cannot read the {kind} {path}: it has more than {MAX_BYTES >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error


def _num_values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Values that a node stands for; one that holds itself has no end.

    Args:
        node: of PyYAML.
        known: by the id of a node, what it counts; MAX_VALUES + 1 while it is being counted.
        depth: levels that may follow.
    """
    if depth < 0:
        raise RecursionError
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
        raise ValueError(f"a number of {len(node.value)} digits, which Python will not print")
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1
        items = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_num_values(part, known, depth - 1) for part in parts)
    return known[id(node)]
