"""Which candidates a command line means: paths, and a query that chooses among them or among the output folder.

    method=dino,dino_vmf suite=digits_knn seed=0,1,2 optim.lr=0.001

The values of a key are alternatives and may hold * and ?; several keys must all hold. `method` is the row of an
ablation where a run has one. A key with a dot is one of the recipe, which committed records do not hold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dinobench.comparison.candidates import Candidate, collect, dig, read
from pretrain.errors import DinobenchError, UsageError, unknown_name

KEYS = ("method", "suite", "seed", "arch", "data")
"""Keys of a query beside those of the recipe."""
_TERM = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)=(.+)")


@dataclass(frozen=True)
class Selection:
    """The candidates of a command line, and what a reader should know of the choice."""

    candidates: list[Candidate]
    notes: list[str]


def select(arguments: Sequence[str], output: Path, suites: Sequence[str] = ()) -> Selection:
    """The candidates that the arguments name, those of a query looked for in `output` where no path is given.

    Raises:
        UsageError: an unknown key.
        DinobenchError: a path that is nothing of the sort, or nothing that fits the query.
    """
    paths, query = split_query(arguments)
    asked = [*suites, *query.pop("suite", [])]
    found = [candidate for path in paths for candidate in read(path, output)] if paths else collect(output)
    if not found:
        raise DinobenchError(f"no run and no record in {output}: name run folders, or their folder with --output")
    fitting = [candidate for candidate in found if _fits(candidate, query)]
    if not fitting:
        known = ", ".join(sorted({candidate.method for candidate in found}))
        raise DinobenchError(f"nothing fits {' '.join(arguments)}; methods found: {known}")
    chosen = [candidate.only(asked) if asked else candidate for candidate in fitting]
    empty = [candidate.source.name for candidate in chosen if not candidate.checkpoints]
    notes = []
    if empty:
        what = f"no stored result of {', '.join(asked)}" if asked else "no stored result"
        notes.append(f"left out, {what}: {', '.join(empty)} (`dinobench eval --suite NAME RUN` measures)")
    kept = [candidate for candidate in chosen if candidate.checkpoints]
    if not kept:
        raise DinobenchError("nothing to compare: " + notes[0])
    return Selection(kept, notes)


def split_query(arguments: Sequence[str]) -> tuple[list[Path], dict[str, list[str]]]:
    """Paths, and the terms of the query: key -> alternatives.

    Raises:
        UsageError: an unknown key.
    """
    paths: list[Path] = []
    query: dict[str, list[str]] = {}
    for argument in arguments:
        terms = [_TERM.fullmatch(part) for part in argument.split()]
        if Path(argument).exists() or not terms or not all(terms):
            paths.append(Path(argument))
            continue
        for term in terms:
            assert term is not None
            key, values = term[1], [value for value in term[2].split(",") if value]
            if "." not in key and key not in KEYS:
                raise unknown_name("key of a query", key, (*KEYS, "optim.lr (any of the recipe)"))
            query.setdefault(key, []).extend(values)
    return paths, query


def _fits(candidate: Candidate, query: dict[str, list[str]]) -> bool:
    facts, recipe = candidate.facts, candidate.recipe
    known = {
        "method": candidate.method,
        "seed": candidate.seed,
        "arch": facts.get("arch"),
        # <method>-<arch>-<data>
        "data": dig(recipe, "data.name") or str(facts.get("label") or "").rpartition("-")[2],
    }

    def holds(key: str, patterns: list[str]) -> bool:
        if "." in key and recipe is None:
            raise UsageError(
                f"{candidate.source} holds no recipe, so that {key} cannot choose it; use {', '.join(KEYS)}"
            )
        value = str(dig(recipe, key) if "." in key else known[key])
        return any(fnmatchcase(value, pattern) for pattern in patterns)

    return all(holds(key, patterns) for key, patterns in query.items())
