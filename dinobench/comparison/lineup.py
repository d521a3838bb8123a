"""Candidates side by side: the same suites, versions and images, at the same step or number of images seen.

A method is a recipe under any seed. Runs of one method whose recipes differ are different methods here, named by what
differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dinobench.comparison.candidates import Candidate, Checkpoint, Score
from pretrain.errors import DinobenchError, UsageError
from pretrain.training.recipe import PLUMBING, recipe_hash

Align = Literal["step", "images", "last"]
MAX_DIFFERENCES = 2
"""Differing keys of a recipe that make a readable name."""
NAMED = 3
"""Candidates that a message names; more are counted."""


@dataclass(frozen=True)
class Place:
    """A candidate in a suite: the checkpoint at which it is compared and its score there."""

    candidate: int
    at: Checkpoint
    score: Score


@dataclass(frozen=True)
class Lineup:
    """Who is compared with whom, on what, and where in the training."""

    candidates: list[Candidate]
    methods: list[str]
    """Of each candidate: its method, with what tells its recipe from others of that method."""
    names: list[str]
    """Of each candidate: method, seed, and more where that is not unique."""
    places: dict[str, list[Place]]
    """Suite -> those who have it, at least two."""
    align: Align
    notes: list[str]

    def method_names(self) -> list[str]:
        """Each method once, in the order of the candidates."""
        return list(dict.fromkeys(self.methods))


def line_up(candidates: Sequence[Candidate], align: Align = "step") -> Lineup:
    """Bring candidates together.

    Args:
        align: `step`, `images`: a run is taken at the last training step (number of images seen) at which all runs have
            a result of the suite; `last`: at its own last one. A checkpoint that was named is taken as it is.

    Raises:
        UsageError: a suite in two versions, and nothing says which.
        DinobenchError: fewer than two candidates, no suite in common, other images or another definition of a suite,
            or no common step.
    """
    if len(candidates) < 2:
        raise DinobenchError(f"a comparison needs two, found {candidates[0].source if candidates else 'none'} alone")
    methods, notes = _method_names(candidates)
    places: dict[str, list[Place]] = {}
    for suite in _common_versions(candidates):
        having = [k for k, candidate in enumerate(candidates) if _has(candidate, suite)]
        names = [candidate.source.name for k, candidate in enumerate(candidates) if k not in having]
        if names:
            notes.append(f"{suite}: not measured on {', '.join(names)}")
        if len(having) > 1:
            places[suite] = _align(suite, having, candidates, align)
            _refuse_other_data(suite, places[suite], candidates)
    if not places:
        raise DinobenchError("no suite was measured on two of them: " + "; ".join(notes))
    notes += _other_steps(places, candidates)
    return Lineup(list(candidates), methods, _names(candidates, methods), places, align, notes)


def _has(candidate: Candidate, suite: str) -> bool:
    return any(suite in at.scores for at in candidate.checkpoints)


def _common_versions(candidates: Sequence[Candidate]) -> list[str]:
    """Suites by name; of a suite in several versions the one that all who have it share."""
    found: dict[str, list[set[str]]] = {}
    for candidate in candidates:
        own: dict[str, set[str]] = {}
        for suite in (suite for at in candidate.checkpoints for suite in at.scores):
            name, _, rest = suite.partition("@")
            data = rest.partition(" on ")[2]
            own.setdefault(f"{name} on {data}", set()).add(suite)
        for name, suites in own.items():
            found.setdefault(name, []).append(suites)
    kept = []
    for having in found.values():
        shared = set.intersection(*having)
        if not shared:
            versions = sorted(set.union(*having))
            raise UsageError(
                f"{' and '.join(versions)} are different measurements and are not mixed: measure all with one version, "
                f"or choose one, like suite={versions[-1].partition(' on ')[0]}"
            )
        kept += sorted(shared)
    return sorted(kept)


def _align(suite: str, having: list[int], candidates: Sequence[Candidate], align: Align) -> list[Place]:
    def position(at: Checkpoint) -> int:
        return at.images_seen if align == "images" else at.step

    measured = {k: [at for at in candidates[k].checkpoints if suite in at.scores] for k in having}
    runs = [k for k in having if not candidates[k].named]
    chosen = {k: measured[k][-1] for k in having}
    if align != "last" and runs:
        shared = set.intersection(*({position(at) for at in measured[k]} for k in runs))
        if not shared:
            found = _who_has_what(
                {candidates[k].source.name: ", ".join(str(position(at)) for at in measured[k]) for k in runs}
            )
            what = "number of images seen" if align == "images" else "training step"
            other = "step" if align == "images" else "images"
            raise DinobenchError(
                f"{suite}: no {what} at which all were measured ({found}); measure their other checkpoints with "
                f"`dinobench eval`, or use --align {other} or --align last"
            )
        for k in runs:
            chosen[k] = next(at for at in reversed(measured[k]) if position(at) == max(shared))
    return [Place(k, at, at.scores[suite]) for k, at in chosen.items()]


def _who_has_what(positions: dict[str, str]) -> str:
    """Name -> where it was measured, as text; of many names with the same places the first are named."""
    names: dict[str, list[str]] = {}
    for name, where in positions.items():
        names.setdefault(where, []).append(name)
    return "; ".join(
        f"{', '.join(own[:NAMED])}{f' and {len(own) - NAMED} more' if len(own) > NAMED else ''}: {where}"
        for where, own in names.items()
    )


def _refuse_other_data(suite: str, places: Sequence[Place], candidates: Sequence[Candidate]) -> None:
    """Scores on other images, or by other numbers under one version, are not comparable."""
    first = places[0]
    for place in places:
        pair = f"{candidates[first.candidate].source.name} and {candidates[place.candidate].source.name}"
        if not place.score.data:
            raise DinobenchError(
                f"{suite} on {candidates[place.candidate].source.name} does not say on which images it was measured "
                "(no data fingerprint in its receipt): measure it again"
            )
        for role in sorted(set(first.score.data) | set(place.score.data)):
            one, two = (score.data.get(role, "none") for score in (first.score, place.score))
            if one != two:
                raise DinobenchError(
                    f"{suite}: {pair} were measured on different {role} images (fingerprints {one[:12]} and "
                    f"{two[:12]}): measure both on the same data"
                )
        if place.score.suite_fingerprint != first.score.suite_fingerprint:
            raise DinobenchError(
                f"{suite}: {pair} were measured with different definitions of this version (fingerprints "
                f"{first.score.suite_fingerprint} and {place.score.suite_fingerprint}): measure both with one"
            )


def _other_steps(places: dict[str, list[Place]], candidates: Sequence[Candidate]) -> list[str]:
    """What a reader must know of the steps: they differ, or they are not the last ones."""
    notes: dict[str, list[str]] = {}
    for suite, having in places.items():
        steps = sorted({place.at.step for place in having})
        if len(steps) > 1:
            notes.setdefault(f"compared at different training steps ({', '.join(map(str, steps))})", []).append(suite)
        for place in having:
            candidate = candidates[place.candidate]
            last = candidate.checkpoints[-1].step
            if not candidate.named and place.at.step != last:
                text = f"{candidate.source.name} is compared at step {place.at.step}, its last checkpoint is at {last}"
                notes.setdefault(text, []).append(suite)
    return [f"{', '.join(suites)}: {text}" for text, suites in notes.items()]


def _method_names(candidates: Sequence[Candidate]) -> tuple[list[str], list[str]]:
    """Of each candidate its method, told apart by recipe; and what a reader should know of that."""
    variants = [_variant(candidate, candidates) for candidate in candidates]
    names, notes = [], []
    for candidate, variant in zip(candidates, variants, strict=True):
        others = {v: c for c, v in zip(candidates, variants, strict=True) if c.method == candidate.method}
        names.append(candidate.method + (_difference(variant, others) if len(others) > 1 else ""))
    without = [candidate.method for candidate in candidates if candidate.recipe is None]
    unread = sorted({method for method in without if without.count(method) > 1})
    if unread:
        notes.append(f"taken as one recipe each, because their records hold none: {', '.join(unread)}")
    return names, notes


def _variant(candidate: Candidate, candidates: Sequence[Candidate]) -> str:
    """What candidates of one recipe share, whatever their seed."""
    if candidate.recipe is not None:
        return recipe_hash({**candidate.recipe, "seed": None})
    # a record holds the hash with its seed: does a recipe at hand give it?
    for other in candidates:
        if other.recipe is not None and other.method == candidate.method:
            same = recipe_hash({**other.recipe, "seed": candidate.seed})
            if same == candidate.facts.get("recipe_hash"):
                return recipe_hash({**other.recipe, "seed": None})
    label = str(candidate.facts.get("label"))
    # the last step of a run says how long its schedule was; a checkpoint may be from anywhere in it
    return label if candidate.named else f"{label}, {candidate.checkpoints[-1].step} steps"


def _difference(variant: str, others: dict[str, Candidate]) -> str:
    """What tells a recipe from the others of its method: the keys that differ where they are few."""
    recipes = {key: _flat(other.recipe) for key, other in others.items() if other.recipe is not None}
    own = recipes.get(variant)
    if own is None:
        return f" ({variant})"
    keys = sorted({key for recipe in recipes.values() for key in {*recipe, *own} if recipe.get(key) != own.get(key)})
    if 0 < len(keys) <= MAX_DIFFERENCES:
        return " " + " ".join(f"{key}={own.get(key)}" for key in keys)
    return f" ({variant[:8]})"


def _flat(recipe: dict[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of the science of a recipe, but for the seed."""
    found: dict[str, Any] = {}
    for key, value in (recipe or {}).items():
        if not prefix and key in (*PLUMBING, "seed"):
            continue
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _names(candidates: Sequence[Candidate], methods: Sequence[str]) -> list[str]:
    names = [
        method if candidate.seed is None else f"{method} s{candidate.seed}"
        for candidate, method in zip(candidates, methods, strict=True)
    ]
    names = [
        f"{name} step {candidate.checkpoints[-1].step}" if names.count(name) > 1 and candidate.named else name
        for candidate, name in zip(candidates, names, strict=True)
    ]
    return [
        f"{name} ({candidate.source})" if names.count(name) > 1 else name
        for candidate, name in zip(candidates, names, strict=True)
    ]
