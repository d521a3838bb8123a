from __future__ import annotations

from collections import Counter
from dataclasses import astuple

import pytest

from dinobench.tables.published import Key, figures, find_figure
from pretrain.errors import UsageError

MAIN = {"paper": "DINO (2104.14294)", "table": "Table 2", "method": "DINO"}


def test_a_key_that_names_one_figure_finds_it_as_printed() -> None:
    figure = find_figure(Key(**MAIN, arch="ViT-S/16", suite="ImageNet linear"))
    assert (figure.value, figure.unit, figure.epochs) == ("77.0", "%", "800")
    assert figure.cited == "DINO, Table 2"
    assert figure.source


def test_a_key_that_fits_several_figures_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one.*ResNet-50.*name more of its columns"):
        find_figure(Key(**MAIN))


def test_a_key_that_fits_none_names_the_nearest_value() -> None:
    with pytest.raises(UsageError, match="did you mean 'ViT-S/16'"):
        find_figure(Key(**MAIN, arch="ViT-S16"))


def test_values_that_do_not_occur_together_are_refused() -> None:
    with pytest.raises(UsageError, match="do not occur together"):
        find_figure(Key(**MAIN, arch="RN18"))


def test_every_figure_is_a_number_with_a_source_and_occurs_once() -> None:
    assert len(figures()) == 751
    assert all(float(figure.value) >= 0 and figure.source for figure in figures())
    keys = Counter(astuple(figure)[:8] for figure in figures())
    assert [key for key, count in keys.items() if count > 1] == []
