"""Errors written for the person who runs the command: what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DinobenchError(ValueError):
    """Something the user can mend (missing data, a bad checkpoint). The command ends with exit code 3."""

    exit_code = 3


class UsageError(DinobenchError):
    """A wrong name, key or value on the command line or in a recipe. Exit code 2."""

    exit_code = 2


class CheckFailed(DinobenchError):
    """A check that ran and did not hold (collapse stop, table out of tolerance). Exit code 4."""

    exit_code = 4


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not in the catalogue; offers the nearest one and the list.

    >>> str(unknown_name("method", "dno", ["dino", "dino_vmf"]))
    "unknown method 'dno': did you mean 'dino'? Known: dino, dino_vmf"
    """
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(known) or 'none'}")
