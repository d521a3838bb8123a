"""Pickles of a few bytes that Python's own reader answers with the memory or the time of a machine."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import time
from pathlib import Path

import pytest

from pretrain.errors import DinobenchError
from suites.ground_truth import read_ground_truth


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def nested_tuples(levels: int) -> bytes:
    return b")q\0" + b"".join(b"h%ch%c\x86q%c" % (number, number, number + 1) for number in range(levels))


def document(names: bytes) -> bytes:
    """A ground truth whose list of names is what the instructions make."""
    return b"\x80\x02}(" + text("imlist") + names + text("qimlist") + b"]" + text("gnd") + b"]u."


def nested_lists(levels: int) -> bytes:
    first = b"]q\0" + text("a") + b"a"
    return first + b"".join(b"](h%ch%ceq%c" % (number, number, number + 1) for number in range(levels))


BOMBS = {
    "the number 2^32 - 1 for a value": (b"\x80\x02]r\xff\xff\xff\xff.", "numbers a value 4294967295"),
    "the number 2^30 in words": (b"\x80\x02]p1073741824\n.", "numbers a value 1073741824"),
    "a key of 2^60 tuples": (b"\x80\x02}(" + nested_tuples(60) + b"K\1u.", "uses a tuple twice"),
    "an array of 2^40 bytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "is the download complete"),
    "a name that is a list of 2^60": (document(b"](" + nested_lists(60) + b"e"), "not a list of names"),
    "an image of the number 2^100000": (
        pickle.dumps({"imlist": ["a"], "qimlist": ["q"], "gnd": [{"easy": [1 << 100_000], "hard": [], "junk": []}]}, 2),
        "refers to image 1000000000, its list has 1",
    ),
}


@pytest.mark.promise("ground truth (pickle) that takes 64 GiB or years to read", "refused at once; exit code 3")
@pytest.mark.parametrize("kind", BOMBS)
def test_it_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    content, told = BOMBS[kind]
    path = tmp_path / "gnd.pkl"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(DinobenchError, match=told) as caught:
        read_ground_truth(path)
    assert caught.value.exit_code == 3
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_tuples_and_lists_used_once_are_no_bomb(tmp_path: Path) -> None:
    boxes = [(0.0, float(number)) for number in range(3)]
    same = [0]
    content = {
        "imlist": ["a", "b"],
        "qimlist": ["q"] * 3,
        "gnd": [{"bbx": box, "easy": same, "hard": same, "junk": []} for box in boxes],
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file = io.BytesIO()
        pickle.Pickler(file, protocol).dump(content)
        (tmp_path / "gnd.pkl").write_bytes(file.getvalue())
        assert read_ground_truth(tmp_path / "gnd.pkl").easy == ((0,), (0,), (0,))
