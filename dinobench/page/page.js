"use strict";
// Sorts a table by the column whose heading is pressed; without script the tables stay as they are.
// A cell sorts by data-value, else by its text: numbers before words, empty cells last in either direction.
function sortKey(row, column) {
  const cell = row.cells[column];
  const text = (cell.dataset.value ?? cell.textContent).trim();
  const number = Number.parseFloat(text.replace(/^\u2212/, "-"));
  return { empty: text === "" || text === "-", number, text };
}

function compareKeys(first, second) {
  const numbers = !Number.isNaN(first.number) - !Number.isNaN(second.number);
  if (numbers) return -numbers;
  return first.number - second.number || first.text.localeCompare(second.text, "en");
}

function sortTable(table, heading, column) {
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].map((row) => [sortKey(row, column), row]);
  rows.sort(([a], [b]) => (a.empty || b.empty ? a.empty - b.empty : sign * compareKeys(a, b)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  if (!table.tBodies.length) continue;
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    if (heading.classList.contains("unsorted")) return;
    // a button, so that the keyboard reaches it
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    if (!button.textContent.trim()) button.setAttribute("aria-label", "name");
    heading.append(button);
    button.addEventListener("click", () => sortTable(table, heading, column));
  });
}

// A link to a receipt opens it.
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
