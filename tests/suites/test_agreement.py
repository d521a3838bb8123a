"""Agreement of clusters and classes against the official evaluation of iBOT."""

from __future__ import annotations

import numpy as np
import pytest

from suites.agreement import agreement


def test_golden_ibot_cluster_metrics(golden):
    g = golden("ibot_cluster_metrics")
    found = agreement(g["labels"], g["pred"])
    np.testing.assert_allclose(list(found.values()), 100 * g["nmi_ari_fmi_acc"], rtol=1e-9)
    many = agreement(g["labels"], g["pred_many_clusters"])
    np.testing.assert_allclose([many[name] for name in ("nmi", "ari", "fmi")], 100 * g["many_nmi_ari_fmi"], rtol=1e-7)


def test_a_relabelled_partition_agrees_fully_and_spare_clusters_count_as_wrong():
    label = np.repeat(np.arange(4), 5)
    assert list(agreement(label, 3 - label).values()) == pytest.approx([100] * 4)
    split = label.copy()
    split[:2] = 7  # two of twenty images in a cluster of their own
    assert agreement(label, split)["hungarian"] == pytest.approx(90)
