from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinobench.comparison.candidates import collect, read_run
from dinobench.comparison.lineup import Lineup, line_up
from dinobench.figures import comparison
from suites.interval import mean_interval

KNN, PROTOTYPES = "digits_knn@1", "digits_prototypes@1"


def make_lineup(measurer: Any, seeds: int, **options: Any) -> Lineup:
    runs = [measurer.run(m, s, 80.0 + s + 5 * (m == "dino_vmf")) for m in ("dino", "dino_vmf") for s in range(seeds)]
    return line_up([read_run(run) for run in runs], **options)


def test_curves_have_the_mean_and_a_band_of_one_deviation(measurer: Any, tmp_path: Path, look: Callable) -> None:
    drawing = comparison.draw_curves(make_lineup(measurer, 3))
    assert list(drawing.numbers["panels"]) == [f"{KNN} top1", f"{PROTOTYPES} perplexity", "loss/total"]
    knn = drawing.numbers["panels"][f"{KNN} top1"]["dino_vmf"]
    assert knn == {"n": 3, "x": [20, 40], "mean": pytest.approx([66, 86]), "sd": pytest.approx([1.0, 1.0])}
    loss = drawing.numbers["panels"]["loss/total"]["dino"]
    assert loss["mean"] == pytest.approx([0.21, 0.11])
    axes = drawing.figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["dino (n=3)", "dino_vmf (n=3)"]
    (band, _) = axes.collections
    assert band.get_paths()[0].get_extents().ymax == pytest.approx(82)
    look(drawing.write(tmp_path / "figures"))


def test_curves_over_images_seen(measurer: Any) -> None:
    lineup = make_lineup(measurer, 1, align="images")
    batch = lineup.candidates[0].recipe["optim"]["batch_size"]
    drawing = comparison.draw_curves(lineup)
    for panel in (f"{KNN} top1", "loss/total"):
        assert drawing.numbers["panels"][panel]["dino"]["x"] == [20 * batch, 40 * batch]
    assert drawing.figure.axes[0].get_xlabel() == "images seen"
    assert not drawing.figure.axes[0].collections  # one seed has no band


def test_only_places_that_all_seeds_have_are_averaged() -> None:
    x, mean, deviation = comparison.mean_and_spread([{1: 1.0, 2: 2.0, 3: 9.0}, {2: 4.0, 3: 9.0, 4: 0.0}])
    assert (x.tolist(), mean.tolist()) == ([2, 3], [3.0, 9.0])
    assert deviation == pytest.approx([np.sqrt(2), 0])


def test_classes_of_methods_are_paired_by_seed(measurer: Any, tmp_path: Path, look: Callable) -> None:
    lineup = make_lineup(measurer, 2)
    drawing = comparison.draw_classes(lineup, KNN)
    frames = {name: place.score.per_image() for name, place in zip(lineup.names, lineup.places[KNN], strict=True)}
    expected = np.mean(
        [[frames[f"{m} s{s}"].query("label == 4")["value"].mean() for m in ("dino_vmf", "dino")] for s in (0, 1)],
        axis=0,
    )
    row = drawing.numbers["methods"]["dino_vmf"]
    assert row["seeds"] == 2
    assert row["difference"]["4"] == pytest.approx(expected[0] - expected[1])
    assert np.mean(list(row["difference"].values())) == pytest.approx(5.0)  # classes of equal size
    look(drawing.write(tmp_path / "figures"))


def test_classes_of_checkpoints_have_the_paired_interval(measurer: Any, tmp_path: Path, look: Callable) -> None:
    lineup = make_lineup(measurer, 1)
    reference, (row,) = comparison.class_differences(lineup, KNN)
    assert (reference, row.name) == ("dino s0", "dino_vmf s0")
    one, two = (place.score.per_image() for place in lineup.places[KNN])
    chosen = one["label"] == 7
    assert row.intervals[7] == mean_interval(two["value"][chosen] - one["value"][chosen])
    look(comparison.draw_classes(lineup, KNN).write(tmp_path / "figures"))


def test_of_many_classes_those_that_differ_most_are_drawn() -> None:
    means = {c: float(c if c != 50 else -100) for c in range(60)}
    row = comparison.ClassRow("x", means, [means], {})
    assert comparison._shown_classes([row]) == [*range(20, 60)]


def test_usage_is_side_by_side_on_one_scale(measurer: Any, tmp_path: Path, look: Callable) -> None:
    lineup = make_lineup(measurer, 2)
    drawing = comparison.draw_usage(lineup, PROTOTYPES)
    table = lineup.places[PROTOTYPES][0].score.frame("prototypes")
    facts = drawing.numbers["methods"]["dino"][0]
    assert (facts["prototypes"], facts["used"]) == (16, int((table["images"] > 0).sum()))
    assert facts["kappa_median"] == pytest.approx(table["kappa"].median())
    assert facts["unique"] == {"0.025": 16, "0.2": 9}
    top = drawing.figure.axes[:2]
    assert [len(axes.lines) for axes in top] == [2, 2]
    assert top[0].get_ylim() == top[1].get_ylim()
    assert top[0].lines[0].get_ydata().tolist() == sorted(table["images"][table["images"] > 0], reverse=True)
    look(drawing.write(tmp_path / "figures"))


def test_records_have_curves_and_no_images() -> None:
    records = Path(__file__).parents[3] / "results" / "digits" / "records"
    found = [candidate for candidate in collect(records) if candidate.method in ("dino", "byol")]
    assert [drawing.name for drawing in comparison.draw_comparison(line_up(found))] == ["compare_curves"]


def test_everything_there_is_gets_drawn(measurer: Any) -> None:
    names = [drawing.name for drawing in comparison.draw_comparison(make_lineup(measurer, 2))]
    assert names == ["compare_curves", "compare_classes_digits_knn_1", "compare_prototypes_digits_prototypes_1"]
