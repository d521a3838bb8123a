from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from dinobench.figures import collapse
from dinobench.runs import RunFolder, RunState, open_run
from pretrain.errors import DinobenchError

CURVES = {"both": (1.0, 1.5), "centring_only": (4.8, 0.0), "sharpening_only": (0.0, 0.0), "neither": (4.6, 0.0)}


def make_run(path: Path, label: str | None, entropy: float = 1.0, kl: float = 0.5, num_prototypes: int = 128) -> Path:
    path.mkdir(parents=True)
    tracking = {} if label is None else {"label": label}
    (path / "recipe.yaml").write_text(
        yaml.safe_dump({"head": {"num_prototypes": num_prototypes}, "tracking": tracking})
    )
    run = RunFolder(path)
    run.state_file.write_text(RunState(key=path.name, status="finished").model_dump_json())
    for step in (10, 20, 30):
        kl_here = math.nan if step == 10 else kl
        run.journal.append({"health/target_entropy": entropy + 1 / step, "loss/kl": kl_here}, step)
    return path


@pytest.fixture
def ablation(tmp_path: Path) -> Path:
    """The four runs under names that do not sort in their order, and runs that do not belong."""
    for name, row in zip("dbca", CURVES, strict=True):
        make_run(tmp_path / name, f"collapse/{row}", *CURVES[row])
    make_run(tmp_path / "plain", None)
    make_run(tmp_path / "other", "centring/both")
    make_run(tmp_path / "damaged", None)
    (tmp_path / "damaged" / "recipe.yaml").write_text("[")
    return tmp_path


def test_the_runs_of_the_ablation_are_drawn_in_its_order(ablation: Path, tmp_path: Path, look: Callable) -> None:
    runs = collapse.find_ablation(ablation)
    assert [run.name for run in runs] == ["d", "b", "c", "a"]
    drawing = collapse.draw_collapse(runs)
    entropy, divergence = drawing.figure.axes
    labels = [line.get_label() for line in entropy.lines]
    assert labels == [*CURVES, "ln K, K = 128"]
    assert np.min(entropy.lines[-1].get_ydata()) == pytest.approx(math.log(128))
    assert entropy.lines[-1].get_linestyle() == ":"
    for line, row in zip(entropy.lines, CURVES, strict=False):
        assert list(line.get_xdata()) == [10, 20, 30]
        assert list(line.get_ydata()) == [CURVES[row][0] + 1 / step for step in (10, 20, 30)]
    assert [list(line.get_xdata()) for line in divergence.lines] == [[20, 30]] * 4  # a value that is not finite
    assert drawing.numbers["runs"]["both"]["loss/kl"] == {"first": 1.5, "last": 1.5, "last_step": 30}
    assert drawing.numbers["ln_K"] == [math.log(128)]
    look(drawing.write(tmp_path / "figures"))


def test_no_run_names_the_commands_that_make_them(tmp_path: Path) -> None:
    with pytest.raises(DinobenchError) as caught:
        collapse.find_ablation(tmp_path)
    for row in CURVES:
        assert f"`dinobench pretrain collapse/{row}`" in str(caught.value)


def test_lines_are_named_by_row_else_by_folder(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "one", "collapse/both"),
        make_run(tmp_path / "two", "collapse/both"),
        make_run(tmp_path / "three", "collapse/neither"),
        make_run(tmp_path / "four", None),
    ]
    names = collapse.line_names([open_run(path) for path in paths])
    assert names == ["both (one)", "both (two)", "neither", "four"]


def test_each_number_of_prototypes_has_its_line(tmp_path: Path) -> None:
    runs = [open_run(make_run(tmp_path / str(size), None, num_prototypes=size)) for size in (64, 32)]
    drawing = collapse.draw_collapse(runs)
    assert drawing.numbers["ln_K"] == [math.log(32), math.log(64)]


def test_a_run_without_the_metrics_is_named(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "a", None))
    run.journal.path.unlink()
    with pytest.raises(DinobenchError, match=r"a has no health/target_entropy in its metrics\.jsonl"):
        collapse.draw_collapse([run])
