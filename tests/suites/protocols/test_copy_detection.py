from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pretrain.errors import DinobenchError
from pretrain.models.checkpoint import LoadedModel
from suites.extractor import Extractor
from suites.protocols import copy_detection
from suites.protocols.copy_detection import Parameters, best_answers, score_answers
from suites.protocols.protocol import Context
from suites.suite import SuiteDataset
from suites.whitening import fit_whitening

Golden = Callable[[str], dict[str, np.ndarray]]
SMALL = Parameters(image_size=32, num_distractors=4, num_whitening=6)


def test_golden_copydays_gem_whiten_answers_do_not_depend_on_the_signs_of_the_axes(golden: Golden) -> None:
    """The official order of steps: mean away, second moment about zero, unit length, dot product, best 20."""
    reference = golden("copydays_gem_whiten")
    queries, database, white = (torch.from_numpy(reference[f"{n}_in"]) for n in ("queries", "database", "whitening"))
    whiten = fit_whitening(white)
    found = best_answers(whiten(database), whiten(queries), 20)
    covariance = white.double().T @ white.double() / len(white)
    values, axes = torch.linalg.eigh(covariance)
    inverse = axes @ torch.diag(1 / values.clamp(min=1e-5 * float(values[-1])).sqrt()) @ axes.T
    moved = [F.normalize((x.double() - white.double().mean(0)) @ inverse, dim=1) for x in (queries, database)]
    expected = (moved[0] @ moved[1].T).topk(20).indices.numpy()
    assert (found == expected).mean() > 0.99


def test_originals_beyond_the_depth_count_as_not_found() -> None:
    originals = ["200000", "200100", "200200"]
    answers = np.array([[2, 0], [3, 1], [4, 5]])
    found = score_answers(answers, originals, ["200001", "200102", "200203"])
    # Place 1: (0 + 1/2) / 2; place 1 after a distractor: the same; not among the answers: 0.
    assert found.tolist() == pytest.approx([0.25, 0.25, 0])
    assert score_answers(np.array([[0]]), originals, ["200001"]).tolist() == [1]


def test_a_picture_without_original_is_refused() -> None:
    with pytest.raises(DinobenchError, match=r"no original begins like 300001 \(3000\.\.\.\)"):
        score_answers(np.array([[0]]), ["200000"], ["300001"])


@pytest.fixture
def copydays(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    folder = tmp_path / "copydays"

    def save(role: str, name: str, pixels: np.ndarray) -> None:
        (folder / role).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / role / f"{name}.png")

    for picture in range(5):
        pixels = generator.integers(0, 256, (40, 56, 3)).astype(np.uint8)
        save("original", f"{2000 + picture}00", pixels)
        save("strong", f"{2000 + picture}01", 255 - (255 - pixels) // 2)
    for role, number in (("distractors", 5), ("whitening", 8)):
        for i in range(number):
            save(role, f"{role}{i}", generator.integers(0, 256, (30, 30, 3)).astype(np.uint8))
    return folder


def opened(folder: Path, parameters: Parameters = SMALL) -> copy_detection.CopyData:
    return copy_detection.open_data(SuiteDataset(name="copydays"), f"folder:{folder}", parameters)


def test_copies_are_searched_among_originals_and_distractors(copydays: Path, model: LoadedModel) -> None:
    data = opened(copydays)
    assert {role: len(images) for role, images in data.roles.items()} == {
        "original": 5,
        "strong": 5,
        "distractors": 4,
        "whitening": 6,
    }
    extractor = Extractor(model)
    found = copy_detection.run(data, extractor, SMALL, Context(0))
    assert len(extractor.log) == 4
    assert found.n == 5 and found.samples["query"].tolist()[0] == "200001"
    assert found.scores["map"] == pytest.approx(found.samples["ap"].mean())
    assert "5 originals and 9 images in all" in found.notes[0]


def test_without_whitening_it_is_said(copydays: Path, model: LoadedModel) -> None:
    parameters = Parameters(image_size=32, num_distractors=0, num_whitening=0)
    data = opened(copydays, parameters)
    assert set(data.roles) == {"original", "strong"}
    found = copy_detection.run(data, Extractor(model), parameters, Context(0))
    assert "without whitening" in found.notes
    identical = copy_detection.CopyData("same", {"original": data.roles["original"], "strong": data.roles["original"]})
    assert copy_detection.run(identical, Extractor(model), parameters, Context(0)).scores["map"] == pytest.approx(100)


def test_fewer_images_than_pinned_are_refused(copydays: Path) -> None:
    with pytest.raises(DinobenchError, match=r"distractors holds 5 images, this suite needs 6.*num_distractors"):
        opened(copydays, Parameters(num_distractors=6, num_whitening=0))
    with pytest.raises(DinobenchError, match=r"whitening holds 8 images, this suite needs 20000"):
        opened(copydays, Parameters(num_distractors=0))
    (copydays / "strong").rename(copydays / "weak")
    with pytest.raises(DinobenchError, match=r"strong holds 0 images"):
        opened(copydays)
