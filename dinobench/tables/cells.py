"""What the tables need, each thing once: a cell is one training with the suites measured on its last checkpoint, or one
released checkpoint with its suites. Tables share cells: what it is, not which row asks for it, makes a cell.

    key = hash(recipe's science and seed, fingerprint of the training images, version of the method's code)

The version is declared, METHOD_VERSIONS: a hash over the files would have everything trained anew after a changed
comment. A test holds it to the code: it trains the first steps of committed cells and compares them with their curves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinobench.files import sha256
from dinobench.tables.definition import Row, RowAt, Scale, Table, load_table, table_names
from pretrain.errors import DinobenchError, UsageError, unknown_name

if TYPE_CHECKING:
    from pretrain.training.recipe import Recipe

KNOWN_SIZES = {"imagenet": 1_281_167}
"""Images to train on, of data sets that are seldom here."""
METHOD_VERSIONS: dict[str, int] = {}
"""Method -> version of its code, 1 where it is not listed. Raised by a change after which a training ends elsewhere."""


@dataclass(frozen=True)
class Cell:
    """One training, or one released checkpoint."""

    scale: Scale
    name: str
    """What `dinobench pretrain` takes, or the name of released weights in checkpoints.yaml."""
    method: str
    label: str
    """<method>-<architecture>-<data>; the name again for a released checkpoint."""
    science: str
    """Hash of the recipe's science and seed, its data named without path; SHA-256 of a released checkpoint."""
    seed: int = 0
    preset: str = ""
    overrides: tuple[str, ...] = ()
    data: str | None = None
    """Data set in place of the preset's own."""
    data_fingerprint: str | None = None
    """Of the training images; None where they are not here."""
    images: str = ""
    """Name or URI of the training images."""
    num_images: int | None = None
    """Images that the training sees, all epochs together; None where the size of its data set is not known."""
    has_prototypes: bool = True
    """Whether released weights have some shows only when they are read."""
    suites: tuple[str, ...] = ()
    """<name>@<version>, measured on the last checkpoint."""
    uris: tuple[tuple[str, str], ...] = ()
    """As Inputs.data, for suites that leave a path open."""
    released: bool = False
    """Whether this is released weights, not a training."""
    weights: str = ""
    """Name of released weights that are, or could stand in for, this cell."""
    checkpoint: Path | None = None
    """Their file, where the reader has it."""

    @property
    def version(self) -> int:
        return METHOD_VERSIONS.get(self.method, 1)

    @property
    def key(self) -> str:
        facts = [self.science, self.data_fingerprint, self.version]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def command(self) -> str:
        """What trains or measures the same by hand."""
        import shlex

        if self.released:
            names = ",".join(suite.partition("@")[0] for suite in self.suites)
            return shlex.join(["dinobench", "eval", str(self.checkpoint or self.weights), "--suite", names])
        options = ["--preset", self.preset, "--seed", str(self.seed)] + (["--data", self.data] if self.data else [])
        return shlex.join(["dinobench", "pretrain", self.name, *options, *self.overrides])

    def recipe(self) -> Recipe:
        """The recipe of the training: what the command resolves."""
        from pretrain.training.recipe import resolve

        return resolve(self.name, preset=self.preset, data=self.data, seed=self.seed, overrides=self.overrides)


@dataclass(frozen=True)
class Inputs:
    """What the reader gives beside the tables."""

    seeds: tuple[int, ...] | None = None
    """In place of each table's own."""
    data: Mapping[str, str] = field(default_factory=dict)
    """What a preset or suite leaves open -> URI with its path: imagenet -> imagenet:/data/imagenet."""
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    """Name of released weights -> file."""


@dataclass(frozen=True)
class Cells:
    """The cells of some tables at one scale."""

    scale: Scale
    all: tuple[Cell, ...]
    """In the order in which the tables need them."""
    of_row: Mapping[tuple[str, str], tuple[str, ...]]
    """(table, row) -> keys of its cells, one per seed; none: nothing here trains or measures it."""

    def of(self, table: str, row: str) -> list[Cell]:
        by_key = {cell.key: cell for cell in self.all}
        return [by_key[key] for key in self.of_row[table, row]]


def collect(tables: Sequence[Table], scale: Scale, inputs: Inputs | None = None) -> Cells:
    """The cells of some tables.

    Raises:
        UsageError: a row names a recipe, suite or version that there is not.
    """
    inputs = inputs or Inputs()
    cells: dict[str, Cell] = {}
    of_row: dict[tuple[str, str], tuple[str, ...]] = {}
    for table in tables:
        suites = table.suites(scale)
        for row in table.rows:
            own = _cells_of_row(table, row, scale, inputs) if suites else []
            for cell in own:
                seen = cells.get(cell.key, cell)
                wanted = dict.fromkeys([*seen.suites, *_ids(suites, cell.has_prototypes)])
                # some row may write out what is the recipe's own anyway, like the epochs
                plain = min(seen, cell, key=lambda each: (len(each.overrides), "/" in each.name))
                cells[cell.key] = replace(plain, suites=tuple(wanted), weights=seen.weights or cell.weights)
            of_row[table.name, row.label] = tuple(cell.key for cell in own)
    return Cells(scale, tuple(cells.values()), of_row)


def read_checkpoints(path: Path | None) -> dict[str, Path]:
    """The released weights that the reader has: a YAML file of `name: path`, paths relative to it.

    Raises:
        UsageError: the file cannot be read, or names weights that no table has.
    """
    from pretrain.mapping import read_mapping

    if path is None:
        return {}
    known = {row.checkpoint for name in table_names() for row in load_table(name).rows if row.checkpoint}
    found = {}
    for name, value in read_mapping(path, kind="list of checkpoints", holds="name: path").items():
        if name not in known:
            raise unknown_name(f"checkpoint in {path.name}", str(name), known)
        found[name] = path.parent / str(value)
    return found


def data_of(uris: Sequence[str]) -> dict[str, str]:
    """`imagenet:/data/imagenet` -> {imagenet: imagenet:/data/imagenet}."""
    for uri in uris:
        if not all(uri.partition(":")):
            raise UsageError(f"--data {uri!r} names no path: expected a URI like imagenet:/data/imagenet")
    return {uri.partition(":")[0]: uri for uri in uris}


def science_hash(recipe: dict[str, Any]) -> str:
    """Hash of a recipe's science and seed. Its data set counts by label: a path differs from machine to machine."""
    from pretrain.data.datasets import dataset_label
    from pretrain.training.recipe import recipe_hash

    return recipe_hash({**recipe, "data": {**recipe["data"], "name": dataset_label(recipe["data"]["name"])}})


@dataclass(frozen=True)
class _Facts:
    """What the seeds of a recipe have in common."""

    science: dict[str, Any]
    cell: Cell
    """With everything but the hash of a seed."""


def _cells_of_row(table: Table, row: Row, scale: Scale, inputs: Inputs) -> list[Cell]:
    here = row.at.get(scale, RowAt())
    name = (here.recipe or row.recipe) if scale in row.only else None
    weights = (row.checkpoint or "") if scale == "paper" else ""
    if weights and (weights in inputs.checkpoints or name is None):
        return [_released(scale, weights, inputs)]
    if name is None:
        return []
    setting = table.setting(scale)
    overrides = (*setting.overrides, *setting.short_schedule, *row.overrides, *here.overrides)
    facts = _training(scale, name, here.preset or setting.preset, overrides, tuple(inputs.data.items()))
    seeds = inputs.seeds if inputs.seeds is not None else range(here.seeds or setting.seeds)
    return [
        replace(facts.cell, seed=seed, science=science_hash({**facts.science, "seed": seed}), weights=weights)
        for seed in seeds
    ]


def _released(scale: Scale, weights: str, inputs: Inputs) -> Cell:
    path = inputs.checkpoints.get(weights)
    science = sha256(path) if path else f"released weights {weights}"
    uris = tuple(inputs.data.items())
    return Cell(scale, weights, weights, weights, science, uris=uris, released=True, weights=weights, checkpoint=path)


@cache
def _training(
    scale: Scale, name: str, preset: str, overrides: tuple[str, ...], data: tuple[tuple[str, str], ...]
) -> _Facts:
    """A recipe, resolved once for all seeds and all tables."""
    cell = Cell(scale, name, "", "", "", preset=preset, overrides=overrides, uris=data)
    recipe = cell.recipe()
    uri = dict(data).get(recipe.data.name.rstrip(":"))
    if uri is not None:
        cell = replace(cell, data=uri)
        recipe = cell.recipe()
    fingerprint, size = _images(recipe.data.name, recipe.data.split)
    steps = recipe.schedule.steps_per_epoch or (size and size // recipe.optim.batch_size)
    prototypes = bool(recipe.head.num_prototypes)
    cell = replace(
        cell,
        method=recipe.method.name,
        label=recipe.label,
        data_fingerprint=fingerprint,
        images=recipe.data.name,
        num_images=int(recipe.schedule.epochs * steps * recipe.optim.batch_size) if steps else None,
        has_prototypes=prototypes,
        suites=tuple(_ids(recipe.evaluation.suites, prototypes)),
    )
    return _Facts(recipe.model_dump(mode="json"), cell)


@cache
def _images(name: str, split: str) -> tuple[str | None, int | None]:
    """Fingerprint and number of the images of a data set; no fingerprint where they are not here."""
    from pretrain.data.datasets import dataset_label, open_dataset

    try:
        images = open_dataset(name, split)
    except DinobenchError:
        return None, KNOWN_SIZES.get(dataset_label(name))
    return images.fingerprint, len(images)


def _ids(names: Sequence[str], prototypes: bool) -> list[str]:
    found = [_suite(name) for name in names]
    return [suite_id for suite_id, needs_prototypes in found if prototypes or not needs_prototypes]


@cache
def _suite(name: str) -> tuple[str, bool]:
    """<name>@<version>, and whether it says nothing without prototypes."""
    from suites.suite import load_suite

    suite = load_suite(name)
    return suite.id, suite.needs_prototypes
