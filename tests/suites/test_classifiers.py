from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from suites.classifiers import LogisticClassifiers


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Features [80, 6] and presence [80, 4]: two ordinary classes, one always there, one never."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 6, generator=generator).double()
    presence = torch.zeros(80, 4, dtype=torch.int64)
    presence[:, 0] = features[:, 0] + torch.randn(80, generator=generator) > 0
    presence[:, 1] = features[:, 1] + torch.randn(80, generator=generator) > 1
    presence[:, 2] = 1
    presence[::7, :2] = -1
    return features, presence


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_each_class_is_a_fit_of_scikit_learn_on_the_images_that_count(
    images: tuple[torch.Tensor, torch.Tensor], c: float
) -> None:
    features, presence = images
    classifiers = LogisticClassifiers(features, presence, 4, tolerance=1e-9)
    found = classifiers.scores(classifiers.fit(c), features)
    for number in (0, 1):
        counted = presence[:, number] >= 0
        oracle = LogisticRegression(C=c, tol=1e-10, max_iter=5000)
        oracle.fit(features[counted].numpy(), presence[counted, number].numpy())
        np.testing.assert_allclose(found[:, number], oracle.decision_function(features.numpy()), atol=1e-5)
    assert classifiers.converged


def test_of_a_class_that_is_always_or_never_there_nothing_is_said(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    classifiers = LogisticClassifiers(*images, 4)
    assert not classifiers.scores(classifiers.fit(1.0), images[0])[:, 2:].any()


def test_images_that_do_not_count_for_a_class_do_not_change_it(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, presence = images
    moved = features.clone()
    moved[::7] = 50
    first, second = (LogisticClassifiers(x, presence, 4) for x in (features, moved))
    probe = torch.eye(6).double()
    assert torch.equal(first.scores(first.fit(1.0), probe), second.scores(second.fit(1.0), probe))


def test_one_label_per_image_is_one_problem_for_two_classes_too() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, generator=generator).double()
    for num_classes in (2, 3):
        labels = (features[:, :num_classes] + torch.randn(60, num_classes, generator=generator)).argmax(1)
        classifiers = LogisticClassifiers(features, labels, num_classes, tolerance=1e-9)
        score = classifiers.scores(classifiers.fit(0.5), features)
        oracle = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000).fit(features.numpy(), labels.numpy())
        np.testing.assert_allclose(score.softmax(1), oracle.predict_proba(features.numpy()), atol=1e-6)


def test_fits_that_end_early_are_told(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    classifiers = LogisticClassifiers(*images, 4, max_evaluations=1)
    classifiers.fit(1e4)
    assert not classifiers.converged
