from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from dinobench.comparison.candidates import collect, read_run
from dinobench.comparison.claims import compare
from dinobench.comparison.lineup import line_up
from dinobench.statistics import holm, mcnemar
from pretrain.errors import DinobenchError

SCORES = {
    "dino": (80.0, 81.0, 79.5, 80.5, 80.0),
    "dino_vmf": (85.0, 86.5, 85.0, 86.0, 86.5),
    "dino_sk": (80, 79, 81, 80, 80.5),
}


@pytest.fixture(scope="module")
def make_lineup(tmp_path_factory: pytest.TempPathFactory, measurer_in: Callable[[Path], Any]) -> Callable[..., Any]:
    """Of the first seeds of each method; the runs are made once for all tests."""
    measurer = measurer_in(tmp_path_factory.mktemp("claims") / "runs")
    runs = {method: [measurer.run(method, s, score) for s, score in enumerate(SCORES[method])] for method in SCORES}

    def make(seeds: int = 5, suites: tuple[str, ...] = ("digits_knn",)) -> Any:
        return line_up([read_run(run).only(suites) for of_method in runs.values() for run in of_method[:seeds]])

    return make


def test_methods_are_compared_over_seeds(make_lineup: Callable[..., Any]) -> None:
    found = compare(make_lineup())
    assert found.claim == "methods"
    row = found.rows[0]
    assert (row.name, row.seeds, row.steps, row.n) == ("dino", [0, 1, 2, 3, 4], [40], 200)
    assert (row.score, row.spread) == (pytest.approx(80.2), pytest.approx(0.5701, abs=1e-4))
    expected = [
        stats.ttest_rel(SCORES[a], SCORES[b])
        for a, b in (("dino", "dino_vmf"), ("dino", "dino_sk"), ("dino_vmf", "dino_sk"))
    ]
    assert [pair.effect.p for pair in found.pairs] == pytest.approx([test.pvalue for test in expected])
    assert [pair.adjusted_p for pair in found.pairs] == pytest.approx(list(holm([test.pvalue for test in expected])))
    assert found.pairs[0].effect.interval == pytest.approx(tuple(expected[0].confidence_interval()))
    assert [pair.shown for pair in found.pairs] == [True, False, True]
    assert found.best == {"digits_knn@1": "dino_vmf"}
    assert "over 5 seeds dino scores 5.6 points lower than dino_vmf (95 % interval" in found.pairs[0].sentence
    assert found.pairs[1].sentence.endswith("not more than chance.")


def test_more_of_a_count_of_prototypes_is_never_the_best(make_lineup: Callable[..., Any]) -> None:
    found = compare(make_lineup(suites=("digits_prototypes",)))
    assert found.best == {}
    assert "points" not in found.pairs[0].sentence


def test_fewer_seeds_give_mean_and_spread_only(make_lineup: Callable[..., Any]) -> None:
    found = compare(make_lineup(seeds=4))
    assert found.claim == "methods"
    assert all(row.interval is None and row.spread is not None for row in found.rows)
    assert all((pair.effect.p, pair.adjusted_p, pair.effect.interval) == (None, None, None) for pair in found.pairs)
    assert found.best == {}
    assert "4 common seeds, no claim below 5" in found.pairs[0].sentence
    assert any("claims about methods need 5 seeds" in note for note in found.notes)


def test_checkpoints_are_compared_over_images(make_lineup: Callable[..., Any]) -> None:
    lineup = make_lineup(seeds=1)
    found = compare(lineup)
    assert found.claim == "checkpoints"
    first, second = (place.score.per_image()["value"] for place in lineup.places["digits_knn@1"][:2])
    only = int(((first == 100) & (second == 0)).sum()), int(((first == 0) & (second == 100)).sum())
    pair = found.pairs[0]
    assert (pair.first, pair.second, pair.effect.counts) == ("dino s0", "dino_vmf s0", only)
    assert pair.effect.p == pytest.approx(float(mcnemar(*only)))
    assert pair.effect.difference == pytest.approx(-5.0)
    assert "not between their methods" in pair.sentence or "not more than chance" in pair.sentence
    assert found.best == {}
    assert found.rows[0].interval == (78.0, 82.0)


def test_checkpoints_may_be_asked_for(make_lineup: Callable[..., Any]) -> None:
    found = compare(make_lineup(seeds=2), "checkpoints")
    assert len(found.rows) == 6
    assert len(found.pairs) == 15
    assert all(pair.effect.test == "McNemar mid-p" for pair in found.pairs)


def test_seeds_of_one_method_are_checkpoints(measurer: Any) -> None:
    lineup = line_up([read_run(measurer.run("dino", seed, 80.0)) for seed in range(2)])
    assert compare(lineup).claim == "checkpoints"


def test_per_image_values_of_other_images_are_refused(measurer: Any) -> None:
    import pandas as pd

    runs = [measurer.run(method, 0, 90.0) for method in ("dino", "dino_vmf")]
    for file in runs[1].path.glob("samples/digits_knn@1/*.parquet"):
        frame = pd.read_parquet(file)
        frame["index"] += 1
        frame.to_parquet(file)
    with pytest.raises(DinobenchError, match="are of different images"):
        compare(line_up([read_run(run) for run in runs]))


def test_one_seed_twice_is_no_claim_about_a_method(measurer: Any) -> None:
    runs = [read_run(measurer.run(method, s, 80.0)) for method in ("dino", "dino_vmf") for s in (0, 1)]
    with pytest.raises(DinobenchError, match="two candidates are dino with seed 0"):
        compare(line_up([*runs, runs[0]]))


def test_committed_records_support_claims_about_methods_but_not_about_checkpoints() -> None:
    records = Path(__file__).parents[3] / "results" / "digits" / "records"
    found = [candidate for candidate in collect(records) if candidate.method in ("dino", "dino_vmf")]
    lineup = line_up([candidate.only(["digits_knn"]) for candidate in found])
    methods = compare(lineup)
    expected = stats.ttest_rel(
        *(
            [place.score.value for place in lineup.places["digits_knn@1"] if lineup.methods[place.candidate] == method]
            for method in ("dino", "dino_vmf")
        )
    )
    assert methods.pairs[0].effect.p == pytest.approx(expected.pvalue)
    checkpoints = compare(lineup, "checkpoints")
    assert all(pair.effect.p is None and pair.adjusted_p is None for pair in checkpoints.pairs)
    assert "no per-image values of this score are stored, so nothing is tested" in checkpoints.pairs[0].sentence
    assert any("committed records hold none" in note for note in checkpoints.notes)
