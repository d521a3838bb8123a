from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench.files import read_json
from dinobench.page.contents import collect_page
from dinobench.page.render import render

EVIL = "<script>alert('1')</script>"


@pytest.fixture(scope="module")
def html(results: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of committed results, where no run is."""
    return render(collect_page([], tmp_path_factory.mktemp("empty") / "runs", results=results))


@pytest.fixture(scope="module")
def committed(html: str, parse: Callable[[str], Any]) -> Any:
    return parse(html)


@pytest.fixture
def show(measurer: Any, parse: Callable[[str], Any]) -> Callable[..., Any]:
    """The page of a query among the runs, taken apart."""

    def page(*query: str, **options: Any) -> Any:
        return parse(render(collect_page(query, measurer.output, **options)))

    return page


def test_published_and_measured_stand_side_by_side(committed: Any, results: Path) -> None:
    lines = (results / "tables" / "digits" / "dino_table7.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| DINO |")]
    dino = committed.table("kNN published", "kNN measured").row("DINO")
    assert dino["kNN published"] == "72.8"
    assert "±" in dino["kNN measured"]
    assert list(dino.values())[:-1] == [cell.strip() for cell in line.strip("|").split("|")][:-1]


def test_scores_of_records_stand_in_a_table_per_suite(committed: Any, results: Path) -> None:
    records = [read_json(results / "digits" / "records" / f"dino-s{seed}.json") for seed in (0, 1)]
    mean = sum(record["results"]["digits_clusters@1"]["scores"]["nmi"] for record in records) / 2
    pixels = read_json(results / "digits" / "records" / "baselines.json")["digits_clusters@1"]["raw_pixels"]["nmi"]
    dino = committed.table("nmi", "sd over seeds").row("dino")
    assert (dino["nmi"], dino["raw pixels"]) == (f"{mean:.1f}", f"{pixels:.1f}")
    assert (dino["seeds"], dino["receipts"]) == ("2", "s0 s1")
    assert dino["95 % interval"] == "-"  # two seeds carry no claim about a method
    assert committed.table("nmi", "sd over seeds").row("byol")["95 % interval"].endswith("over images")


def test_a_receipt_says_what_a_score_was_made_from(committed: Any, results: Path) -> None:
    record = read_json(results / "digits" / "records" / "dino-s1.json")
    made, provenance = record["receipt"], record["provenance"]
    facts = [provenance["sha256"], provenance["recipe_hash"], made["code"]["commit"], "torch 2."]
    facts += [made["dataset"]["test"]["fingerprint"], "digits_knn@1", "dinobench table --retrain"]
    for fact in facts:
        assert fact in committed.text


def test_a_table_links_the_receipts_on_the_page(html: str, results: Path) -> None:
    step = read_json(results / "digits" / "records" / "byol-s0.json")["provenance"]["step"]
    (row,) = re.findall(r"<td>BYOL</td>.*?</tr>", html, flags=re.S)
    (anchor,) = re.findall(r'<a href="#(receipt-\d+)">s0</a>', row)
    assert f'<details id="{anchor}"><summary>byol, seed 0, step {step}</summary>' in html
    # the records of the other seeds are not on the page
    assert re.findall(r'<span title="([^"]+)">s1</span>', row) == ["../../digits/records/byol-s1.json"]


def test_nothing_is_loaded_from_anywhere(committed: Any) -> None:
    tags = {tag for tag, _ in committed.elements}
    assert not tags & {"iframe", "object", "embed", "base", "form", "svg", "video", "audio", "source"}
    for _, attributes in committed.elements:
        assert not set(attributes) & {"srcset", "style", "background", "poster", "ping"}
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    assert [link["rel"] for link in committed.all("link")] == ["icon"]
    assert not re.search(r"@import|url\(|https?:", committed.style + committed.script)
    assert not re.search(r"fetch|XMLHttpRequest|WebSocket|import\(|eval|innerHTML", committed.script)
    assert all("src" not in attributes for attributes in committed.all("script"))


def test_the_policy_allows_this_style_and_script_alone(committed: Any) -> None:
    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    (policy,) = [meta["content"] for meta in committed.all("meta") if "http-equiv" in meta]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["style-src"] == hashed(committed.style)
    assert rules["script-src"] == hashed(committed.script)


def test_every_link_leads_somewhere(committed: Any) -> None:
    places = [attributes["id"] for _, attributes in committed.elements if "id" in attributes]
    links = {attributes["href"] for attributes in committed.all("a")}
    assert len(places) == len(set(places))
    assert links <= {f"#{place}" for place in places}
    assert {"#comparison", "#receipts", "#tables", "#receipt-1"} <= links


def test_figures_are_in_the_page(committed: Any, results: Path) -> None:
    figures = committed.figures()
    assert (results / "tables" / "digits" / "dino_table7.png").read_bytes() in figures
    (curves,) = [figure for figure in figures if figure.startswith(b"<svg")]
    assert len(curves) > 10_000
    assert all(attributes["alt"] for attributes in committed.all("img"))


def test_the_same_results_give_the_same_bytes(html: str, results: Path, tmp_path: Path) -> None:
    assert render(collect_page([], tmp_path / "runs", results=results)) == html


def test_light_and_dark_follow_the_reader(committed: Any) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", committed.style, flags=re.S)
    assert "@media (prefers-color-scheme: dark)" in committed.style
    tokens = [set(re.findall(r"(--\w+):", part)) for part in (light, dark)]
    assert tokens[0] == tokens[1] == set(re.findall(r"var\((--\w+)\)", committed.style))
    # no colour beside the tokens, but for the paper under figures
    rules = re.sub(r":root \{.*?\}", "", committed.style, flags=re.S)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", rules)) == {"#ffffff"}


def test_every_table_sorts_and_says_what_it_sorts_by(committed: Any) -> None:
    assert committed.all("table")
    assert all(attributes["class"] == "sortable" for attributes in committed.all("table"))
    assert committed.elements.count(("table", {"class": "sortable"})) == len(committed.tables)
    values = [float(cell["data-value"]) for cell in committed.all("td") if cell.get("data-value")]
    assert len(values) > 20


def test_runs_are_shown_with_statistics_and_figures(measurer: Any, show: Callable[..., Any]) -> None:
    runs = [measurer.run("dino", seed, 80.0 + seed) for seed in range(5)]
    runs += [measurer.run("dino_vmf", seed, 90.0 + seed / 2) for seed in range(5)]
    run = runs[-1]
    (run.figures / "loss.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><g/></svg>')
    page = show("suite=digits_knn")
    dino = page.table("top1", "sd over seeds").row("dino")
    assert (dino["top1"], dino["seeds"], dino["step"], dino["raw pixels"]) == ("82.0", "5", "40", "97.8")
    assert dino["95 % interval"].endswith("over seeds")
    pair = page.table("Holm p").row("digits_knn@1")
    assert (pair["first"], pair["second"], pair["first minus second"]) == ("dino", "dino_vmf", "-9.0")
    assert "digits_knn@1: dino_vmf is better than every other method here." in page.text
    assert f"runs/{run.name}/evals/digits_knn@1/" in page.text
    assert "dinobench verify runs/" in page.text
    assert b'<svg xmlns="http://www.w3.org/2000/svg"><g /></svg>' in page.figures()
    assert str(measurer.output) not in page.text  # the page goes to other machines


def test_what_a_user_wrote_is_shown_as_text(
    measurer: Any, results: Path, tmp_path: Path, show: Callable[..., Any]
) -> None:
    run = measurer.run("dino", 0, 80.0, overrides=(f"tracking.label={json.dumps(EVIL)}",))
    measurer.measure(run, 0, 80.0, 40, notes=[f"note {EVIL}"], created=EVIL)
    measurer.run("dino_vmf", 0, 90.0)
    folder = shutil.copytree(results, tmp_path / "results")
    markdown = f"# {EVIL}\n\n[press](javascript:alert(1)) <https://example.org/x> ![out](../../../secret.png)\n"
    (folder / "tables" / "digits" / "mine.md").write_text(markdown)
    (folder / "tables" / "digits" / "bare.csv").write_text(f'a,b\n"{EVIL}",1\n')
    shutil.copy(results / "tables" / "digits" / "dino_table7.png", tmp_path / "secret.png")
    page = show(results=folder)
    assert len(page.all("script")) == 1
    assert "alert" not in page.script
    assert page.text.count(EVIL) > 5
    assert page.table("top1", "sd over seeds").row(EVIL)["top1"] == "80.0"
    assert page.table("a", "b").row(EVIL) == {"a": EVIL, "b": "1"}
    assert {attributes["href"][0] for attributes in page.all("a")} == {"#"}
    assert "[figure secret.png: left out]" in page.text


def test_other_images_make_another_table_and_no_comparison(measurer: Any, show: Callable[..., Any]) -> None:
    measurer.run("dino", 0, 80.0)
    other = measurer.run("dino_vmf", 0, 90.0, steps=())
    measurer.measure(other, 0, 90.0, 40, receipt={"dataset": {"test": {"fingerprint": "e" * 40}}})
    page = show("suite=digits_knn")
    scores = [table.rows[0][0] for table in page.tables if "top1" in table.heads]
    assert sorted(scores) == ["dino", "dino_vmf"]
    assert "Not compared: digits_knn@1: " in page.text
    assert "were measured on different test images" in page.text


def test_scores_on_unknown_images_are_shown_and_not_averaged(measurer: Any, show: Callable[..., Any]) -> None:
    for seed in range(2):
        run = measurer.run("dino", seed, 80.0 + seed, steps=())
        measurer.measure(run, seed, 80.0 + seed, 40, receipt={})
    page = show("suite=digits_knn")
    table = page.table("top1")
    assert [row[0] for row in table.rows] == ["dino s0", "dino s1"]
    assert "does not say on which images it was measured" in page.text


def test_one_run_is_a_page(measurer: Any, show: Callable[..., Any]) -> None:
    measurer.run("dino", 3, 80.0)
    page = show()
    assert page.table("top1", "sd over seeds").row("dino")["receipts"] == "s3"
    assert "Not compared: a comparison needs two" in page.text
