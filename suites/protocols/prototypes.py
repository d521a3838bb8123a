"""What the prototypes of a checkpoint's heads do: utilisation, precision, class purity, and kNN accuracy by ||w||.

Each image is assigned the prototype of highest logit of the evaluated network, without centring, at the teacher
temperature tau of the checkpoint (or `temperature`): l_k = <w_k, z>/tau, plus log C_p(||w_k||/tau) for vMF heads.

Utilisation, over the n images of train (counts grow with n: compare them at equal n only):
    used, dead          prototypes with and without an image          (Arteaga et al. 2026; MSN logs the same)
    usage_entropy       entropy in nats of the shares of the images   perplexity = exp of it, the headline
    assignment_entropy  mean entropy in nats of softmax_k l_k
    unique              prototypes in different directions, over a sweep of cosine distances; no image is involved
    nearest_cosine      mean cosine of a prototype to its nearest other one; no image is involved
Precision, kappa_k = ||w_k||/tau (DINO-vMF, section 3): quantiles over the prototypes.
Purity: share of train images whose class is the majority class of their prototype; `top1` gives each test image the
majority class of its prototype (a prototype without train images is always wrong).
Agreement of the test images' prototypes with their classes: assignment_nmi, _ari, _fmi, _hungarian (iBOT), and _ami,
the mutual information adjusted for chance: with thousands of prototypes, NMI is high for any assignment.
Accuracy of weighted kNN over the test images in percentile ranges of the ||w_k|| of their prototype (DINO-vMF,
Figure 2); not applicable when all norms are equal. Images of equal norm keep the order of the data set.

The head of the patch tokens (iBOT, DINOv2) has the same utilisation, unique and kappa under `patch_`, at its own
temperature: counts are over a sample of patch tokens of train; what is of the weights is left out for a shared head,
whose weights are the image head's.

Shapes: N train images, M test images, D features, K prototypes, C classes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from pretrain.errors import DinobenchError
from pretrain.models.backbones import has_patch_tokens
from pretrain.models.patch_prototypes import PatchPrototypes
from pretrain.objectives import prototype_usage as usage
from suites.agreement import agreement
from suites.interval import bootstrap_interval
from suites.patch_sample import sample_patch_tokens
from suites.protocols import knn
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table
from suites.prototype_statistics import assign, precision, unique_directions, utilisation

NEEDS_LABELS = False
NEEDS_HEAD = True
STREAMS = True
EQUAL_NORMS = 1e-4
"""Relative spread of the norms below which the prototypes count as normalised."""


class Parameters(ProtocolParameters):
    """Numbers that define the scores."""

    temperature: float | None = Field(default=None, gt=0)
    """Teacher temperature; None = the one stored in the checkpoint."""
    unique_threshold: float = usage.UNIQUE_THRESHOLD
    thresholds: tuple[float, ...] = usage.THRESHOLDS
    percentiles: tuple[float, ...] = (0, 20, 40, 60, 80, 100)
    k: int = 20
    knn_temperature: float = Field(default=0.07, gt=0)
    patch_images: int = Field(default=256, ge=1)
    """Train images at most whose patch tokens are drawn from."""
    patch_tokens: int = Field(default=16384, ge=1)
    """Patch tokens at most that are assigned."""

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The sample of patches came after version 1 and changed none of its scores: told only where set."""
        values = handler(self)
        for name in ("patch_images", "patch_tokens"):
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        return values


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Assign train [N, D] and test [M, D] features to the prototypes of the checkpoint's head and count."""
    if context.model is None or context.model.head is None or context.model.prototypes is None:
        alone = context.model is not None and context.model.prototypes is not None
        raise DinobenchError(
            "the prototypes suite needs a head with prototypes; this checkpoint has "
            + ("prototypes without the MLP that leads to them: give the file with the whole head" if alone else "none")
        )
    temperature = parameters.temperature or context.model.temperature
    if temperature is None:
        raise DinobenchError(
            "the checkpoint does not state its teacher temperature: set parameters.temperature in a copy of the suite"
        )
    vectors = context.model.head.last_layer.vectors().detach().float()
    norms = vectors.norm(dim=1).cpu()
    assigned, entropy = assign(context.model.head, train.features, temperature, context.device)
    counts = usage.usage_counts(assigned, len(vectors))
    directions, unique = unique_directions(vectors, parameters.thresholds, parameters.unique_threshold)
    scores = utilisation(counts, entropy) | directions | precision(norms, temperature)
    per_prototype = _per_prototype(norms, temperature) | {"images": counts.numpy()}
    tables = {"unique": unique}
    notes = [
        f"assigned at temperature {temperature:g}, {len(vectors)} prototypes; used, dead, entropies and purity are "
        f"over n={len(train)} train images: compare at equal n only",
        f"unique: {usage.COUNTING_RULE}; `unique` is at {parameters.unique_threshold:g}",
    ]
    samples = pd.DataFrame()
    if len(train.labels):
        from sklearn.metrics import adjusted_mutual_info_score

        chosen, _ = assign(context.model.head, test.features, temperature, context.device)
        purity, samples, majority, share = _purity(train, test, assigned, chosen, counts, context.num_classes)
        scores |= purity
        agreed = agreement(test.labels.numpy(), chosen.numpy())
        agreed["ami"] = 100 * float(adjusted_mutual_info_score(test.labels.numpy(), chosen.numpy()))
        scores |= {f"assignment_{name}": value for name, value in agreed.items()}
        per_prototype |= {"majority": majority.numpy(), "purity": share.numpy()}
        by_norm = _knn_by_norm(train, test, norms[chosen], parameters, context)
        if isinstance(by_norm, str):
            notes.append(by_norm)
        else:
            tables["knn_by_norm"] = by_norm
            names = (f"knn_norm_p{low:02.0f}_{high:02.0f}" for low, high in pairwise(parameters.percentiles))
            scores |= dict(zip(names, by_norm["top1"].tolist(), strict=True))
    else:
        notes.append("purity and kNN by norm: not applicable, the data set has no labels")
    tables["prototypes"] = pd.DataFrame(per_prototype)
    if context.model.patch is not None:
        patch_scores, patch_tables, patch_notes = _patches(context.model.patch, parameters, context)
        scores, tables, notes = scores | patch_scores, tables | patch_tables, notes + patch_notes
    interval = _perplexity_interval(assigned, scores["perplexity"], context.seed)
    return Outcome(scores, len(train), interval, samples, tables, notes)


def _per_prototype(norms: Tensor, temperature: float | None) -> dict[str, np.ndarray]:
    """Columns of the table of prototypes, from ||w_k|| [K]."""
    columns = {"prototype": np.arange(len(norms)), "norm": norms.numpy()}
    return columns if temperature is None else columns | {"kappa": usage.kappa(norms, temperature).numpy()}


def _patches(
    patch: PatchPrototypes, parameters: Parameters, context: Context
) -> tuple[dict[str, float], dict[str, pd.DataFrame], list[str]]:
    """Scores, tables and notes of the head of the patch tokens, all named `patch_`."""
    temperature = parameters.temperature or patch.temperature
    vectors = patch.prototypes.to(context.device).vectors().detach().float()
    norms = vectors.norm(dim=1).cpu()
    scores: dict[str, float] = {}
    tables: dict[str, pd.DataFrame] = {}
    columns = _per_prototype(norms, temperature)
    if patch.kind != "shared":
        scores, tables["unique"] = unique_directions(vectors, parameters.thresholds, parameters.unique_threshold)
        scores |= {} if temperature is None else precision(norms, temperature)
    tokens = _patch_tokens(patch, temperature, parameters, context)
    if isinstance(tokens, str):
        notes = [f"patch head ({patch.kind}): {tokens}"]
    else:
        assert patch.head is not None and temperature is not None
        assigned, entropy = assign(patch.head.to(context.device), tokens, temperature, context.device)
        counts = usage.usage_counts(assigned, len(vectors))
        scores |= utilisation(counts, entropy)
        columns["tokens"] = counts.numpy()
        notes = [
            f"patch head ({patch.kind}): assigned at temperature {temperature:g}, counts are over n={len(tokens)} "
            "patch tokens of train: compare at equal n only"
        ]
    tables["prototypes"] = pd.DataFrame(columns)
    scores = {f"patch_{name}": value for name, value in scores.items()}
    return scores, {f"patch_{name}": table for name, table in tables.items()}, notes


def _patch_tokens(
    patch: PatchPrototypes, temperature: float | None, parameters: Parameters, context: Context
) -> Tensor | str:
    """Patch tokens [M, D] of train, or why none are assigned."""
    assert context.model is not None
    images, transform = context.train_images, context.transform
    if patch.head is None:
        return "utilisation not applicable, the MLP that leads to its prototypes is not in the checkpoint"
    if temperature is None:
        return "utilisation not applicable, the checkpoint does not state its teacher temperature for patches"
    if not has_patch_tokens(context.model.backbone):
        return "utilisation not applicable, the backbone has no patch tokens"
    if images is None or transform is None:
        return "utilisation not measured, the images are not at hand, only features"
    return sample_patch_tokens(
        context.model,
        images,
        transform,
        num_images=parameters.patch_images,
        num_tokens=parameters.patch_tokens,
        seed=context.seed,
        device=context.device,
    )


def _purity(
    train: Split, test: Split, assigned: Tensor, chosen: Tensor, counts: Tensor, num_classes: int
) -> tuple[dict[str, float], pd.DataFrame, Tensor, Tensor]:
    """From the prototypes of train [N] and test [M]: scores, per-image table of test, majority class [K] (-1 when
    dead) and purity [K] (NaN when dead).
    """
    cells = torch.bincount(assigned * num_classes + train.labels, minlength=len(counts) * num_classes)
    votes, majority = cells.view(-1, num_classes).max(1)
    majority = torch.where(counts > 0, majority, -1)
    share = votes / counts  # 0 / 0 is NaN for a dead prototype
    prediction = majority[chosen]
    correct = prediction == test.labels
    scores = {"purity": 100 * votes.sum().item() / len(train), "top1": 100 * correct.double().mean().item()}
    return scores, sample_table(test, prediction, correct, prototype=chosen), majority, share


def _knn_by_norm(
    train: Split, test: Split, norm: Tensor, parameters: Parameters, context: Context
) -> pd.DataFrame | str:
    """kNN accuracy of the test images in percentile ranges of `norm` [M], or the reason why there is none."""
    spread = (norm.max() - norm.min()) / norm.mean().clamp_min(1e-12)
    if spread < EQUAL_NORMS:
        return "kNN by norm: not applicable, all assigned prototypes have one norm"
    if parameters.k > len(train):
        return f"kNN by norm: not applicable, k={parameters.k} is more than the {len(train)} train images"
    ranks, _ = knn.classify(
        train.features,
        train.labels,
        test.features,
        test.labels,
        k=(parameters.k,),
        num_classes=context.num_classes,
        temperature=parameters.knn_temperature,
        backend=context.backend,
        device=context.device,
    )
    correct = 100 * (ranks[parameters.k] == 0).double()
    order = norm.argsort(stable=True)
    edges = [round(len(order) * percentile / 100) for percentile in parameters.percentiles]
    rows = []
    for (low, high), (start, stop) in zip(pairwise(parameters.percentiles), pairwise(edges), strict=True):
        part = order[start:stop]
        values = norm[part]
        bounds = (values.min().item(), values.max().item()) if len(part) else (float("nan"), float("nan"))
        rows.append((low, high, len(part), *bounds, correct[part].mean().item()))
    return pd.DataFrame(rows, columns=["percentile_low", "percentile_high", "n", "norm_min", "norm_max", "top1"])


def _perplexity_interval(assigned: Tensor, estimate: float, seed: int) -> tuple[float, float]:
    """Bootstrap over images. A resample uses fewer prototypes than its source: the percentiles are shifted back."""
    group = np.unique(assigned.numpy(), return_inverse=True)[1]

    def statistic(counts: np.ndarray) -> np.ndarray:
        share = counts / counts.sum(1, keepdims=True)
        return np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(1))

    return bootstrap_interval(group, statistic, seed=seed, centre=estimate)
