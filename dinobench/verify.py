"""Does a result hold? Take its checkpoint and its images, measure again with the feature cache off, and compare.

First what the result was made from: the checkpoint's bytes, the suite's definition, the images and labels. Only when
these are the same are the scores measured again. Tolerance, for another machine may round otherwise: a score may differ
by one image (100 / n) or by 0.1 points, whichever is more, but never by more than 1 % of itself; the ends of the
interval by twice that. What a result states is checked; scores that it does not state are not missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinobench.evaluate import Say, feature_lines
from dinobench.loading import checkpoint_digest, loading_of
from dinobench.results import Result, plain, read_result
from pretrain.errors import DinobenchError

if TYPE_CHECKING:
    from suites.measure import Measurement
    from suites.suite import Suite

POINTS = 0.1
SHARE = 0.01
ROUNDING = 1e-6
"""Allowed of a score of 0."""


@dataclass(frozen=True)
class Options:
    """How to verify. What is None is read from the result."""

    checkpoint: Path | None = None
    data: str | None = None
    suite: str | None = None
    """Name or file of the suite; needed for one that is not shipped."""
    device: str = "auto"
    tolerance: float | None = None
    """In points, for every score; None = the rule of the module."""
    from_cache: bool = False
    """Take stored features: then only the protocol is measured again, not the network."""
    baselines: bool = True


@dataclass(frozen=True)
class Comparison:
    """One thing that the result states, and what was found."""

    name: str
    stated: Any
    found: Any
    allowed: float | None = None
    """Difference up to which a number holds; None = it must be equal."""

    @property
    def holds(self) -> bool:
        if self.allowed is None or self.stated is None or self.found is None:
            return self.stated == self.found
        return abs(self.stated - self.found) <= self.allowed


@dataclass(frozen=True)
class Verdict:
    """What came out."""

    file: Path
    result: Result
    comparisons: list[Comparison]
    measured: bool
    """False when the result was made from something else, so that there was nothing to measure."""
    from_cache: bool

    @property
    def scope(self) -> str:
        """What was done again."""
        return "protocol only" if self.from_cache else "checkpoint and images"

    @property
    def mismatches(self) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if not comparison.holds]

    @property
    def holds(self) -> bool:
        return self.measured and not self.mismatches


def verify(file: Path, options: Options, say: Say) -> Verdict:
    """Derive a result again and compare.

    Raises:
        DinobenchError: the result cannot be read, or its checkpoint, suite or images are not here.
    """
    result = read_result(file)
    checkpoint = _find_checkpoint(file, result, options)
    suite = _find_suite(result, options)
    data = options.data or result.receipt.get("data")
    say(f"{result.suite} on {checkpoint.name}: comparing checkpoint, suite and images")
    comparisons = [
        Comparison("checkpoint sha256", result.provenance.get("sha256"), checkpoint_digest(checkpoint)),
        Comparison("suite", result.suite, suite.id),
        Comparison("suite fingerprint", result.suite_fingerprint, suite.fingerprint()),
        Comparison("headline", result.headline, suite.headline),
        *_compare_images(result, suite, data),
    ]
    if not all(comparison.holds for comparison in comparisons):
        return Verdict(file, result, comparisons, measured=False, from_cache=options.from_cache)
    how = "from stored features" if options.from_cache else "from the images"
    say(f"{result.suite} on {checkpoint.name}: measuring again {how}")
    measured = _measure(result, checkpoint, suite, data, options, say)
    comparisons += _compare_scores(result, measured, options)
    return Verdict(file, result, comparisons, measured=True, from_cache=options.from_cache)


def allowed_difference(stated: float, found: float, n: int) -> float:
    """How far two measurements of a score over n images may be apart; see the module."""
    images = max(100 / max(n, 1), POINTS)
    return max(min(images, SHARE * max(abs(stated), abs(found))), ROUNDING)


def _find_checkpoint(file: Path, result: Result, options: Options) -> Path:
    """The file that was measured: as told, beside the result in its run folder, or where it was then."""
    from pretrain.models.pixels import is_pixels

    stated = Path(result.checkpoint)
    if is_pixels(stated):
        return stated
    folder = file.absolute().parents[3 if loading_of(result).label else 2]
    candidates = [options.checkpoint] if options.checkpoint else [folder / "checkpoints" / stated.name, stated]
    for path in candidates:
        if path.is_file():
            return path
    raise DinobenchError(
        f"the checkpoint of {file} is not here (looked at {' and '.join(map(str, candidates))}): "
        "say where it is with --checkpoint FILE"
    )


def _find_suite(result: Result, options: Options) -> Suite:
    from suites.suite import load_suite, suite_names

    if options.suite is None and result.suite_name not in suite_names():
        raise DinobenchError(
            f"suite {result.suite} is not one of those shipped here: give its definition with --suite FILE.yaml"
        )
    return load_suite(options.suite or result.suite_name)


def _compare_images(result: Result, suite: Suite, data: str | None) -> Iterator[Comparison]:
    """Fingerprints of images and labels, by role."""
    stated = result.receipt.get("dataset") or {}
    found = _open_data(suite, data)
    for role in sorted({*stated, *found}):
        parts = [roles.get(role, {}).get("fingerprint") for roles in (stated, found)]
        yield Comparison(f"dataset fingerprint ({role})", *parts)


def _open_data(suite: Suite, data: str | None) -> dict[str, dict[str, Any]]:
    """By role, what the receipt would say of the images that are here."""
    from suites.measure import open_splits
    from suites.suite import protocol_module

    module = protocol_module(suite.protocol)
    if getattr(module, "READS_IMAGES", False):
        return module.open_data(suite.dataset, data, suite.resolved_parameters()).receipt()
    return {
        role: {"fingerprint": images.fingerprint}
        for role, images in zip(("train", "test"), open_splits(suite, data), strict=True)
    }


def _measure(
    result: Result, checkpoint: Path, suite: Suite, data: str | None, options: Options, say: Say
) -> Measurement:
    from pretrain.training.runtime import Runtime, RuntimeConfig
    from suites.cache import FeatureCache
    from suites.measure import measure

    return measure(
        suite,
        loading_of(result).load(checkpoint),
        data=data,
        cache=FeatureCache() if options.from_cache else None,
        device=str(Runtime.start(RuntimeConfig(device=options.device)).device),
        precision=result.receipt.get("precision", "fp32"),
        seed=result.seed,
        baselines=options.baselines,
        progress=feature_lines(say),
    )


def _compare_scores(result: Result, measured: Measurement, options: Options) -> Iterator[Comparison]:
    def compare(name: str, stated: float | None, found: Any, widen: float = 1.0) -> Comparison:
        found = plain(found)
        allowed = options.tolerance
        if allowed is None and stated is not None and found is not None:
            allowed = widen * allowed_difference(stated, found, result.n)
        return Comparison(name, stated, found, allowed)

    yield Comparison("n", result.n, measured.n)
    for name, stated in result.scores.items():
        yield compare(name, stated, measured.scores.get(name))
    ends = plain(measured.interval) if measured.interval else [None, None]
    for end, stated, found in zip(("low", "high"), result.interval or (), ends, strict=False):
        yield compare(f"interval {end}", stated, found, widen=2.0)
    for baseline, scores in result.baselines.items() if options.baselines else ():
        for name, stated in scores.items():
            yield compare(f"{baseline} {name}", stated, measured.baselines.get(baseline, {}).get(name))
