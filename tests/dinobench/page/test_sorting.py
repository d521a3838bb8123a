"""The script of the page, run by node with just as much of a document as it touches."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from dinobench.page.render import FOLDER

HARNESS = """
const { script, values, presses } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const make = (extra) => ({
  attributes: {}, listeners: {}, childNodes: [], textContent: "", dataset: {}, classList: { contains: () => false },
  getAttribute(name) { return this.attributes[name] ?? null; },
  setAttribute(name, value) { this.attributes[name] = value; },
  removeAttribute(name) { delete this.attributes[name]; },
  addEventListener(name, listener) { this.listeners[name] = listener; },
  append(...nodes) { this.childNodes = nodes; },
  ...extra,
});
const heading = make(), other = make({ attributes: { "aria-sort": "ascending" } });
const body = make({ rows: values.map((value) => ({ cells: [make(value)] })) });
body.append = (...rows) => { body.rows = rows; };
const table = { tHead: { rows: [{ cells: [heading, other] }] }, tBodies: [body] };
globalThis.document = {
  querySelectorAll: () => [table], createElement: () => make(), getElementById: () => null,
};
globalThis.location = { hash: "" };
globalThis.addEventListener = () => {};
globalThis.HTMLDetailsElement = class {};
(0, eval)(script);
const button = heading.childNodes[0];
for (let k = 0; k < presses; k++) button.listeners.click();
const order = body.rows.map((row) => row.cells[0].textContent);
const sort = heading.attributes["aria-sort"];
console.log(JSON.stringify({ order, sort, other: other.attributes, type: button.type }));
"""


def press(texts: list[str | dict[str, Any]], presses: int) -> dict[str, Any]:
    """The first column of a table after its heading was pressed some times."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    cells = [{"textContent": text} if isinstance(text, str) else text for text in texts]
    given = {"script": (FOLDER / "page.js").read_text(), "values": cells, "presses": presses}
    done = subprocess.run([node, "-e", HARNESS], input=json.dumps(given), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_numbers_sort_by_value_and_empty_cells_come_last() -> None:
    texts: list[str | dict[str, Any]] = ["95.1 ± 0.4", "", "100.0", "−3", "-", "9.2", "not run"]
    once, twice = press(texts, 1), press(texts, 2)
    assert once["order"] == ["−3", "9.2", "95.1 ± 0.4", "100.0", "not run", "", "-"]
    assert twice["order"] == ["not run", "100.0", "95.1 ± 0.4", "9.2", "−3", "", "-"]
    assert (once["sort"], twice["sort"]) == ("ascending", "descending")
    assert once["other"] == {}  # one column at a time
    assert once["type"] == "button"  # what the keyboard reaches


def test_a_cell_sorts_by_its_value_where_it_has_one() -> None:
    cells: list[str | dict[str, Any]] = [
        {"textContent": text, "dataset": {"value": value}} for text, value in (("< 0.001", "1e-9"), ("0.500", "0.5"))
    ]
    assert press([*cells, {"textContent": "0.010", "dataset": {"value": "0.01"}}], 1)["order"] == [
        "< 0.001",
        "0.010",
        "0.500",
    ]


def test_words_sort_by_the_alphabet() -> None:
    assert press(["ibot", "byol", "DINO"], 1)["order"] == ["byol", "DINO", "ibot"]
