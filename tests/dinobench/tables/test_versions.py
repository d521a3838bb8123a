"""The declared versions of the methods hold: the code trains as it did when the committed records were made.

The first logging interval of a training is compared with the first point of the committed curve. A change after which
it differs raises METHOD_VERSIONS of the methods it touches, and their cells are trained anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dinobench.tables.cells import METHOD_VERSIONS
from dinobench.tables.records import Record, RecordStore
from pretrain.methods.method import method_names
from pretrain.training import loop
from pretrain.training.recipe import resolve

ROOT = Path(__file__).parents[3]
TOLERANCE = 0.02
"""Of the loss: sums in another order, on another machine, change its third digit within twenty steps."""


class Enough(Exception):
    """The first metrics are there."""


def committed(method: str) -> Record:
    """The oldest seed of a method's committed records, those by its own recipe."""
    store = RecordStore(ROOT / "results")
    records = [record for record in store.all() if record.file.parent == store.folder("digits")]
    found = [record for record in records if record.content["name"] == method]
    return min(found, key=lambda record: record.seed)


def first_metrics(method: str, seed: int, folder: Path) -> tuple[int, dict[str, float]]:
    found: list[tuple[int, dict[str, float]]] = []

    def log(metrics: dict[str, float], step: int) -> None:
        found.append((step, {key: float(value) for key, value in metrics.items()}))
        raise Enough

    with pytest.raises(Enough):
        loop.train(resolve(method, preset="digits", seed=seed), folder=folder, log=log)
    return found[0]


def compare(method: str, folder: Path) -> None:
    record = committed(method)
    assert record.made_from["version"] == METHOD_VERSIONS.get(method, 1)
    step, metrics = first_metrics(method, record.seed, folder)
    then, loss = record.content["curve"]["loss/total"][0]
    assert then == step
    assert metrics["loss/total"] == pytest.approx(loss, abs=TOLERANCE), (
        f"{method} trains otherwise than its records: raise its version in METHOD_VERSIONS and train its cells anew"
    )


def test_dino_trains_as_it_did(tmp_path: Path) -> None:
    compare("dino", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_every_method_trains_as_it_did(method: str, tmp_path: Path) -> None:
    compare(method, tmp_path)
