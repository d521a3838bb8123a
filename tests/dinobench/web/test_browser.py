"""What a stranger sees: MLflow's pages and the HTML report in a headless browser. Pictures of all of them are kept."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PATIENCE_SECONDS = 120.0
VIEW = "workflowType=machine_learning"


class Page:
    """A page of the browser, and where its picture goes."""

    def __init__(self, browser: Any, folder: Path):
        self.browser, self.folder = browser, folder

    def open(self, address: str) -> None:
        self.browser.get("about:blank")  # MLflow's pages differ after the hash only: that alone loads nothing
        for log in ("browser", "performance"):
            self.browser.get_log(log)
        self.browser.get(address)

    def text(self) -> str:
        """All text, also of drawings; without blanks, of which some are margins."""
        return _dense(self.browser.execute_script("return document.body ? document.body.textContent : ''"))

    def shows(self, name: str, *expected: str) -> None:
        """Wait until the page has all of these texts, and keep a picture of it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (
            lacking := [text for text in expected if _dense(text) not in self.text()]
        ) and time.monotonic() < deadline:
            time.sleep(0.3)
        self.keep(name)
        assert not lacking, f"{self.browser.current_url} lacks {lacking}"

    def keep(self, name: str) -> None:
        assert self.browser.save_screenshot(str(self.folder / f"{name}.png"))

    def click(self, text: str) -> None:
        """Follow the link with this text; in this tab, where the page would open another."""
        link = self.browser.find_element("link text", text)
        self.open(link.get_attribute("href"))

    def console(self) -> list[str]:
        """Errors of the console."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """What was asked for since the page was opened."""
        entries = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]


def _dense(text: str) -> str:
    return "".join(text.split())


@pytest.fixture
def page(browser: Any, screenshots: Path) -> Page:
    return Page(browser, screenshots)


def links_of(benchmark: Any) -> dict[str, str]:
    """Name -> address, as `runs sync` of DINO with seed 0 printed them."""
    lines = [line for line in benchmark.printed[0].splitlines() if "http" in line and "/#/" in line]
    return {line[:24].strip(): line[24:].strip() for line in lines}


def test_the_list_of_experiments_names_them(page: Page, benchmark: Any) -> None:
    page.open(f"{benchmark.server}/#/experiments?{VIEW}")
    page.shows("experiments", "dinobench/pretrain", "dinobench/digits-v1", "dinobench/tables")


def test_the_page_of_models_is_a_table_of_scores(page: Page, benchmark: Any) -> None:
    page.open(links_of(benchmark)["digits-v1 models"])
    names = ["dino-s0-ep1-vit", "dino-s1-ep1-vit", "dino_vmf-s2-ep1-vit"]
    page.shows("models", *names, "one run per checkpoint", "Dataset: digits", "knn/digits_top1", "80", "82", "87.5")


def test_the_charts_show_scores_of_checkpoints_beside_baselines(page: Page, benchmark: Any) -> None:
    page.open(links_of(benchmark)["digits-v1 charts"])
    names = ["dino/s0/ep1/vit", "dino/s1/ep1/vit", "dino_vmf/s2/ep1/vit", "raw pixels", "PCA"]
    page.shows("charts", *names, "knn (1)", "prototypes (1)", "80.00", "82.00", "87.50", "97.80", "98.00")


def test_the_charts_of_pretraining_have_a_section_per_kind_of_metric(page: Page, benchmark: Any) -> None:
    page.open(links_of(benchmark)["pretrain charts"])
    page.shows("curves", "dino/s0/vit", "dino_vmf/s2/vit", "loss (1)", "knn (1)", "prototypes (1)")


def test_from_a_table_one_reaches_its_cells_and_back_from_a_checkpoint_its_training(page: Page, benchmark: Any) -> None:
    (table,) = benchmark.runs_of("dinobench/tables").values()
    where = f"{table['info']['experiment_id']}/runs/{table['info']['run_id']}"
    page.open(f"{benchmark.server}/#/experiments/{where}?{VIEW}")
    page.shows("table", "tiny/digits", "Two methods, a few steps", "DINO", "s0")
    page.click("s0")
    (training,) = benchmark.runs_of("dinobench/pretrain", "tags.`dinobench.cell` LIKE '%'").values()
    page.shows("pretraining", training["info"]["run_name"], "Finished", "digits_knn@1", "80.0")
    query = "tags.`dinobench.kind` = 'checkpoint' and params.step = '40'"
    checkpoint = benchmark.runs_of("dinobench/digits-v1", query)["dino/s0/ep1/vit"]["info"]
    page.open(f"{benchmark.server}/#/experiments/{checkpoint['experiment_id']}/runs/{checkpoint['run_id']}?{VIEW}")
    page.shows("checkpoint", "dino/s0/ep1/vit", "digits_knn@1 · dino", "80.0", "97.8", "Pretraining:")
    page.click(training["info"]["run_name"])
    page.shows("pretraining", training["info"]["run_id"])


def test_the_report_needs_no_network_and_makes_no_error(
    page: Page, benchmark: Any, dinobench: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    code, printed = dinobench("report", "--output", str(benchmark.output), "--to", str(file))
    assert code == 0, printed
    for scheme in ("light", "dark"):
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        page.open(file.as_uri())
        page.shows(f"report-{scheme}", "digits_knn@1", "dino_vmf", "81.0", "87.5")
        assert page.console() == []
        assert [url for url in page.requests() if not re.match(r"data:|blob:|about:", url)] == [file.as_uri()]
