"""Ground truth of the revisited Oxford and Paris benchmarks: JSON, or the original pickle, of which nothing is run.

Schema (Radenovic et al., Revisiting Oxford and Paris, CVPR 2018, `gnd_roxford5k.pkl`): `imlist` and `qimlist`, names of
the database images and of the queries; `gnd`, per query the lists `easy`, `hard` and `junk` of numbers into `imlist`.

    easy      find easy;           ignore junk and hard
    medium    find easy and hard;  ignore junk
    hard      find hard;           ignore junk and easy

A pickle may name classes to be built, which runs code. The original files hold plain lists only, so a file that names
any class is refused. So is one of a few bytes that would take the memory or the time of a machine, see `_check`.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pretrain.errors import DinobenchError
from suites.cache import content_key

Difficulty = Literal["easy", "medium", "hard"]
DIFFICULTIES: tuple[Difficulty, ...] = get_args(Difficulty)
MAX_BYTES = 64 << 20
"""The original files have 0.3 MiB."""
Lists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class GroundTruth:
    """Which images answer which query."""

    images: tuple[str, ...]
    """Names of the database, without suffix."""
    queries: tuple[str, ...]
    easy: Lists
    """Per query, numbers into `images`."""
    hard: Lists
    junk: Lists

    def positives(self, difficulty: Difficulty) -> Lists:
        """Per query, the images to be found."""
        return {"easy": self.easy, "medium": _joined(self.easy, self.hard), "hard": self.hard}[difficulty]

    def ignored(self, difficulty: Difficulty) -> Lists:
        """Per query, the images that count neither way."""
        junk = self.junk
        return {"easy": _joined(junk, self.hard), "medium": junk, "hard": _joined(junk, self.easy)}[difficulty]

    def fingerprint(self) -> str:
        """Hash of all of it."""
        lists = {"easy": self.easy, "hard": self.hard, "junk": self.junk}
        return content_key(images=self.images, queries=self.queries, **lists)


def read_ground_truth(path: Path) -> GroundTruth:
    """The ground truth in a .json or .pkl file.

    Raises:
        DinobenchError: the file cannot be read, names classes, or is not of the schema above.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DinobenchError(f"{path} is larger than {MAX_BYTES >> 20} MiB: this is no ground truth")
        content = path.read_bytes()
    except OSError as error:
        raise DinobenchError(f"cannot read the ground truth {path}: {error.strerror}") from error
    return _parse(_load_json(content, path) if path.suffix == ".json" else _load_pickle(content, path), path)


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dictionaries, text and numbers; nothing that is imported."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise DinobenchError(f"it asks for {module_name}.{global_name}")


def _load_pickle(content: bytes, path: Path) -> Any:
    try:
        _check(content)
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except DinobenchError as error:
        raise DinobenchError(
            f"{path} is refused: {error}, which could run code; the original ground truth holds plain lists only. "
            "Download it again, or give it as JSON"
        ) from None
    # A damaged pickle makes the reader raise errors of every kind.
    except Exception as error:
        raise DinobenchError(f"cannot read the pickle {path} ({error}): is the download complete?") from error


def _check(content: bytes) -> None:
    """Refuse what Python's reader would do without end. The instructions are listed, none is followed.

    A value with the number 2^32 - 1 makes it take 64 GiB for the list of numbers; a tuple that holds another one twice,
    which holds another one twice, and so on, is hashed for years; so none may be used again.

    Raises:
        ValueError: one of these, or the instructions end too early.
    """
    tuples: set[int] = set()
    number, before = 0, ""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name.endswith("PUT") or opcode.name == "MEMOIZE":
            place = int(number if argument is None else argument)
            if place > len(content):
                raise ValueError(f"it numbers a value {place}, and holds {len(content)} bytes")
            number += 1
            (tuples.add if before.startswith("TUPLE") else tuples.discard)(place)
        elif opcode.name.endswith("GET") and argument in tuples:
            raise ValueError("it uses a tuple twice, and there is none in a ground truth")
        before = opcode.name


def _load_json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DinobenchError(f"{path} is not valid JSON ({error}): is the download complete?") from error


def _parse(content: Any, path: Path) -> GroundTruth:
    expected = "imlist, qimlist and gnd with the lists easy, hard and junk of every query"
    try:
        images, queries = (_names(content[key]) for key in ("imlist", "qimlist"))
        lists = {key: tuple(_numbers(query[key]) for query in content["gnd"]) for key in ("easy", "hard", "junk")}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DinobenchError(f"{path} is no ground truth: expected {expected}; found a problem at {error}") from error
    if len(lists["easy"]) != len(queries):
        raise DinobenchError(f"{path} names {len(queries)} queries and answers {len(lists['easy'])}")
    outside = [n for key in lists.values() for numbers in key for n in numbers if not 0 <= n < len(images)]
    if outside:
        raise DinobenchError(f"{path} refers to image {min(outside[0], 10**9)}, its list has {len(images)}")
    return GroundTruth(images, queries, **lists)


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"a {type(values).__name__}: not a list of names")
    return tuple(values)


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"a {type(values).__name__}: not a list of whole numbers")
    return tuple(values)


def _joined(first: Lists, second: Lists) -> Lists:
    return tuple(a + b for a, b in zip(first, second, strict=True))
