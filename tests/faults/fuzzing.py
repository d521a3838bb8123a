"""Generated bad input: what every reader promises, how a file is spoilt, and how many inputs a test tries.

Of each input a reader says yes, or raises a DinobenchError with one sentence (exit code 2, 3 or 4). It raises nothing
else, ends within SECONDS, takes at most MEMORY bytes on top of what the process has, and leaves its file as it was.

The inputs are the same on every machine and in every run; DINOBENCH_FUZZ_SEED=7 draws others.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pretrain.errors import DinobenchError

SECONDS = 5.0
"""Of processor time, for one input; most take milliseconds."""
WAITING = 60.0
"""Of the clock, for one input: a reader that waits for something."""
MEMORY = 1 << 30
"""For one input: twice what the largest image that Pillow admits takes (89 million pixels of 4 bytes)."""
FEW = 20
"""Inputs of a test in the default set."""


class TooLong(BaseException):
    """Not an Exception: the readers catch those."""


class TooLarge(AssertionError):
    """An input made a reader ask for more memory than is stated, whatever it said then."""


def inputs(number: int, few: int = FEW) -> pytest.MarkDecorator:
    """The parameter `examples`: `few` in the default set, `number` in `nox -s faults`."""
    return pytest.mark.parametrize("examples", [few, pytest.param(number, marks=pytest.mark.faults)])


def fuzz(strategy: SearchStrategy[Any], check: Callable[[Any], object], examples: int) -> int:
    """Run `check` on `examples` values of a strategy; the smallest that fails is shown. Gives their number."""
    tried = 0

    def once(value: Any) -> None:
        nonlocal tried
        tried += 1
        check(value)

    seed = os.environ.get("DINOBENCH_FUZZ_SEED")
    test = hypothesis.given(strategy)(once)
    test = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )(test)
    if seed is not None:
        test = hypothesis.seed(int(seed))(test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Hypothesis about large inputs, of zipfile about names used twice
        test()
    return tried


def refused(read: Callable[[], object], *files: Path, memory: int = MEMORY) -> DinobenchError | None:
    """Hold the promise of the module for one input; gives the refusal, or None where the input was accepted."""
    before = [file.read_bytes() for file in files]
    try:
        with bounded(memory), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        error = None
    except DinobenchError as caught:
        error = caught
    assert [file.read_bytes() for file in files] == before, "the file was changed"
    if error is not None:
        assert error.exit_code in (2, 3, 4)
        assert len(str(error)) > 10
        refuse_memory_errors(error)
    return error


def refuse_memory_errors(error: BaseException | None) -> None:
    """A reader that noticed by running out of memory would, without our limit, have taken the machine's."""
    seen = 0
    while error is not None and seen < 20:
        text = str(error)
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or "MemoryError" in text:
            raise TooLarge(text)
        error, seen = error.__cause__ or error.__context__, seen + 1


@contextmanager
def bounded(memory: int = MEMORY) -> Iterator[None]:
    """End the block with TooLong after SECONDS or WAITING; let it have `memory` more bytes of address space."""

    def stop(number: int, frame: FrameType | None) -> None:
        # Hypothesis counts the time of the garbage collector; an error in there would be lost.
        if frame is None or frame.f_code.co_name != "gc_callback":
            raise TooLong(f"more than {SECONDS:g} s of work or {WAITING:g} s of waiting")

    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, WAITING)}
    old_limits = resource.getrlimit(resource.RLIMIT_AS)
    old_handlers = {number: signal.signal(number, stop) for number in clocks}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Python code is stopped by the signals; a loop in C is not, and ends the process here.
    faulthandler.dump_traceback_later(2 * WAITING, exit=True, file=sys.__stderr__)
    for clock, seconds in clocks.values():
        signal.setitimer(clock, seconds, 0.1)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, old_limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old_limits)
        for clock, _ in clocks.values():
            signal.setitimer(clock, 0)
        faulthandler.cancel_dump_traceback_later()
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


# What files are spoilt with.

NASTY_TEXTS = (
    "", " ", "\n", "a\nb", "\0", "a\0b", "\ud800", "é" * 3, "名前", "..", "../..", "/", "/etc/passwd", "~", "~nobody9",
    "a" * 300, "a/" * 3000, "%s%n", "{0}", "{split}", "$HOME", "'; --", "nan", "-inf", "1e999", "None", "null", "true",
    "train[:0.5]", "train[0.9:0.1]", "folder:", "npz:/nowhere", "imagenet:\0", "digits", "[[", "\x1b[31m", "\ufeff",
)  # fmt: skip
NASTY_NUMBERS = (
    0, -1, 1, 2, 3, 255, 256, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63), 0.0, -0.0, 0.5, 1e-320, 1e308,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip

texts = st.sampled_from(NASTY_TEXTS) | st.text(max_size=20)
scalars = st.none() | st.booleans() | st.sampled_from(NASTY_NUMBERS) | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | st.integers(), inner, max_size=4),
    max_leaves=6,
)
"""Plain values of every kind."""
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=6
)


def spoilt_bytes(content: bytes) -> SearchStrategy[bytes]:
    """A file with bits flipped, its end gone, a part of it overwritten, doubled, cut out or put elsewhere."""
    if not content:
        return st.binary(max_size=64)
    place = st.integers(0, len(content) - 1)

    def flip(spots: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for spot, bit in spots:
            changed[spot] ^= 1 << bit
        return bytes(changed)

    def overwrite(spot: int, part: bytes) -> bytes:
        return content[:spot] + part + content[spot + len(part) :]

    def cut(first: int, last: int) -> bytes:
        return content[: min(first, last)] + content[max(first, last) :]

    def double(first: int, last: int) -> bytes:
        return content[: max(first, last)] + content[min(first, last) :]

    extreme = st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\x7f" + b"\xff" * 7, b"\0\0\0\x80", b"\n", b"{"])
    return st.one_of(
        st.lists(st.tuples(place, st.integers(0, 7)), min_size=1, max_size=8).map(flip),
        place.map(lambda spot: content[:spot]),
        st.builds(overwrite, place, st.binary(min_size=1, max_size=16) | extreme),
        st.builds(cut, place, place),
        st.builds(double, place, place),
        st.binary(max_size=64).map(lambda more: content + more),
    )


def changed(document: Any) -> SearchStrategy[Any]:
    """A plain document with one to three of its values replaced, left out, renamed or added."""
    places = list(_places(document))

    def change(edits: list[tuple[tuple[Any, ...], str, Any, str]]) -> Any:
        result = document
        for place, kind, value, name in edits:
            result = _edited(result, place, kind, value, name)
        return result

    kinds = st.sampled_from(["replace", "replace", "replace", "drop", "rename", "add"])
    return st.lists(st.tuples(st.sampled_from(places), kinds, values, texts), min_size=1, max_size=3).map(change)


def _places(document: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield prefix
    items = document.items() if isinstance(document, dict) else enumerate(document) if _is_list(document) else ()
    for key, value in items:
        yield from _places(value, (*prefix, key))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _edited(document: Any, place: tuple[Any, ...], kind: str, value: Any, name: str) -> Any:
    """A copy with one edit; the document as it is where an earlier edit took the place away."""
    if not place:
        return {**document, name: value} if kind == "add" and isinstance(document, dict) else value
    key, *rest = place
    if isinstance(document, dict) and key in document:
        if rest or kind in ("replace", "add"):
            inner = value if not rest and kind == "replace" else _edited(document[key], tuple(rest), kind, value, name)
            return {**document, key: inner}
        without = {other: item for other, item in document.items() if other != key}
        return without if kind == "drop" else {**without, name: document[key]}
    if _is_list(document) and isinstance(key, int) and key < len(document):
        items = list(document)
        if not rest and kind == "drop":
            del items[key]
        else:
            items[key] = _edited(items[key], tuple(rest), kind, value, name)
        return items
    return document
