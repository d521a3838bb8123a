from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinobench.figures import prototypes
from dinobench.figures.inputs import spread
from pretrain.data.datasets import open_dataset
from pretrain.errors import DinobenchError


def test_usage_and_nearest_images_are_those_of_the_logits(
    make_subject: Callable, tmp_path: Path, look: Callable
) -> None:
    subject = make_subject()
    usage, nearest = prototypes.draw_prototypes(subject, open_dataset("digits"), limit=200)
    images = spread(open_dataset("digits"), 200)
    head = subject.model.head
    with torch.no_grad():
        x = torch.stack([subject.transform.batch(images.pixels(number)[None])[0] for number in range(200)])
        z = head.project(subject.model.backbone(x))
        counts = head.logits(z, 0.04).argmax(1).bincount(minlength=12)
        cosine = z @ torch.nn.functional.normalize(head.last_layer.vectors(), dim=1).T
    falling = counts.sort(descending=True).values
    used = int((counts > 0).sum())
    assert usage.numbers["counts"] == falling[:used].tolist()
    assert (usage.numbers["used"], usage.numbers["images"], usage.numbers["prototypes"]) == (used, 200, 12)
    drawn = usage.figure.axes[-1].lines[0]
    assert list(drawn.get_ydata()) == falling[:used].tolist()

    rows = nearest.numbers["rows"]
    assert [row["images"] for row in rows] == falling[: min(8, used)].tolist()
    for row in rows:
        similar = cosine[:, row["prototype"]]
        assert similar[row["nearest"]].tolist() == pytest.approx(similar.topk(8).values.tolist(), abs=1e-5)
    first = torch.tensor(nearest.figure.axes[0].images[0].get_array())
    shown = subject.shown(subject.transform(images.image(rows[0]["nearest"][0])))
    assert torch.allclose(first, shown, atol=1e-6)
    assert (usage.name, nearest.name) == ("prototypes_usage_step7", "prototypes_nearest_step7")
    for drawing in (usage, nearest):
        look(drawing.write(tmp_path))


def test_the_histograms_hold_every_prototype(make_subject: Callable) -> None:
    subject = make_subject()
    with torch.no_grad():
        subject.model.prototypes.weight.mul_(torch.linspace(0.5, 2, 12)[:, None])
    usage, _ = prototypes.draw_prototypes(subject, open_dataset("digits"), limit=20)
    norms, kappas, _ = usage.figure.axes
    for axes, low, high in ((norms, 0.5, 2), (kappas, 0.5 / 0.04, 2 / 0.04)):
        assert sum(bar.get_height() for bar in axes.patches) == 12
        left, right = axes.patches[0].get_x(), axes.patches[-1].get_x() + axes.patches[-1].get_width()
        assert (left, right) == pytest.approx((low, high), rel=1e-5)


def test_a_backbone_alone_is_refused(make_subject: Callable) -> None:
    with pytest.raises(DinobenchError, match="holds a backbone without prototypes"):
        prototypes.need_prototypes(make_subject(head=None))


def test_only_a_vmf_head_needs_the_temperature(make_subject: Callable) -> None:
    subject = make_subject(teacher_temperature=None)
    usage, _ = prototypes.draw_prototypes(subject, open_dataset("digits"), limit=20)
    assert len(usage.figure.axes) == 2  # no precision without a temperature
    head = {"hidden": 16, "bottleneck": 16, "num_prototypes": 12, "prototypes": "free", "normaliser": "vmf"}
    with pytest.raises(DinobenchError, match="does not state its temperature"):
        prototypes.need_prototypes(make_subject(head=head, teacher_temperature=None))
