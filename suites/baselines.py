"""What the same suite gives without any training: raw pixels, PCA of them, random weights of the same backbone.

A score says little without these. Each is measured once per data set (random_init: per data set and backbone shape)
and kept in the cache under everything it depends on.

    raw_pixels   the stored pixels in [0, 1] as one vector; one channel when all three are equal (gray images)
    pca          their first 32 principal components (64 for images of 256 pixels or more), fitted on train
    random_init  the checkpoint's backbone (and head, where the protocol needs it) with fresh weights by its own init
                 rule: mean of the scores over `baseline_seeds` seeds 0, 1, ...; `<headline>_seed_sd` is their deviation

A protocol that reads images (suites.protocols.protocol) may have raw_pixels of its own; pca does not apply to it.

Pixels need a data set whose images share one size of at most 64 x 64; for others the first two do not apply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pretrain.data.datasets import ImageSet
from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim
from pretrain.models.checkpoint import LoadedModel
from pretrain.models.heads import ProjectionHead
from suites.cache import FeatureCache, content_key
from suites.extractor import Extractor
from suites.features import extract, row_paths
from suites.passes import Precision, Progress
from suites.protocols.protocol import BenchmarkData, Context, Split
from suites.suite import Feature, Suite, protocol_module

FORMAT = 1
"""Raised when a baseline would give other scores."""
MAX_SIDE = 64
_NOT_THE_FUNCTION = {"drop_path", "attention"}
"""Fields of ModelConfig that change neither initial weights nor features."""


@dataclass(frozen=True)
class Setting:
    """What the baselines share with the measurement they stand beside."""

    suite: Suite
    model: LoadedModel
    train: ImageSet
    test: ImageSet
    context: Context
    cache: FeatureCache | None
    precision: Precision = "fp32"
    batch_size: int = 256
    workers: int | None = None
    progress: Progress | None = None
    beside: Sequence[Feature] = ()
    """Features that other suites will ask for."""


@dataclass(frozen=True)
class BenchmarkSetting:
    """The same for a protocol that reads images."""

    suite: Suite
    model: LoadedModel
    data: BenchmarkData
    context: Context
    extractor: Extractor


class _Measured(Protocol):
    @property
    def suite(self) -> Suite: ...
    @property
    def model(self) -> LoadedModel: ...


def measure_benchmark_baselines(setting: BenchmarkSetting) -> dict[str, dict[str, float]]:
    """Scores of the baselines of a suite whose protocol reads images: name -> score name -> value."""
    module, parameters = protocol_module(setting.suite.protocol), setting.suite.resolved_parameters()
    cache = setting.extractor.cache
    found: dict[str, dict[str, float]] = {}
    for name in setting.suite.baselines:
        parts = {"format": FORMAT, "baseline": name, "suite": setting.suite.fingerprint(), "seed": setting.context.seed}
        parts |= {"data": setting.data.fingerprint}
        if name == "random_init" and setting.model.provenance.get("model") is not None:
            parts |= {"weights": _recipe_of_weights(setting), "seeds": setting.suite.baseline_seeds}
            parts |= {"precision": setting.extractor.precision}
        elif name != "raw_pixels" or not hasattr(module, "pixel_scores"):
            continue
        scores = cache.read_scores(content_key(**parts)) if cache else None
        if scores is None and name == "random_init":
            runs = [_run_benchmark(module, model, setting) for model in random_models(setting)]
            scores = _over_seeds(runs, setting.suite.headline)
        elif scores is None:
            scores = module.pixel_scores(setting.data, parameters, setting.context)
        if scores is None:
            continue
        if cache:
            cache.write_scores(content_key(**parts), scores)
        found[name] = scores
    return found


def _run_benchmark(module: ModuleType, model: LoadedModel, setting: BenchmarkSetting) -> dict[str, float]:
    extractor = dataclasses.replace(setting.extractor, model=model, log=[])
    context = dataclasses.replace(setting.context, model=model)
    return module.run(setting.data, extractor, setting.suite.resolved_parameters(), context).scores


def measure_baselines(setting: Setting) -> dict[str, dict[str, float]]:
    """Scores of every baseline of the suite that applies: name -> score name -> value."""
    found: dict[str, dict[str, float]] = {}
    for name in setting.suite.baselines:
        if not _applies(name, setting):
            continue
        key = _key(name, setting)
        scores = setting.cache.read_scores(key) if setting.cache else None
        if scores is None:
            scores = _random_init(setting) if name == "random_init" else _pixels(name, setting)
            if scores is None:
                continue
            if setting.cache:
                setting.cache.write_scores(key, scores)
        found[name] = scores
    return found


def _applies(name: str, setting: Setting) -> bool:
    if setting.train.labels is None or setting.test.labels is None:
        return False
    if name == "random_init":
        return setting.model.provenance.get("model") is not None
    if setting.suite.needs_prototypes:
        return False
    return all(max(images.image(0).size) <= MAX_SIDE for images in (setting.train, setting.test))


def _key(name: str, setting: Setting) -> str:
    parts: dict[str, Any] = {
        "format": FORMAT,
        "baseline": name,
        "suite": setting.suite.fingerprint(),
        "train": setting.train.fingerprint,
        "test": setting.test.fingerprint,
        "seed": setting.context.seed,
    }
    if name == "random_init":
        parts |= {"weights": _recipe_of_weights(setting), "seeds": setting.suite.baseline_seeds}
        parts |= {"precision": setting.precision, "temperature": setting.model.temperature}
    return content_key(**parts)


def _recipe_of_weights(setting: _Measured) -> dict[str, Any]:
    """What the random weights are drawn from."""
    config = {k: v for k, v in setting.model.provenance["model"].items() if k not in _NOT_THE_FUNCTION}
    head = setting.model.head.config.model_dump() if setting.suite.needs_prototypes and setting.model.head else None
    return {"model": config, "head": head, "torch": torch.__version__}


def _pixels(name: str, setting: Setting) -> dict[str, float] | None:
    """Scores of pixels or their components; None for images of several sizes."""
    module = protocol_module(setting.suite.protocol)
    pixels = raw_pixels(setting.train, setting.test)
    if pixels is None:
        return None
    train, test = pixels
    if name == "pca":
        train, test = principal_components(train, test)
    context = dataclasses.replace(setting.context, model=None)
    return _run(module, setting, _split(train, setting.train), _split(test, setting.test), context)


def _run(module: ModuleType, setting: Setting, train: Split, test: Split, context: Context) -> dict[str, float]:
    return module.run(train, test, setting.suite.resolved_parameters(), context).scores


def _split(features: Tensor, images: ImageSet) -> Split:
    assert images.labels is not None
    index = torch.arange(len(images))
    return Split(features, images.labels.cpu(), index, row_paths(images, index))


def raw_pixels(train: ImageSet, test: ImageSet) -> tuple[Tensor, Tensor] | None:
    """Pixels in [0, 1] of both splits: [N, H * W] for gray images, else [N, 3 * H * W]; None if sizes differ."""
    if train.array is None or test.array is None or train.array.shape[1:] != test.array.shape[1:]:
        return None
    arrays = [array.cpu() for array in (train.array, test.array)]
    gray = all(torch.equal(array[:, 0], array[:, channel]) for array in arrays for channel in (1, 2))
    if gray:
        arrays = [array[:, :1] for array in arrays]
    return arrays[0].flatten(1).float() / 255, arrays[1].flatten(1).float() / 255


def principal_components(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both splits [N, D] on the first components of train [N, 32 or 64]."""
    from sklearn.decomposition import PCA

    number = min(64 if train.shape[1] >= 256 else 32, *train.shape)
    solver = "randomized" if train.shape[1] > 512 else "full"
    pca = PCA(number, svd_solver=solver, random_state=0).fit(train.numpy())
    return tuple(torch.from_numpy(pca.transform(x.numpy()).astype(np.float32)) for x in (train, test))  # type: ignore[return-value]


def _random_init(setting: Setting) -> dict[str, float]:
    runs = [_measure_random(model, setting) for model in random_models(setting)]
    return _over_seeds(runs, setting.suite.headline)


def _over_seeds(runs: list[dict[str, float]], headline: str) -> dict[str, float]:
    """Means of the scores that all runs have, and the deviation of the headline."""
    scores = {name: float(np.mean([run[name] for run in runs])) for name in runs[0] if all(name in run for run in runs)}
    if len(runs) > 1:
        scores[f"{headline}_seed_sd"] = float(np.std([run[headline] for run in runs], ddof=1))
    return scores


def random_models(setting: _Measured) -> Iterator[LoadedModel]:
    """The checkpoint's network with fresh weights, one per seed; the caller's random state stays as it is."""
    config = ModelConfig.model_validate(setting.model.provenance["model"])
    source = _recipe_of_weights(setting)
    for seed in range(setting.suite.baseline_seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = create_backbone(config, drop_path=0.0).eval()
            head = None
            if setting.suite.needs_prototypes and setting.model.head is not None:
                head = ProjectionHead(feature_dim(backbone), setting.model.head.config).eval()
        weights = content_key(random_init=seed, model=source["model"], torch=source["torch"])
        provenance = {"path": f"random init (seed {seed})", "weights_sha256": weights, "model": source["model"]}
        prototypes = head.last_layer if head is not None else None
        yield dataclasses.replace(
            setting.model, backbone=backbone, head=head, prototypes=prototypes, provenance=provenance
        )


def _measure_random(model: LoadedModel, setting: Setting) -> dict[str, float]:
    module = protocol_module(setting.suite.protocol)
    splits = []
    for images in (setting.train, setting.test):
        features = extract(
            model,
            images,
            setting.suite.transform,
            setting.suite.feature,
            beside=setting.beside,
            cache=setting.cache,
            device=setting.context.device,
            precision=setting.precision,
            batch_size=setting.batch_size,
            workers=setting.workers,
            progress=setting.progress,
        )
        splits.append(features.split(stored=getattr(module, "STREAMS", False)))
    if model.head is not None:
        model.head.to(setting.context.device)
    return _run(module, setting, splits[0], splits[1], dataclasses.replace(setting.context, model=model))
