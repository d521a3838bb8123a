from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinobench.comparison import candidates
from dinobench.files import read_json, write_json
from pretrain.errors import DinobenchError

RECORDS = Path(__file__).parents[3] / "results" / "digits" / "records"


def test_a_run_is_read_with_all_its_checkpoints(measurer: Any) -> None:
    run = measurer.run("dino", 3, 90.0)
    (found,) = candidates.read(run.path, measurer.output)
    assert (found.method, found.seed, [at.step for at in found.checkpoints]) == ("dino", 3, [20, 40])
    score = found.checkpoints[-1].scores["digits_knn@1"]
    assert (score.value, score.headline, score.data) == (90.0, "top1", {"test": "d" * 40})
    assert found.curves["loss/total"] == [(20, pytest.approx(0.23)), (40, pytest.approx(0.13))]
    assert found.images_per_step == run.recipe()["optim"]["batch_size"]


def test_per_image_values_are_those_whose_mean_is_the_headline(measurer: Any) -> None:
    run = measurer.run("dino", 0, 90.0)
    (found,) = candidates.read(run.path, measurer.output)
    scores = found.checkpoints[-1].scores
    images = scores["digits_knn@1"].per_image()
    assert images["value"].mean() == pytest.approx(90.0)
    assert sorted(images["value"].unique()) == [0.0, 100.0]
    assert images["label"].tolist() == [k % 10 for k in range(200)]
    # perplexity is no mean over images, though right and wrong are stored beside it
    assert scores["digits_prototypes@1"].per_image() is None
    assert len(scores["digits_prototypes@1"].frame("prototypes")) == 16
    assert scores["digits_knn@1"].frame("prototypes") is None


def test_average_precisions_are_taken_by_difficulty(measurer: Any, tmp_path: Path) -> None:
    frame = {"index": [0, 1, 2], "ap_easy": [10.0, 20.0, np.nan], "ap_medium": [30.0, 40.0, np.nan]}
    import pandas as pd

    pd.DataFrame(frame).to_parquet(tmp_path / "x.parquet")
    score = candidates.Score("roxford@1", "f", "map", {"map": 35.0}, None, 2, {}, tmp_path / "x.parquet")
    assert score.per_image()["value"].tolist()[:2] == [30.0, 40.0]
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DinobenchError, match="cannot be read"):
        score.per_image()


def test_every_committed_record_is_read(tmp_path: Path) -> None:
    found = candidates.collect(RECORDS)
    assert len(found) >= 54
    dino = next(candidate for candidate in found if (candidate.method, candidate.seed) == ("dino", 0))
    (at,) = dino.checkpoints
    document = read_json(RECORDS / "dino-s0.json")
    assert (at.step, at.images_seen) == (document["provenance"]["step"], document["provenance"]["images_seen"])
    for suite, entry in document["results"].items():
        assert at.scores[suite].value == entry["scores"][entry["headline"]]
        assert at.scores[suite].per_image() is None
        assert set(at.scores[suite].data) == {"train", "test"}
    assert len(dino.curves["loss/total"]) > 10


def test_a_lone_checkpoint_and_one_of_a_run_are_found_by_their_hash(measurer: Any, true_result: Any) -> None:
    (found,) = candidates.read(true_result.checkpoint, true_result.checkpoint.parent / "runs")
    assert found.named
    (suite,) = found.checkpoints[0].scores
    assert suite == f"digits_knn@1 on npz:{true_result.images}"  # not the suite's own images
    with pytest.raises(DinobenchError, match="nothing was measured on"):
        candidates.read(true_result.checkpoint, measurer.output)


def test_a_result_file_stands_for_its_checkpoint(measurer: Any) -> None:
    run = measurer.run("dino", 0, 90.0)
    file = next(run.path.glob("evals/digits_knn@1/*.json"))
    (found,) = candidates.read(file, measurer.output)
    assert (found.method, found.named, list(found.checkpoints[0].scores)) == ("dino", True, ["digits_knn@1"])
    assert found.checkpoints[0].scores["digits_knn@1"].per_image() is not None


def test_what_is_nothing_of_the_sort_is_refused(tmp_path: Path, measurer: Any) -> None:
    with pytest.raises(DinobenchError, match="no file or folder"):
        candidates.read(tmp_path / "absent", tmp_path)
    with pytest.raises(DinobenchError, match="neither runs .* nor records"):
        candidates.read(tmp_path, tmp_path)
    write_json(tmp_path / "x.json", {"name": "dino", "provenance": {}, "receipt": {}, "results": 3})
    with pytest.raises(DinobenchError, match="neither a result nor a record: results"):
        candidates.read(tmp_path / "x.json", tmp_path)
    (tmp_path / "x.json").unlink()
    write_json(tmp_path / "baselines.json", {"digits_knn@1": {}})
    assert candidates.collect(tmp_path) == []
