"""Recipes, overrides, suites, tables and lists of checkpoints from YAML that somebody broke.

Time of `nox -s faults`: 2 minutes on one core for 6,000 inputs.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from dinobench import slurm
from dinobench.cli import app
from dinobench.runs import find_run
from dinobench.tables import cells, definition
from dinobench.tables.cells import data_of, read_checkpoints
from fuzzing import changed, fuzz, inputs, refused, spoilt_bytes, texts, values
from pretrain.data.datasets import open_dataset
from pretrain.training import recipe as recipes
from pretrain.training.recipe import resolve
from suites.suite import DEFINITIONS, load_suite

Count = Callable[..., None]
YAML_SNIPPETS = (
    "!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "!!timestamp x", "!!int ''", "!!int x",
    "!!float x", "!!bool x", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!null x", "!!str [a]",
    "!!map [a]", "!!seq {a: 1}", "2001-99-99", "2001-01-01", "2001-01-01 99:99:99", "1:2:3", "190:20:30.15", "0x", "0b",
    "0o8", "0x_", "_", "1__0", "1e400", ".inf", ".nan", "=", "<<", "{<<: 1}", "{<<: [1]}", "{? [a] : b}",
    "{[a]: b}", "{{a: b}: c}", "&a [*a]", "&a {b: *a}", "*a", "&a", '"\\ud800"', '"\\0"', '"\\x1b[2J"', "'", '"',
    "|", ">", "%YAML 9.9\n---", "---\n---", "- a\nb: c", "\t", "!", "!!", "!a", "!<x>", "!<tag:yaml.org,2002:int> x",
    "[" * 2000, "{a: " * 2000, "- " * 2000, "9" * 5000, "0x" + "f" * 5000, "0." + "1" * 5000, "@", "`", "\x85",
    "\u2028",
)  # fmt: skip
LAUGHS = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
"""Sixty lines that are a list of 2^60 entries to whoever walks through all of them."""


def spoilt_yaml(document: dict[str, Any]) -> SearchStrategy[bytes]:
    """A YAML file of a document that was changed, spoilt in its text, or holds what only YAML has."""
    text = yaml.safe_dump(document, sort_keys=False)
    lines = text.splitlines()

    def insert(line: int, snippet: str) -> bytes:
        key, colon, _ = lines[line].partition(":")
        middle = f"{key}: {snippet}" if colon else snippet
        return "\n".join([*lines[:line], middle, *lines[line + 1 :]]).encode("utf-8", "surrogatepass")

    def dump(changed: Any) -> bytes:
        return yaml.safe_dump(changed, allow_unicode=False, sort_keys=False).encode("utf-8", "surrogatepass")

    snippets = st.builds(insert, st.integers(0, len(lines) - 1), st.sampled_from(YAML_SNIPPETS))
    laughing = st.integers(0, len(lines) - 1).map(lambda line: f"a0: &a0 [x]\n{LAUGHS}".encode() + insert(line, "*a59"))
    return st.one_of(changed(document).map(dump), spoilt_bytes(text.encode()), snippets, laughing, snippets)


RECIPE = resolve("dino", overrides=("evaluation.suites=[]", "tracking.enabled=false")).model_dump(mode="json")
IBOT = resolve("ibot_vmf_koleo_proto").model_dump(mode="json")
KEYS = [
    ".".join(map(str, (section, *rest)))
    for section, content in RECIPE.items()
    for rest in ([(key,) for key in content] if isinstance(content, dict) else [()])
]


@pytest.mark.promise("recipe file broken by generator", "accepted and its dump is a recipe again, or exit code 2")
@pytest.mark.parametrize("document", [RECIPE, IBOT], ids=["dino", "ibot"])
@inputs(900)
def test_recipe_files(tmp_path: Path, count: Count, document: dict[str, Any], examples: int) -> None:
    file = tmp_path / "recipe.yaml"
    numbers = itertools.count()

    def use() -> None:
        recipe = resolve(str(file))
        text = recipe.to_yaml()
        (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
        assert resolve(str(tmp_path / "again.yaml")).identity == recipe.identity
        find_run(recipe, tmp_path / "runs" / str(next(numbers))).create(recipe)

    def check(content: bytes) -> None:
        file.write_bytes(content)
        refused(use, file)

    tried = fuzz(spoilt_yaml(document), check, examples)
    count("recipe files", inputs_tried=tried, inputs_handled=tried)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def known_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own recipes and tables are read once: they are not what is broken here."""
    read, load = recipes._read_yaml, cells.load_table
    seen: dict[Path, Any] = {}

    def read_once(path: Path) -> dict[str, Any]:
        if recipes.PRESETS_FOLDER.parent not in path.parents:
            return read(path)
        if path not in seen:
            seen[path] = read(path)
        return copy.deepcopy(seen[path])

    monkeypatch.setattr(recipes, "_read_yaml", read_once)
    monkeypatch.setattr(cells, "load_table", functools.cache(load))


@pytest.mark.promise("override `key=value` made by generator", "accepted, or exit code 2 with one sentence")
@inputs(1500)
@pytest.mark.usefixtures("known_files")
def test_overrides(count: Count, capsys: pytest.CaptureFixture[str], examples: int) -> None:
    keys = st.sampled_from(KEYS) | st.sampled_from([f"{key}.x" for key in KEYS]) | texts
    keys |= st.sampled_from(["model.kwargs.depth", "model.kwargs.", "model.kwargs", "model", ".", "..", "a." * 3000])
    written = values.map(lambda value: yaml.safe_dump(value, default_flow_style=True, allow_unicode=True))
    overrides = st.builds(
        lambda key, equals, value: f"{key}{equals}{value}",
        keys,
        st.sampled_from(["=", "=", "=", "==", "", " = "]),
        written | st.sampled_from(YAML_SNIPPETS) | texts,
    )

    def check(arguments: list[str]) -> None:
        # what the shell hands over has no NUL, and `--` keeps a text from being an option
        command = ["pretrain", "--dry-run", "--", "dino", *(text.replace("\0", "") for text in arguments)]
        capsys.readouterr()
        answer: list[int] = []
        refused(lambda: answer.append(app.run(command)))
        told = capsys.readouterr().err
        assert answer[0] in (0, 2), told
        assert "Traceback" not in told

    tried = fuzz(st.lists(overrides, min_size=1, max_size=3), check, examples)
    count("overrides", inputs_tried=tried, inputs_handled=tried)


def suite_documents() -> list[Any]:
    names = ("digits_knn", "imagenet_linear", "digits_prototypes", "roxford5k_retrieval", "davis2017_segmentation")
    found = [DEFINITIONS / f"{name}.yaml" for name in names]
    files = [file for file in found if file.is_file()] or sorted(DEFINITIONS.glob("*.yaml"))[:5]
    return [pytest.param(yaml.safe_load(file.read_text()), id=file.stem) for file in files]


@pytest.mark.promise("suite definition broken by generator", "accepted with a fingerprint, or exit code 2")
@pytest.mark.parametrize("document", suite_documents())
@inputs(300)
def test_suite_definitions(tmp_path: Path, count: Count, document: dict[str, Any], examples: int) -> None:
    file = tmp_path / "suite.yaml"

    def use() -> None:
        suite = load_suite(file)
        assert len(suite.fingerprint()) == 12
        suite.resolved_parameters()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        refused(use, file)

    tried = fuzz(spoilt_yaml(document), check, examples)
    count("suite definitions", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("table definition broken by generator", "accepted, or exit code 2")
@inputs(500)
def test_table_definitions(tmp_path: Path, count: Count, examples: int) -> None:
    file = tmp_path / "mine.yaml"
    document = yaml.safe_load((definition.FOLDER / "dino_table7.yaml").read_text())

    def check(content: bytes) -> None:
        file.write_bytes(content)
        refused(lambda: definition.load_table("mine", tmp_path).check_published(), file)

    tried = fuzz(spoilt_yaml(document), check, examples)
    count("table definitions", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("list of checkpoints broken by generator", "accepted, or exit code 2")
@inputs(200)
@pytest.mark.usefixtures("known_files")
def test_lists_of_checkpoints(tmp_path: Path, count: Count, examples: int) -> None:
    file = tmp_path / "checkpoints.yaml"
    names = [row.checkpoint for name in definition.table_names() for row in definition.load_table(name).rows]
    document = {name: f"{name}.pth" for name in names[:6] if name}

    def check(content: bytes) -> None:
        file.write_bytes(content)
        refused(lambda: read_checkpoints(file), file)

    tried = fuzz(spoilt_yaml(document), check, examples)
    count("lists of checkpoints", inputs_tried=tried, inputs_handled=tried)


SMALL_TEXTS = {
    "splits": lambda text: open_dataset("digits", text),
    "data sets": lambda text: open_dataset(text, "train"),
    "slurm options": lambda text: slurm.num_ranks(slurm.parse_options(text)),
    "suite names": load_suite,
    "methods": resolve,
    "presets": lambda text: resolve("dino", preset=text),
    "data of tables": lambda text: data_of([text]),
}


@pytest.mark.promise("name of a split, data set, suite, method made by generator", "accepted, or exit code 2 or 3")
@pytest.mark.parametrize("kind", SMALL_TEXTS)
@inputs(150)
@pytest.mark.usefixtures("known_files")
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Count, kind: str, examples: int) -> None:
    monkeypatch.chdir(tmp_path)
    parts = ["digits", "train", "[", "]", ":", ".", "0.5", "/", "..", "=", ",", "nodes", "gpus_per_node", "@", "~"]
    parts += ["dino", ".yaml", ".py", "folder", "npz", "imagenet", "1", "-1", "9" * 30, "٣", " ", "\n", "dino_table7"]
    glued = st.lists(st.sampled_from(parts) | texts, max_size=6).map("".join)
    tried = fuzz(glued | texts, lambda text: refused(functools.partial(SMALL_TEXTS[kind], text)), examples)
    count(kind, inputs_tried=tried, inputs_handled=tried)
