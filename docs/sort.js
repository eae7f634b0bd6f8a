// A click on a heading of a table sorts its rows, numbers as numbers; a second click turns the order round.
document$.subscribe(() => {
  for (const table of document.querySelectorAll("article table:not([class])")) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      button.style.cssText = "font:inherit;color:inherit;cursor:pointer";
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
        const text = (row) => row.cells[column].innerText.trim();
        const number = (row) => parseFloat(text(row).replace(/^[^\d+-]*/, ""));
        const order = (a, b) => (text(a) === "") - (text(b) === "") ||
          down * (number(a) - number(b) || text(a).localeCompare(text(b)));
        const body = table.tBodies[0];
        body.append(...[...body.rows].sort(order));
      });
    });
  }
});
