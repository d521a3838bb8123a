"""YAML that somebody broke: what once got through to PyYAML, and what it raised."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pretrain.errors import UsageError
from pretrain.mapping import MAX_BYTES, MAX_VALUES, parse_yaml, read_mapping

LISTS = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGES = "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))
BROKEN = {
    "a month 99": ("2001-99-99", "is not valid YAML: month must be in"),
    "no truth": ("!!bool x", "is not valid YAML"),
    "no number": ("!!int ''", "is not valid YAML"),
    "no date": ("!!timestamp x", "is not valid YAML"),
    "an object": ("!!python/name:os.system", "is not valid YAML: could not determine a constructor"),
    "a long number": ("0x" + "f" * 5000, "a number of 5002 digits"),
    "another": ("9" * 5000, "a number of 5000 digits"),
    "open brackets": ("[" * 2000, "nested too deeply"),
    "brackets": ("[" * 60 + "]" * 60, "nested too deeply"),
    "a list in itself": ("&a [*a]", f"stands for more than {MAX_VALUES} values"),
    "2^60 lists": ("a0: &a0 [x]\n" + LISTS, f"stands for more than {MAX_VALUES} values"),
    "2^60 keys": ("a0: &a0 {x: 1}\n" + MERGES, f"stands for more than {MAX_VALUES} values"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_value_is_refused_at_once(kind: str) -> None:
    text, told = BROKEN[kind]
    started = time.process_time()
    with pytest.raises(UsageError, match=r"recipe\.yaml") as caught:
        parse_yaml(text, "recipe.yaml")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - started < 2


def test_plain_values_and_aliases_are_read() -> None:
    assert parse_yaml("", "x") is None
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: [1e-3, .inf, é]}", "x")["c"]["b"] == 1
    assert parse_yaml("[" * 40 + "]" * 40, "x")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300, "folder", "pipe", "loop"], ids=ascii)
def test_paths_that_are_no_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match="cannot read the recipe"):
        read_mapping(tmp_path / f"{name}.yaml", kind="recipe", holds="sections")


def test_files_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a" * (MAX_BYTES + 1))
    for path in (tmp_path / "a.yaml", Path("/dev/zero")):
        with pytest.raises(UsageError, match="it has more than 1 MiB|it is not a file"):
            read_mapping(path, kind="recipe", holds="sections")


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(start + b"a: 1\n")
    assert read_mapping(tmp_path / "a.yaml", kind="recipe", holds="sections") == {"a": 1}
