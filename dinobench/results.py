"""Results on disk: one JSON document per checkpoint and suite, per-image correctness beside it.

    <root>/evals/<suite>@<version>/<checkpoint hash>.json
    <root>/evals/<suite>@<version>/.<checkpoint hash>.lock            held while it is measured
    <root>/samples/<suite>@<version>/<checkpoint hash>.parquet        index, label, prediction, correct
    <root>/samples/<suite>@<version>/<checkpoint hash>-<table>.parquet
`root` is the run folder of the checkpoint, or the output folder for a lone file; its folder `student` (or another label
of dinobench.loading) for another network of the same file.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dinobench.files import make_folder, read_json, slug, write_bytes, write_json
from pretrain.errors import DinobenchError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
HASH_DIGITS = 16


class Result(BaseModel):
    """Scores of one suite on one checkpoint, with the receipt that says how they came about.

    Accuracies are percent, 0 to 100. `interval` is the 95 % bootstrap interval of the headline score over images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA
    suite: str = Field(pattern=r"^[^/@]+@[0-9]{1,9}$")
    """<name>@<version>"""
    suite_fingerprint: str
    protocol: str
    dataset: str
    headline: str
    scores: dict[str, float | None]
    n: int
    interval: tuple[float, float] | None
    baselines: dict[str, dict[str, float | None]]
    seed: int
    checkpoint: str
    provenance: dict[str, Any]
    receipt: dict[str, Any]
    seconds: float
    created: str
    from_cache: bool = False
    """Whether this answer came from stored work: a stored result, or stored features."""
    notes: list[str] = []
    """What a reader of the scores should know."""

    @model_validator(mode="after")
    def _check(self) -> Result:
        """What every reader takes for granted of the parts without a type of their own."""
        facts, images = self.provenance, self.receipt.get("dataset") or {}
        if self.headline not in self.scores:
            raise ValueError(f"the headline {self.headline!r} is none of its scores")
        for name in ("step", "images_seen"):
            if not isinstance(facts.get(name), int | None):
                raise ValueError(f"provenance.{name} is {facts[name]!r}, not a number")
        for name, value in (("sha256", facts.get("sha256")), ("data", self.receipt.get("data"))):
            if not isinstance(value, str | None):
                raise ValueError(f"{name} is {value!r}, not a text")
        if not isinstance(images, dict) or not all(isinstance(part, dict) for part in images.values()):
            raise ValueError("receipt.dataset does not say what the images were")
        return self

    @property
    def score(self) -> float:
        """The headline score."""
        value = self.scores[self.headline]
        return math.nan if value is None else value

    @property
    def suite_name(self) -> str:
        return self.suite.partition("@")[0]

    @property
    def version(self) -> int:
        return int(self.suite.partition("@")[2])

    def baseline(self, name: str) -> float | None:
        """The headline score of a baseline, if it has one."""
        return self.baselines.get(name, {}).get(self.headline)

    def metric(self, score: str) -> str:
        """The name of a score in MLflow."""
        return f"{self.protocol}/{self.dataset}_{score}"

    def document(self) -> dict[str, Any]:
        """What --json prints: the headline score under its own name, then the whole result."""
        return {"suite": self.suite, self.headline: self.scores[self.headline], **self.model_dump(mode="json")}


@dataclass(frozen=True)
class ResultStore:
    """The results below one folder."""

    root: Path

    def path(self, suite: str, checkpoint_sha256: str, dataset: str | None = None) -> Path:
        """Where a result lies; `dataset` when it is not the suite's own."""
        other = f"-{slug(dataset)}" if dataset else ""
        return self.root / "evals" / suite / f"{checkpoint_sha256[:HASH_DIGITS]}{other}.json"

    def lock(self, suite: str, checkpoint_sha256: str, dataset: str | None = None) -> FileLock:
        """The lock of a result, for the one process that measures it; the system frees it when that process dies.

        Raises:
            DinobenchError: we may not write here.
        """
        path = self.path(suite, checkpoint_sha256, dataset)
        make_folder(path.parent)
        return FileLock(path.with_name(f".{path.stem}.lock"))

    def find(
        self, suite: str, fingerprint: str, checkpoint_sha256: str, dataset: str | None, seed: int
    ) -> Result | None:
        """The stored result, if it was made with the same suite definition and seed."""
        path = self.path(suite, checkpoint_sha256, dataset)
        if not path.is_file():
            return None
        result = read_result(path)
        same = result.suite_fingerprint == fingerprint and result.seed == seed
        return result.model_copy(update={"from_cache": True}) if same else None

    def save(
        self,
        result: Result,
        checkpoint_sha256: str,
        dataset: str | None,
        samples: pd.DataFrame,
        tables: dict[str, pd.DataFrame],
    ) -> Path:
        """Write samples and tables, then the result: where it lies, all of it is there."""
        path = self.path(result.suite, checkpoint_sha256, dataset)
        folder = self.root / "samples" / result.suite
        for name, frame in {"": samples, **tables}.items():
            if len(frame):
                _write_parquet(folder / f"{path.stem}{'-' if name else ''}{name}.parquet", frame)
        write_json(path, result.model_dump(mode="json"))
        return path

    def all(self) -> list[Result]:
        """Every result, ordered by training step and suite."""
        results = [read_result(path) for path in sorted(self.root.glob("evals/*@*/*.json"))]
        return sorted(results, key=lambda result: (result.provenance.get("step") or 0, result.suite))

    def tables(self, result: Result) -> dict[str, pd.DataFrame]:
        """The tables stored beside a result, by name; one that cannot be read is left out."""
        import pandas as pd

        path = self.path(result.suite, str(result.provenance["sha256"]), result.receipt.get("data"))
        # those of the same checkpoint on other data have longer names that begin alike
        others = [other.stem for other in path.parent.glob(f"{path.stem}-*.json")]
        found = {}
        for file in sorted((self.root / "samples" / result.suite).glob(f"{path.stem}-*.parquet")):
            if not any(file.stem == other or file.stem.startswith(f"{other}-") for other in others):
                with contextlib.suppress(OSError, ValueError):
                    found[file.stem.removeprefix(f"{path.stem}-")] = pd.read_parquet(file)
        return found


def read_result(path: Path) -> Result:
    """A result from its file.

    Raises:
        DinobenchError: it is missing, damaged, or of a schema this version does not know.
    """
    document = read_json(path)
    try:
        if document["schema_version"] == SCHEMA:
            return Result.model_validate(document)
    except (ValidationError, KeyError, TypeError) as error:
        raise DinobenchError(
            f"{path} is not a result: it was altered or damaged; delete it to measure again"
        ) from error
    raise DinobenchError(
        f"{path} has schema {document['schema_version']}, this version of dinobench reads {SCHEMA}; "
        "delete it to measure again"
    )


def plain(value: Any) -> Any:
    """A value as JSON can hold it: no tuples, no numpy, no NaN."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _write_parquet(path: Path, frame: pd.DataFrame) -> None:
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    write_bytes(path, content.getvalue())
