"""The scores of a page, a section per suite.

A line is a method at a training step, its score the mean over seeds; runs that no seed tells apart have a line each.
Suites of another version, other definition or other images are sections of their own: nothing is averaged across them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dinobench import statistics
from dinobench.comparison.candidates import Candidate, Checkpoint, Score
from dinobench.comparison.lineup import Lineup, line_up
from dinobench.page.receipts import Receipt, Receipts
from dinobench.statistics import MIN_SEEDS
from pretrain.errors import DinobenchError

Key = tuple[str, str, tuple[tuple[str, str], ...]]
"""What scores must share to stand in one table: suite, its definition, its images by role."""


@dataclass(frozen=True)
class Line:
    """A method or a checkpoint in one suite."""

    name: str
    step: int
    score: float
    spread: float | None
    """Sample standard deviation over seeds."""
    interval: tuple[float, float] | None
    over: str
    """What the 95 % interval is over: images or seeds."""
    seeds: list[int]
    n: int
    """Images."""
    baselines: dict[str, float | None]
    receipts: list[Receipt]
    """One per seed, in their order."""


@dataclass(frozen=True)
class Section:
    """One suite."""

    suite: str
    headline: str
    definition: str
    """Fingerprint of the suite."""
    data: dict[str, str]
    """Role -> fingerprint of the images."""
    lines: list[Line]
    notes: list[str]


def collect_sections(candidates: Sequence[Candidate], receipts: Receipts) -> tuple[list[Section], list[str]]:
    """A section per suite, definition and images; and the notes that several of them share.

    Raises:
        DinobenchError: the file of a score is damaged.
    """
    sections = [_section(key, candidates, receipts) for key in _keys(candidates)]
    said = [note for section in sections for note in section.notes]
    shared = [note for note in dict.fromkeys(said) if said.count(note) > 1]
    return [replace(one, notes=[note for note in one.notes if note not in shared]) for one in sections], shared


def unaligned(candidates: list[Candidate]) -> Lineup:
    """Each candidate for itself, in no suite: its training can be drawn whatever was measured."""
    names = [one.method if one.seed is None else f"{one.method} s{one.seed}" for one in candidates]
    names = [
        f"{name} ({one.source.name})" if names.count(name) > 1 else name
        for name, one in zip(names, candidates, strict=True)
    ]
    return Lineup(candidates, names, names, {}, "step", [])


def _keys(candidates: Sequence[Candidate]) -> list[Key]:
    return sorted({_key(score) for one in candidates for at in one.checkpoints for score in at.scores.values()})


def _key(score: Score) -> Key:
    return score.suite, score.suite_fingerprint, tuple(sorted(score.data.items()))


def _section(key: Key, candidates: Sequence[Candidate], receipts: Receipts) -> Section:
    suite, definition, data = key
    having = [one for one in (_restrict(candidate, key) for candidate in candidates) if one.checkpoints]
    lineup = _side_by_side(having)
    groups: dict[tuple[str, int], list[int]] = {}
    for k, candidate in enumerate(having):
        groups.setdefault((lineup.methods[k], candidate.checkpoints[-1].step), []).append(k)
    lines = []
    for (method, _), members in groups.items():
        seeds = [having[k].seed for k in members]
        together = None not in seeds and len(set(seeds)) == len(seeds)
        for part, name in [(members, method)] if together else [([k], lineup.names[k]) for k in members]:
            lines.append(_line(name, [having[k] for k in part], suite, receipts))
    headline = having[0].checkpoints[-1].scores[suite].headline
    return Section(suite, headline, definition, dict(data), lines, lineup.notes)


def _side_by_side(having: list[Candidate]) -> Lineup:
    """Each at its last checkpoint; for itself where there is one, or where `dinobench compare` refuses."""
    if len(having) == 1:
        return Lineup(having, [having[0].method], [having[0].source.name], {}, "last", [])
    try:
        return line_up(having, "last")
    except DinobenchError as error:
        return replace(unaligned(having), notes=[str(error)])


def _restrict(candidate: Candidate, key: Key) -> Candidate:
    """With the scores of one table alone."""
    kept = []
    for at in candidate.checkpoints:
        scores = {suite: score for suite, score in at.scores.items() if _key(score) == key}
        if scores:
            kept.append(Checkpoint(at.step, at.images_seen, scores))
    return replace(candidate, checkpoints=tuple(kept))


def _line(name: str, candidates: Sequence[Candidate], suite: str, receipts: Receipts) -> Line:
    """The last scores of runs of one method, which differ in their seeds."""
    candidates = sorted(candidates, key=lambda one: -1 if one.seed is None else one.seed)
    last = [one.checkpoints[-1] for one in candidates]
    scores = [at.scores[suite] for at in last]
    values = [score.value for score in scores]
    made = [receipts.add(one, at, at.scores[suite]) for one, at in zip(candidates, last, strict=True)]
    interval, over = scores[0].interval, "images"
    if len(values) > 1:
        # two to four seeds carry no claim about a method
        interval, over = (statistics.seed_interval(values) if len(values) >= MIN_SEEDS else None), "seeds"
    return Line(
        name=name,
        step=last[0].step,
        score=float(np.mean(values)),
        spread=statistics.spread(values),
        interval=interval,
        over=over,
        seeds=[one.seed for one in candidates if one.seed is not None],
        n=scores[0].n,
        baselines=made[0].baseline(scores[0]),
        receipts=made,
    )
