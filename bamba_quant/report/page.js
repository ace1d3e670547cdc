// Sorts tables and switches between light and dark; without it the page is complete, only still.
"use strict";

const value = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
};

const compare = (a, b, sign) => {
  if (a === "" || b === "") return (a === "") - (b === ""); // what has no value stays below
  const [x, y] = [Number(a), Number(b)];
  if (!Number.isNaN(x) && !Number.isNaN(y)) return sign * (x - y);
  return sign * a.localeCompare(b, undefined, { numeric: true });
};

const sort = (table, column, heading) => {
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[table.tBodies.length - 1]; // the one before it has the base's row
  const sign = down ? -1 : 1;
  body.append(...[...body.rows].sort((a, b) => compare(value(a, column), value(b, column), sign)));
};

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, column, heading));
    heading.append(button);
  });
}

const toggle = document.getElementById("theme");
const root = document.documentElement;
const dark = () =>
  root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const show = () => toggle.setAttribute("aria-pressed", String(dark()));
toggle.hidden = false;
toggle.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  show();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
show();
