"""A table: rows x columns, with the paper and table it regenerates. One YAML file each; its stem is the table's name.

Rows are trained by what `dinobench pretrain` takes (a method, or a row of an ablation), or are checkpoints that the
reader names in checkpoints.yaml. What a row and a column are depends on the scale:

    digits   embedded data, a laptop
    small    CIFAR-10 and the data packs, one GPU
    paper    ImageNet and the published recipes, or released weights

Keys that no field knows are refused; the nearest one is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dinobench.tables.published import Figure, Key, find_figure, matching
from pretrain.errors import UsageError, unknown_name
from pretrain.mapping import read_mapping

FOLDER = Path(__file__).parent
Scale = Literal["digits", "small", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(_Part):
    """Where a column's number comes from at one scale."""

    suite: str = Field(pattern=r"^[a-z0-9_]+@\d+$")
    """With its version: another version is another number."""
    score: str = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`digits_knn@1:top1` is short for {suite: digits_knn@1, score: top1}."""
        if isinstance(value, str):
            suite, _, score = value.partition(":")
            return {"suite": suite, "score": score}
        return value


class Column(_Part):
    """A score."""

    label: str
    at: dict[Scale, Measure]
    """Scales at which it is measured."""
    published: tuple[Key, ...] = ()
    """Suite and metric in published.csv; several where papers write them differently. Empty: no paper prints it."""
    decimals: int = Field(default=1, ge=0)
    compared: bool = True
    """Whether more is better, so that rows may be compared by it and the best may be bold."""


class RowAt(_Part):
    """What a row is at one scale, where that differs."""

    label: str | None = None
    recipe: str | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    seeds: int | None = Field(default=None, ge=1)


class Row(_Part):
    """A method, a row of an ablation, or a checkpoint."""

    label: str
    recipe: str | None = None
    """What `dinobench pretrain` takes; None: nothing here trains it."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, as on the command line."""
    only: tuple[Scale, ...] = SCALES
    """Scales at which it is trained."""
    at: dict[Scale, RowAt] = Field(default_factory=dict)
    checkpoint: str | None = None
    """Name in checkpoints.yaml; at the scale paper it stands in for a training."""
    published: tuple[Key, ...] = ()
    """What names its figures in published.csv. Several: papers that print the same checkpoint, or other columns."""
    blank: tuple[str, ...] = ()
    """Columns that have no published figure for this row."""

    def label_at(self, scale: Scale) -> str:
        """What it is called at a scale."""
        return self.at.get(scale, RowAt()).label or self.label


class TableAt(_Part):
    """How the rows of a table are trained at one scale."""

    preset: str
    seeds: int = Field(default=1, ge=1)
    """Seeds 0 to seeds - 1."""
    overrides: tuple[str, ...] = ()
    short_schedule: tuple[str, ...] = ()
    """Overrides that make the training shorter than the preset's; such a table is marked."""


DEFAULT_AT: dict[Scale, TableAt] = {
    "digits": TableAt(preset="digits"),
    "small": TableAt(preset="cifar10"),
    "paper": TableAt(preset="imagenet_vits16"),
}


class Table(_Part):
    """One definition."""

    title: str
    regenerates: str = ""
    """Paper and table; empty for a table of our own."""
    paper: Key = Key()
    """What the keys of its rows have in common: paper, table, architecture, data, epochs."""
    tolerance: float = Field(gt=0)
    """Points by which a measured figure may differ from the published one at the scale paper."""
    at: dict[Scale, TableAt] = Field(default_factory=dict)
    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    baselines: bool = False
    """Whether raw pixels, PCA and random weights are shown above the rows."""
    notes: str = ""
    """What a reader should know."""
    name: str = ""

    @model_validator(mode="after")
    def _check(self) -> Table:
        columns = [column.label for column in self.columns]
        rows = [row.label for row in self.rows]
        for kind, labels in (("columns", columns), ("rows", rows)):
            if twice := sorted({label for label in labels if labels.count(label) > 1}):
                raise ValueError(f"two {kind} are called {twice[0]!r}")
        for row in self.rows:
            for label in row.blank:
                if label not in columns:
                    raise unknown_name(f"column in blank of {row.label!r}", label, columns)
        return self

    def setting(self, scale: Scale) -> TableAt:
        """How rows are trained at a scale."""
        return self.at.get(scale, DEFAULT_AT[scale])

    def measured_columns(self, scale: Scale) -> list[Column]:
        """The columns that have a suite at a scale; none: the table has nothing to show there."""
        return [column for column in self.columns if scale in column.at]

    def suites(self, scale: Scale) -> list[str]:
        """The suites of its columns at a scale."""
        return list(dict.fromkeys(column.at[scale].suite for column in self.measured_columns(scale)))

    def figures(self, row: Row, column: Column) -> list[Figure]:
        """The published figures of a cell, one per paper that prints it; none where the definition says blank.

        Raises:
            UsageError: a key fits several figures, or none although the column is not blank, or one although it is.
        """
        keys = [key for own in row.published for key in self._keys(own, column)]
        found = [find_figure(key) for key in keys if matching(key)]
        where = f"{self.name}: {row.label!r} in {column.label!r}"
        if found and column.label in row.blank:
            raise UsageError(f"{where} is said to be blank, but published.csv has {found[0].value} ({found[0].cited})")
        if keys and not found and column.label not in row.blank:
            raise UsageError(f"{where}: {_refusal(keys[0])}; if no paper prints it, list the column in blank")
        return found

    def check_published(self) -> None:
        """Resolve every key.

        Raises:
            UsageError: as `figures`, or a key of a row fits no column at all.
        """
        for row in self.rows:
            for column in self.columns:
                self.figures(row, column)
            for own in row.published:
                keys = [key for column in self.columns for key in self._keys(own, column)]
                if not any(matching(key) for key in keys):
                    raise UsageError(
                        f"{self.name}: {row.label!r}: {_refusal(keys[0])}" if keys else f"{own}: no column"
                    )

    def _keys(self, own: Key, column: Column) -> list[Key]:
        """What names the figure of a row in a column: what the row says wins over the table, that over the column."""
        base = {**self.paper.named(), **own.named()}
        return [Key.model_validate({**published.named(), **base}) for published in column.published]


def table_names(folder: Path = FOLDER) -> list[str]:
    """The tables of a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_table(name: str, folder: Path = FOLDER) -> Table:
    """A table by name.

    Raises:
        UsageError: unknown name, unknown key (the nearest is named), wrong value.
    """
    if name not in table_names(folder):
        raise unknown_name("table", name, table_names(folder))
    path = folder / f"{name}.yaml"
    content = read_mapping(path, kind="table", holds="a table (title: ..., rows: ...)")
    try:
        return Table.model_validate({**content, "name": name})
    except ValidationError as error:
        raise UsageError(f"{path.name}: {_explain(error)}") from None


def _refusal(key: Key) -> str:
    try:
        return str(find_figure(key))
    except UsageError as error:
        return str(error)


def _explain(error: ValidationError) -> str:
    # a key that nobody knows is the reason for a field that is missing
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return str(cause)
    where = ".".join(map(str, first["loc"])) or "table"
    if first["type"] == "extra_forbidden":
        return f"{where}: {unknown_name('key', str(first['loc'][-1]), _fields(first['loc']))}"
    return f"{where}: {first['msg']}, found {first['input']!r}"


def _fields(where: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the part in which an unknown key was found."""
    parts: dict[tuple[str, ...], type[BaseModel]] = {
        (): Table,
        ("at",): TableAt,
        ("columns",): Column,
        ("columns", "at"): Measure,
        ("columns", "published"): Key,
        ("rows",): Row,
        ("rows", "at"): RowAt,
        ("rows", "published"): Key,
        ("paper",): Key,
    }
    path = tuple(str(part) for part in where[:-1] if isinstance(part, str) and part not in SCALES)
    return list(parts[path].model_fields)
