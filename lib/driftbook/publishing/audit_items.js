// The table of an audit's items: filtered, sorted, a page at a time, from the record in this page.
(() => {
  const record = JSON.parse(document.getElementById("record").textContent);
  const box = document.getElementById("items-box");
  if (!box || !record.items.length) return;
  const PER_PAGE = 25;
  const NAMES = {
    p_unsafe: "P(unsafe)", unsafe: "unsafe", refusal: "refuses", refused: "refused", p_refusal: "P(refusal first)", outcome: "outcome",
    letter: "letter", p_a: "P(A)", p_b: "P(B)", p_c: "P(C)", correct: "correct", finish_reason: "ended by", n_tokens: "tokens",
  };
  const KEYS = Object.keys(NAMES);
  const place = (key) => (KEYS.includes(key) ? KEYS.indexOf(key) : KEYS.length);
  const ordered = (keys) => keys.sort((a, b) => place(a) - place(b));
  const titles = Object.fromEntries(record.verdicts.map((one) => [one.area, one.title]));
  const named = (key) => (Object.hasOwn(NAMES, key) ? NAMES[key] : key.replaceAll("_", " "));
  const titled = (area) => (Object.hasOwn(titles, area) ? titles[area] : area);
  const shown = (value) => {
    if (value === null || value === undefined || value === "") return "–";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value === "number" && value !== 0 && Math.abs(value) < 0.0005) return "<0.001";
    if (typeof value === "number" && !Number.isInteger(value)) return value.toFixed(3).replace(/^(-?\d+\.\d)0+$/, "$1").replace("-", "−");
    return String(value);
  };
  const spaced = (words) => String(words ?? "").replaceAll("_", " ");
  const find = (id) => document.getElementById(id);
  const [area, category, change, search] = ["area", "category", "change", "search"].map((id) => find(`items-${id}`));
  const state = { page: 0, column: null, down: false, rows: [] };

  const options = (select, values, name) => {
    const chosen = select.value;
    select.replaceChildren(new Option(select.dataset.all, ""), ...values.map((one) => new Option(name(one), one)));
    select.value = values.includes(chosen) ? chosen : "";
  };
  const values = (rows, key) => [...new Set(rows.map((one) => one[key]).filter((one) => one !== null && one !== undefined && one !== ""))];
  const inArea = () => record.items.filter((one) => !area.value || one.area === area.value);

  // The columns: those that every area has, then, of one area, one for each detail.
  const pair = (title, of, by) => ({ title, pair: of, by });
  const details = (rows) => [...new Set(rows.flatMap((one) => [...Object.keys(one.base_detail || {}), ...Object.keys(one.candidate_detail || {})]))];
  const detail = (one, side, key) => (one[side] && Object.hasOwn(one[side], key) ? one[side][key] : null);
  const moved = (a, b) => (typeof a === "number" && typeof b === "number" ? b - a : b ?? a);
  const columns = () => {
    const found = [
      { title: "Prompt", cell: (one) => one.item },
      { title: "Area", cell: (one) => titled(one.area) },
      { title: "Category", cell: (one) => spaced(one.category) },
      { title: "Change", cell: (one) => one.change },
      pair("Score", (one) => [one.base, one.candidate].map((score) => (typeof score === "number" ? Number(score.toFixed(3)) : score))),
    ];
    if (!area.value) {
      const all = (side) => (one) => ordered(Object.keys(one[side] || {})).map((key) => `${named(key)} ${shown(one[side][key])}`).join(" · ");
      return [...found, { title: "Base", cell: all("base_detail") }, { title: "Candidate", cell: all("candidate_detail") }];
    }
    found.splice(1, 1);
    return [...found, ...ordered(details(inArea())).map((key) => pair(named(key), (one) => [detail(one, "base_detail", key), detail(one, "candidate_detail", key)]))];
  };
  const key = (column) => (one) => (column.pair ? moved(...column.pair(one)) : column.cell(one));

  const body = (table, list) => {
    const rows = state.rows.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
    table.tBodies[0].replaceChildren(...rows.map((one) => {
      const row = document.createElement("tr");
      row.setAttribute("role", "row");
      list.forEach((column, n) => {
        const cell = document.createElement(n ? "td" : "th");
        cell.setAttribute("role", n ? "cell" : "rowheader");
        if (n) cell.dataset.label = column.title;
        else cell.scope = "row";
        const words = text("span", "", cell);
        if (column.pair) {
          const [before, after] = column.pair(one);
          cell.classList.add("pair");
          if (before === null && after === null) cell.classList.add("empty");
          words.append(shown(before), " →\u00a0");
          text(shown(before) === shown(after) ? "span" : "strong", shown(after), words);
        } else words.textContent = shown(column.cell(one));
        row.append(cell);
      });
      return row;
    }));
    const pages = Math.max(1, Math.ceil(state.rows.length / PER_PAGE));
    find("items-count").textContent = `${state.rows.length.toLocaleString("en")} of ${record.items.length.toLocaleString("en")} prompts, page ${state.page + 1} of ${pages}`;
    find("items-before").disabled = state.page === 0;
    find("items-after").disabled = state.page >= pages - 1;
  };
  // Until a reader sorts, what changed comes first.
  const RANKS = ["worse", "better", "unscored", "same"];
  const rank = (one) => (RANKS.includes(one.change) ? RANKS.indexOf(one.change) : RANKS.length);
  let drawn;
  const order = () => {
    const words = search.value.trim().toLowerCase();
    state.rows = inArea().filter((one) => (!category.value || one.category === category.value) && (!change.value || one.change === change.value)
      && (!words || [one.item, one.category, one.benchmark, detail(one, "base_detail", "letter"), detail(one, "candidate_detail", "letter")].some((part) => String(part ?? "").toLowerCase().includes(words))));
    if (state.column === null) state.rows.sort((a, b) => rank(a) - rank(b));
    else {
      const by = key(drawn.list[state.column]);
      state.rows.sort((a, b) => compared(by(a), by(b), state.down));
    }
    state.page = 0;
    body(drawn.table, drawn.list);
  };
  const redraw = () => {
    const list = columns();
    const table = find("items-table");
    const head = document.createElement("tr");
    head.setAttribute("role", "row");
    list.forEach((column) => {
      const cell = text("th", column.title, head);
      cell.setAttribute("role", "columnheader");
      cell.scope = "col";
    });
    table.tHead.replaceChildren(head);
    state.column = null;
    drawn = { table, list };
    sortable(table, (column, down) => {
      Object.assign(state, { column, down });
      order();
    });
    options(category, values(inArea(), "category").sort(), spaced);
    order();
  };
  const turn = (by) => () => {
    state.page += by;
    body(drawn.table, drawn.list);
  };
  options(area, values(record.items, "area"), titled);
  options(change, values(record.items, "change"), String);
  area.addEventListener("change", redraw);
  for (const one of [category, change]) one.addEventListener("change", order);
  search.addEventListener("input", order);
  find("items-before").addEventListener("click", turn(-1));
  find("items-after").addEventListener("click", turn(1));
  box.hidden = false;
  redraw();
})();
