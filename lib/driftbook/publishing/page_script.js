"use strict";
// What the study report and the audit page do in a reader's browser: tabs, tables that sort, commands to copy.
const text = (name, words, parent) => {
  const made = document.createElement(name);
  made.textContent = words;
  if (parent) parent.append(made);
  return made;
};

// Sections in .tabs become tabs; without this script all of them are shown.
for (const box of document.querySelectorAll(".tabs")) {
  const panels = [...box.querySelectorAll(":scope > section")];
  if (panels.length < 2) continue;
  const list = document.createElement("div");
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", box.dataset.label);
  const tabs = panels.map((panel, n) => {
    const heading = panel.querySelector("h3");
    const tab = text("button", heading.textContent, list);
    tab.type = "button";
    tab.id = `${panel.id}-tab`;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    panel.tabIndex = 0;
    tab.addEventListener("click", () => show(n));
    return tab;
  });
  const show = (chosen, focus) => {
    tabs.forEach((tab, n) => {
      tab.setAttribute("aria-selected", String(n === chosen));
      tab.tabIndex = n === chosen ? 0 : -1;
      panels[n].hidden = n !== chosen;
    });
    if (focus) tabs[chosen].focus();
  };
  list.addEventListener("keydown", (event) => {
    const now = tabs.indexOf(document.activeElement);
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show((next + tabs.length) % tabs.length, true);
  });
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const n = panels.findIndex((panel) => target && panel.contains(target));
    show(Math.max(n, 0));
    if (n >= 0) target.scrollIntoView();
  };
  box.prepend(list);
  window.addEventListener("hashchange", open);
  open();
}

// Empty values come last in either direction.
const compared = (a, b, down) => {
  const none = [a, b].map((one) => one === null || one === undefined || one === "");
  if (none[0] || none[1]) return none[0] - none[1];
  const by = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return down ? -by : by;
};

// Makes the headers of a table buttons; `sort(column, down)` puts its rows in order.
const sortable = (table, sort) => {
  table.classList.add("sorted");
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const words = head.textContent;
    head.textContent = "";
    const button = text("button", words, head);
    button.type = "button";
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((one) => one.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(column, down);
    });
  });
};

for (const table of document.querySelectorAll("table[data-sortable]")) {
  const key = (row, column) => {
    const { sort } = row.cells[column].dataset;
    const words = sort === undefined ? row.cells[column].textContent : sort;
    return words !== "" && !Number.isNaN(Number(words)) ? Number(words) : words;
  };
  sortable(table, (column, down) => {
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compared(key(a, column), key(b, column), down));
    table.tBodies[0].append(...rows);
  });
}

for (const command of document.querySelectorAll("pre.command")) {
  const button = text("button", "Copy");
  button.type = "button";
  const said = text("span", "");
  said.setAttribute("role", "status");
  said.className = "small";
  command.after(button, " ", said);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command.textContent);
      said.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(command);
      said.textContent = "Selected: copy it with the keyboard.";
    }
  });
}

// On paper everything is open.
window.addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details")) closed.open = true;
});
