from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from suites.whitening import fit_whitening


def test_golden_copydays_gem_whiten_components(golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    """The signs of the axes are free; float32 covariances leave errors of 1e-2 (see golden/README.md)."""
    reference = golden("copydays_gem_whiten")
    whiten = fit_whitening(torch.from_numpy(reference["pca.whiten_set"]), int(reference["pca.dim"]))
    found = whiten(torch.from_numpy(reference["pca.x"])).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(reference["pca.out"]), rtol=0, atol=1e-2)
    np.testing.assert_allclose(found @ found.T, reference["pca.out_gram"], rtol=1e-2, atol=1e-2)


def test_the_second_moment_about_zero_becomes_the_identity() -> None:
    values = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.randn(
        6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    components = fit_whitening(values + 3).components
    moved = (values + 3) @ components.T
    torch.testing.assert_close(moved.T @ moved / 500, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_vanishing_eigenvalues_are_raised_to_a_share_of_the_largest() -> None:
    values = torch.zeros(10, 3)
    values[:, 0] = 2.0
    lengths = fit_whitening(values).components.norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([0.5, 0.5 / 1e-5**0.5, 0.5 / 1e-5**0.5]))


def test_fewer_components_are_the_first_ones() -> None:
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit_whitening(values, 2).components, fit_whitening(values).components[:2])
