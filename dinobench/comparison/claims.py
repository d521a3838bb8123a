"""Scores side by side, every pair's difference, and what supports it (dinobench/statistics.py says what is claimed).

With two seeds of any method the claims are about methods, else about checkpoints; `claim` insists on one of them.
Holm's adjustment is over all pairs in all suites of the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from dinobench import statistics
from dinobench.comparison.lineup import Lineup, Place
from dinobench.results import plain
from dinobench.statistics import LEVEL, MIN_SEEDS, Effect
from pretrain.errors import DinobenchError

Claim = Literal["auto", "methods", "checkpoints"]
UNRANKED = ("perplexity", "rankme")
"""Headlines of which more is not better."""
NO_IMAGES = "none: no per-image values of this score are stored"


@dataclass(frozen=True)
class Row:
    """One method or checkpoint in one suite."""

    suite: str
    headline: str
    name: str
    score: float
    """Mean over seeds for a method."""
    spread: float | None
    """Sample standard deviation over seeds."""
    interval: tuple[float, float] | None
    """Of a method over seeds (from 5 on), of a checkpoint over images."""
    n: int
    """Images."""
    seeds: list[int]
    steps: list[int]


@dataclass(frozen=True)
class Pair:
    """Two methods or checkpoints in one suite."""

    suite: str
    first: str
    second: str
    effect: Effect
    adjusted_p: float | None
    """Holm over all pairs tested."""
    sentence: str

    @property
    def shown(self) -> bool:
        """Whether the difference is more than chance, after Holm."""
        return self.adjusted_p is not None and self.adjusted_p < LEVEL


@dataclass(frozen=True)
class Comparison:
    """What is known of the candidates."""

    claim: Literal["methods", "checkpoints"]
    align: str
    rows: list[Row]
    pairs: list[Pair]
    best: dict[str, str]
    """Suite -> the method better than every other one there; what a table may print bold."""
    notes: list[str]

    def document(self) -> dict[str, Any]:
        """What --json prints."""
        pairs = [{**asdict(pair), "shown": pair.shown} for pair in self.pairs]
        return plain({**asdict(self), "pairs": pairs})


def compare(lineup: Lineup, claim: Claim = "auto") -> Comparison:
    """Test every pair of every suite.

    Raises:
        DinobenchError: claims about methods from two runs of one method and seed, or from runs without seed; images of
            one suite that do not match.
    """
    if claim == "methods" or (claim == "auto" and _has_seeds(lineup)):
        return _compare_methods(lineup)
    return _compare_checkpoints(lineup)


def _has_seeds(lineup: Lineup) -> bool:
    seeds: dict[str, set[int | None]] = {}
    for method, candidate in zip(lineup.methods, lineup.candidates, strict=True):
        seeds.setdefault(method, set()).add(candidate.seed)
    return len(seeds) > 1 and any(len(found) > 1 for found in seeds.values())


def _compare_methods(lineup: Lineup) -> Comparison:
    table = {suite: _by_seed(lineup, suite, places) for suite, places in lineup.places.items()}
    rows = []
    for suite, methods in table.items():
        for method, scores in methods.items():
            of_method = [place for place in lineup.places[suite] if lineup.methods[place.candidate] == method]
            values = list(scores.values())
            interval = statistics.seed_interval(values) if len(values) >= MIN_SEEDS else None
            first = of_method[0].score
            steps = sorted({place.at.step for place in of_method})
            spread = statistics.spread(values)
            mean = float(np.mean(values))
            rows.append(Row(suite, first.headline, method, mean, spread, interval, first.n, sorted(scores), steps))
    triples = [(suite, *pair) for suite, methods in table.items() for pair in combinations(methods, 2)]
    effects = [statistics.compare_or_none(table[suite][one], table[suite][two]) for suite, one, two in triples]
    pairs = _pairs(triples, effects, lineup, _method_sentence)
    ranked = statistics.may_be_bold(table)
    best = {suite: name for suite, name in ranked.items() if lineup.places[suite][0].score.headline not in UNRANKED}
    notes = [*lineup.notes]
    few = sorted({row.name for row in rows if len(row.seeds) < MIN_SEEDS})
    if few:
        notes.append(
            f"claims about methods need {MIN_SEEDS} seeds; mean and standard deviation only for {', '.join(few)} "
            "(--claim checkpoints compares the networks themselves)"
        )
    return Comparison("methods", lineup.align, rows, pairs, best, notes)


def _by_seed(lineup: Lineup, suite: str, places: Sequence[Place]) -> dict[str, dict[int, float]]:
    """Method -> seed -> score."""
    table: dict[str, dict[int, float]] = {}
    for place in places:
        candidate, method = lineup.candidates[place.candidate], lineup.methods[place.candidate]
        if candidate.seed is None:
            raise DinobenchError(f"{candidate.source} has no seed, so that it stands for itself: --claim checkpoints")
        scores = table.setdefault(method, {})
        if candidate.seed in scores:
            raise DinobenchError(
                f"{suite}: two candidates are {method} with seed {candidate.seed}, one of them {candidate.source}: "
                "leave one out, or use --claim checkpoints"
            )
        scores[candidate.seed] = place.score.value
    return table


def _compare_checkpoints(lineup: Lineup) -> Comparison:
    rows: list[Row] = []
    triples: list[tuple[str, str, str]] = []
    effects: list[Effect] = []
    unstored: set[str] = set()
    for suite, places in lineup.places.items():
        for place in places:
            score, candidate = place.score, lineup.candidates[place.candidate]
            seeds = [] if candidate.seed is None else [candidate.seed]
            name, steps = lineup.names[place.candidate], [place.at.step]
            rows.append(Row(suite, score.headline, name, score.value, None, score.interval, score.n, seeds, steps))
        images = [place.score.per_image() for place in places]
        unstored |= {
            lineup.names[place.candidate] for place, found in zip(places, images, strict=True) if found is None
        }
        for one, two in combinations(range(len(places)), 2):
            names = lineup.names[places[one].candidate], lineup.names[places[two].candidate]
            triples.append((suite, *names))
            effects.append(_paired(suite, names, (places[one], places[two]), (images[one], images[two])))
    notes = [*lineup.notes]
    if unstored:
        notes.append(
            f"without per-image values of every headline, so that not all of its pairs are tested: "
            f"{', '.join(sorted(unstored))} (committed records hold none; neither do headlines that are no mean over "
            "images)"
        )
    pairs = _pairs(triples, effects, lineup, _checkpoint_sentence)
    return Comparison("checkpoints", lineup.align, rows, pairs, {}, notes)


def _paired(suite: str, names: tuple[str, str], places: tuple[Place, Place], images: tuple[Any, Any]) -> Effect:
    first, second = images
    if first is None or second is None:
        difference = places[0].score.value - places[1].score.value
        return Effect(difference, None, None, NO_IMAGES, places[0].score.n)
    if not first.index.equals(second.index):
        raise DinobenchError(
            f"{suite}: the stored per-image values of {names[0]} and {names[1]} are of different images: measure again"
        )
    return statistics.compare_checkpoints(first["value"], second["value"])


def _pairs(triples: Sequence[tuple[str, str, str]], effects: Sequence[Effect], lineup: Lineup, say: Any) -> list[Pair]:
    adjusted = statistics.adjusted_p(effects)
    tested = sum(p is not None for p in adjusted)
    return [
        Pair(*triple, effect, p, say(triple, effect, p, tested, lineup.places[triple[0]][0].score.headline))
        for triple, effect, p in zip(triples, effects, adjusted, strict=True)
    ]


def _method_sentence(triple: tuple[str, str, str], effect: Effect, p: float | None, tested: int, headline: str) -> str:
    suite, first, second = triple
    said = _said(first, second, effect, headline)
    if p is None:
        why = effect.test if effect.n == 0 or effect.n >= MIN_SEEDS else f"{effect.n} common seeds, no claim below 5"
        return f"{suite}: {said} on average; {why.removeprefix('none: ')}."
    seeds = f"over {effect.n} seeds {said} ({_bounds(effect)})"
    return f"{suite}: {seeds}, {_verdict(p, tested, 'a difference between the methods')}."


def _checkpoint_sentence(
    triple: tuple[str, str, str], effect: Effect, p: float | None, tested: int, headline: str
) -> str:
    suite, first, second = triple
    said = _said(first, second, effect, headline)
    if p is None:
        return f"{suite}: {said}; {effect.test.removeprefix('none: ')}, so nothing is tested."
    only = ""
    if effect.counts is not None:
        only = (
            f": of {effect.n} images {effect.counts[0]} only the first gets right, {effect.counts[1]} only the second"
        )
    verdict = _verdict(p, tested, "a difference between these two networks, not between their methods")
    return f"{suite}: {said} ({_bounds(effect)}){only}; {verdict}."


def _said(first: str, second: str, effect: Effect, headline: str) -> str:
    unit = "" if headline in UNRANKED else " points"
    if not effect.difference:
        return f"{first} and {second} score the same"
    word = "higher" if effect.difference > 0 else "lower"
    return f"{first} scores {abs(effect.difference):.1f}{unit} {word} than {second}"


def _bounds(effect: Effect) -> str:
    assert effect.interval is not None, "what was tested has an interval"
    return "95 % interval {:+.1f} to {:+.1f}".format(*effect.interval)


def _verdict(p: float, tested: int, what: str) -> str:
    found = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    after = f"{found} after Holm over {tested} pairs" if tested > 1 else found
    return f"{after}: {what}" if p < LEVEL else f"{after}: not more than chance"
