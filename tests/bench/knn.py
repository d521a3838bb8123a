"""Weighted kNN with four k: one search for all of them, against the official pass per k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gate import exact_products
from official import Reference
from report import Report, Row
from session import Session
from suites.neighbours import Backend
from suites.protocols.knn import classify
from timing import take_turns

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
TARGETS = {10: {"torch": 4.5, "faiss": 7.0}, 1000: {"torch": 24.0, "faiss": 24.0}}
"""Number of classes -> how many times faster than the official loop each backend should be."""

Classifier = Callable[[], dict[int, float]]


def one_hot_classifier(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, temperature: float, num_classes: int
) -> tuple[float, float]:
    """The algorithm of `knn_classifier` in eval_knn.py (100 chunks, one-hot votes), for runs without --reference."""
    hits = torch.zeros(2)
    for features, labels in zip(test.chunk(100), test_labels.chunk(100), strict=True):
        similarity, index = (features @ train.T).topk(k)
        one_hot = nn.functional.one_hot(train_labels[index], num_classes)  # [B, k, C]
        order = (one_hot * (similarity / temperature).exp()[:, :, None]).sum(1).sort(1, descending=True).indices
        correct = order == labels[:, None]
        hits += torch.stack([correct[:, 0].sum(), correct[:, : min(5, k)].sum()])
    top1, top5 = (100 * hits / len(test)).tolist()
    return top1, top5


NOISE = {10: 7.0, 1000: 3.0}
"""Spread within a class, for accuracies well between chance and 100 %."""


def features(num_train: int, num_test: int, dim: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised features of overlapping classes: neither all right nor all wrong."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, dim, generator=generator)
    labels = torch.randint(num_classes, (num_train + num_test,), generator=generator)
    noise = torch.randn(num_train + num_test, dim, generator=generator)
    points = nn.functional.normalize(centres[labels] + NOISE[num_classes] * noise, dim=1)
    return points[:num_train], labels[:num_train], points[num_train:], labels[num_train:]


def run(session: Session) -> None:
    """10 classes, and 1000 classes with a tenth of the queries, where the one-hot votes dominate; on a GPU ImageNet."""
    backends: list[Backend] = ["torch"]
    try:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        backends.append("faiss")
    except ImportError:
        print("FAISS is not installed: its row is left out")
    num_train = 1000 if session.tiny else 1_281_167 if session.on_gpu else 50_000
    queries = session.options.queries
    on_cpu = ((10, queries), (1000, max(queries // 10, 100)))
    for num_classes, num_test in ((1000, queries),) if session.on_gpu else on_cpu:
        measure(
            session.report,
            reference=session.reference,
            num_train=num_train,
            num_test=num_test,
            num_classes=num_classes,
            dim=384,
            rounds=min(session.rounds, 3),
            backends=backends,
            device=session.device,
        )


def measure(
    report: Report,
    *,
    reference: Reference | None,
    num_train: int,
    num_test: int,
    num_classes: int,
    dim: int,
    rounds: int,
    backends: Sequence[Backend],
    device: str,
) -> None:
    """One row: all k of NEIGHBOURS, the opponent against each of our backends."""
    data = [tensor.to(device) for tensor in features(num_train, num_test, dim, num_classes)]
    plain = reference.knn.knn_classifier if reference else one_hot_classifier

    def opponent() -> dict[int, float]:
        return {k: plain(*data, k, TEMPERATURE, num_classes)[0] for k in NEIGHBOURS}

    def ours(backend: Backend) -> dict[int, float]:
        ranks, _ = classify(*data, k=NEIGHBOURS, num_classes=num_classes, backend=backend, device=device)
        return {k: 100 * (rank == 0).double().mean().item() for k, rank in ranks.items()}

    contestants: dict[str, Classifier] = {"official" if reference else "one-hot loop": opponent}
    contestants |= {backend: partial(ours, backend) for backend in backends}
    with exact_products():
        gate = _gate({name: run() for name, run in contestants.items()}, num_test)
        times = take_turns(contestants, rounds=rounds, units=1)
    setting = {
        "queries": num_test,
        "base": num_train,
        "dim": dim,
        "classes": num_classes,
        "k": len(NEIGHBOURS),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    report.add(Row("knn", setting, "sweep", times, gate, TARGETS.get(num_classes, {})))


def _gate(accuracies: dict[str, dict[int, float]], num_test: int) -> dict[str, float]:
    """Equal accuracies, but for two images whose neighbours are ties to the last bit of a float32 product."""
    opponent, *ours = accuracies.values()
    worst = max(abs(opponent[k] - other[k]) for other in ours for k in NEIGHBOURS)
    if worst > 200 / num_test:
        raise SystemExit(f"kNN accuracies differ, nothing was timed: {accuracies}")
    return {"accuracy_k20": opponent[20], "largest_difference_in_points": worst}
