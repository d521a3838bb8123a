from __future__ import annotations

import pytest
from pydantic import ValidationError

from pretrain.data.views import ViewsConfig


def test_views_come_in_the_order_global_1_global_2_locals() -> None:
    views = ViewsConfig(global_size=32, local=3, local_size=16).views
    assert [view.number for view in views] == [0, 1, 2, 3, 4]
    assert [view.size for view in views] == [32, 32, 16, 16, 16]
    assert [view.blur for view in views] == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert [view.solarize for view in views] == [0.0, 0.2, 0.0, 0.0, 0.0]
    assert [view.scale for view in views] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_scale": (0.5, 1.2)},
        {"local_scale": (0.0, 0.4)},
        {"ratio": (1.5, 0.5)},
        {"blur": (1.0, 2.0, 0.5)},
        {"flip": 1.5},
        {"local": -1},
        {"std": (0.0, 1.0, 1.0)},
        {"blurr": (1.0, 1.0, 1.0)},
        {"backend": "kornia"},
        {"blur_kind": "median"},
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ViewsConfig(**wrong)


def test_a_dump_loads_to_an_equal_config() -> None:
    config = ViewsConfig(global_size=16, local=2, rotation=15)
    assert ViewsConfig.model_validate(config.model_dump(mode="json")) == config
