// What a reader has sorted or opened stays so when a live page loads itself anew; where nothing may be kept, it does not.
function keep(name, value) {
  try {
    const place = `${location.pathname} ${name}`;
    if (value !== undefined) sessionStorage.setItem(place, value);
    return sessionStorage.getItem(place);
  } catch {
    return null;
  }
}
// Tables sort by a click on, or Enter at, the head of a column; without scripts they stand as they are.
document.querySelectorAll("table.sorts").forEach((table, place) => {
  const heads = [...table.tHead.querySelectorAll("th")];
  const sort = (column, order) => {
    const down = order === "descending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", order);
    const value = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
    const number = (row) => parseFloat(value(row).replaceAll(",", ""));
    const rows = [...table.tBodies[0].rows];
    const known = rows.filter((row) => value(row) !== "" && value(row) !== "n/a");
    const numeric = known.every((row) => !Number.isNaN(number(row)));
    known.sort((a, b) => (numeric ? number(a) - number(b) : value(a).localeCompare(value(b))));
    if (down) known.reverse();
    table.tBodies[0].append(...known, ...rows.filter((row) => !known.includes(row)));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      sort(column, order);
      keep(`sort ${place}`, `${column} ${order}`);
    });
  });
  const [column, order] = (keep(`sort ${place}`) ?? "").split(" ");
  if (order && heads[column]) sort(Number(column), order);
});
document.querySelectorAll("details").forEach((part, place) => {
  if (keep(`open ${place}`) === "true") part.open = true;
  part.addEventListener("toggle", () => keep(`open ${place}`, part.open));
});
// A live page that is not written any more says so.
for (const line of document.querySelectorAll(".live")) {
  const age = Date.now() / 1000 - Number(line.dataset.written);
  if (age > 30 + 5 * Number(line.dataset.every)) line.textContent = line.dataset.late;
}
