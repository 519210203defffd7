"use strict";
/* Waiters and decisions as lists, and the tables, of which only the rows in view are in the page. */

const WAITERS_SHOWN = 40;
const DECISIONS_SHOWN = 80;
const OVERSCAN = 6;

/* ---- lists: elements by key, kept while their item is there ---- */

/** Make a list show some items in their order. fill(element, item) writes one; rest: a last line, or "". */
function fillList(list, items, keyOf, fill, empty, rest) {
  const kept = (list.kept ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, element] of kept) {
    if (!wanted.has(key)) {
      element.remove();
      kept.delete(key);
    }
  }
  let previous = null;
  for (const item of items) {
    let element = kept.get(keyOf(item));
    if (!element) {
      element = make("li");
      kept.set(keyOf(item), element);
    }
    fill(element, item);
    const place = previous ? previous.nextSibling : list.firstChild;
    if (place !== element) list.insertBefore(element, place);
    previous = element;
  }
  const last = (list.last ??= make("li"));
  setText(last, items.length ? rest : empty);
  setClass(last, items.length ? "rest" : "empty");
  if (last.textContent) list.append(last);
  else last.remove();
}

function fillWaiter(element, waiter, now) {
  if (!element.parts) {
    const [tag, who, when, why] = [make("b"), make("span", { class: "muted" }), make("span"), make("div", { class: "why" })];
    const what = make("div", { class: "what" }, make("span", { class: "kind wait" }), tag, " ", who);
    const expected = make("span", { class: "expected" });
    element.append(what, make("div", { class: "when" }, when, expected), why);
    element.parts = { tag, who, when, why, expected };
  }
  const { tag, who, when, why, expected } = element.parts;
  setText(tag, shownTag(waiter.tag));
  setTitle(tag, fullTag(waiter.tag));
  setText(who, `pid ${waiter.pid}${waiter.urgency ? `, priority ${waiter.urgency}` : ""}`);
  setText(when, `for ${duration(now - waiter.since)}`);
  setText(expected, waiter.expected === null ? "" : ` about ${duration(waiter.expected)} more`);
  setText(why, waiter.why);
}

function fillDecision(element, decision, now) {
  if (!element.parts) {
    const what = make("div", { class: "what" }, make("span", { class: `kind ${decision.category}` }));
    const subject = make("b");
    if (decision.tag === null) what.append(subject, `: ${decision.text}`);
    else what.append(subject, ` ${decision.text} `, make("span", { class: "muted" }, `pid ${decision.pid}`));
    const when = make("div", { class: "when" });
    element.append(what, when);
    element.parts = { subject, when };
  }
  setText(element.parts.subject, decision.tag === null ? `pid ${decision.pid}` : shownTag(decision.tag));
  setTitle(element.parts.subject, decision.tag === null ? "" : fullTag(decision.tag));
  setText(element.parts.when, ago(now - decision.at));
}

function showWaiters(list, waiters, total, now) {
  const matching = waiters.filter((waiter) => passes(waiter.tag, shownTag(waiter.tag), waiter.pid, waiter.why));
  const shown = matching.slice(0, WAITERS_SHOWN);
  const left = (filter.words.length ? matching.length : total) - shown.length;
  const empty = total ? "No waiter passes the filter." : "Nothing waits.";
  fillList(list, shown, (one) => one.number, (element, one) => fillWaiter(element, one, now), empty, left > 0 ? `and ${plural(left, "more", "more")}` : "");
}

function showDecisions(list, decisions, category, now) {
  const matching = decisions.filter((one) => (!category || one.category === category) && passes(one.tag ?? "", shownTag(one.tag ?? ""), one.pid, one.text));
  const shown = matching.slice(-DECISIONS_SHOWN).reverse();
  const left = matching.length - shown.length;
  fillList(list, shown, (one) => one.number, (element, one) => fillDecision(element, one, now), "No decisions.", left > 0 ? `and ${plural(left, "earlier one")}` : "");
}

/* ---- tables ---- */

const STATE_CLASS = { active: "hold", idle: "idle", loading: "load", unloading: "unload", leased: "lease", suspending: "suspend", suspended: "sleep", resuming: "suspend" };
const STATE_WORD = { active: "in use", idle: "idle", loading: "loading", unloading: "unloading", leased: "lease", suspending: "suspending", suspended: "suspended", resuming: "resuming" };
const STATE_ORDER = { unloading: 0, suspending: 1, resuming: 2, loading: 3, active: 4, leased: 5, idle: 6, suspended: 7 };

/* A column: title, value to sort by, text to show, and how. full: the tooltip of its cells. first: the direction of the first click. */
const COLUMNS = {
  copies: [
    { title: "Model", value: (copy) => shownTag(copy.tag), text: (copy) => shownTag(copy.tag), full: (copy) => fullTag(copy.tag), name: true, width: 30 },
    { title: "State", value: (copy) => STATE_ORDER[copy.state] ?? 9, text: (copy) => [STATE_WORD[copy.state] ?? copy.state, ...copy.marks].join(", "), state: (copy) => copy.state, width: 15 },
    { title: "Held by", value: (copy) => copy.pid ?? -1, text: (copy) => (copy.pid === null ? "" : `pid ${copy.pid}`), width: 11 },
    { title: "For", value: (copy) => -copy.since, text: (copy, now) => duration(now - copy.since), number: true, width: 9, first: -1 },
    { title: "Memory", value: (copy) => copy.mb ?? 0, text: (copy) => memory(copy.mb), number: true, width: 11, first: -1 },
    { title: "Device", value: (copy) => copy.devices[0] ?? -1, text: (copy) => copy.devices.join(", "), short: (text) => `device ${text}`, width: 8 },
    { title: "Uses", value: (copy) => copy.uses, text: (copy) => count(copy.uses), number: true, width: 8, first: -1, wide: true, narrow: false },
    { title: "Lives in", value: (copy) => copy.home ?? -1, text: (copy) => (copy.home === null ? "" : `${copy.served ? "server" : "worker"} ${copy.home}`), width: 14, wide: true, narrow: false },
  ],
  models: [
    { title: "Model", value: (model) => shownTag(model.tag), text: (model) => shownTag(model.tag), full: (model) => fullTag(model.tag), name: true, width: 28 },
    { title: "Copies", value: (model) => model.loaded, text: (model) => `${model.active} of ${model.loaded} in use${model.suspended ? `, ${model.suspended} suspended` : ""}`, width: 14, first: -1 },
    { title: "Waiting", value: (model) => model.waiting, text: (model) => (model.waiting ? count(model.waiting) : ""), short: (text) => (text ? `${text} waiting` : ""), number: true, width: 8, first: -1 },
    { title: "Size", value: (model) => model.estimate ?? -1, text: (model) => (model.estimate === null ? "unknown" : memory(model.estimate)), number: true, width: 10, first: -1 },
    { title: "Loads", value: (model) => model.loads, text: (model) => count(model.loads), short: (text) => `${text} loads`, number: true, width: 8, first: -1 },
    { title: "Reuses", value: (model) => model.hits, text: (model) => count(model.hits), number: true, width: 9, first: -1, narrow: false },
    { title: "Evicted", value: (model) => model.evictions, text: (model) => count(model.evictions), number: true, width: 8, first: -1, wide: true, narrow: false },
    { title: "Load takes", value: (model) => model.load_s ?? 0, text: (model) => (model.load_s ? duration(model.load_s) : ""), number: true, width: 10, first: -1, wide: true, narrow: false },
    { title: "Hold takes", value: (model) => model.hold_s ?? 0, text: (model) => (model.hold_s ? duration(model.hold_s) : ""), number: true, width: 10, first: -1, wide: true, narrow: false },
    { title: "Last use", value: (model) => model.used ?? Infinity, text: (model, now) => (model.used === null ? "now" : ago(now - model.used)), number: true, width: 10, first: -1, wide: true, narrow: false },
  ],
  members: [
    { title: "Process", value: (member) => member.name, text: (member) => member.name || "?", name: true, width: 26 },
    { title: "Pid", value: (member) => member.pid, text: (member) => String(member.pid), short: (text) => `pid ${text}`, width: 10 },
    { title: "Role", value: (member) => member.kind, text: (member) => [member.kind, ...(member.leads ? ["leads"] : []), ...(member.alive ? [] : ["dead"])].join(", "), width: 14 },
    { title: "Holds", value: (member) => member.holds, text: (member) => (member.holds ? count(member.holds) : ""), short: (text) => (text ? `holds ${text}` : ""), number: true, width: 8, first: -1 },
    { title: "Waits for", value: (member) => member.waits, text: (member) => (member.waits ? count(member.waits) : ""), short: (text) => (text ? `waits for ${text}` : ""), number: true, width: 9, first: -1 },
    { title: "Serves", value: (member) => shownTag(member.serves), text: (member) => shownTag(member.serves), full: (member) => fullTag(member.serves), width: 22 },
    { title: "Measured", value: (member) => member.mb ?? -1, text: (member) => (member.mb === null ? "" : memory(member.mb)), number: true, width: 10, first: -1, wide: true, narrow: false },
    { title: "Attached", value: (member) => -member.since, text: (member, now) => duration(now - member.since), number: true, width: 9, first: -1, wide: true, narrow: false },
  ],
};

/** The table below the tabs. Only the rows in view are in the page, between two spacers. */
const table = {
  which: "copies",
  sorting: { copies: [1, 1], models: [0, 1], members: [2, 1] },
  rows: [],
  pool: [],

  start() {
    this.box = byId("table");
    [this.head, this.body] = [this.box.querySelector("thead"), this.box.querySelector("tbody")];
    this.above = make("tr", { class: "spacer", "aria-hidden": "true" }, make("td"));
    this.below = make("tr", { class: "spacer", "aria-hidden": "true" }, make("td"));
    this.body.append(this.above, this.below);
    this.box.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()), { passive: true });
    this.choose("copies");
  },

  choose(which) {
    this.which = which;
    this.pool.forEach((row) => row.remove());
    this.pool = [];
    this.box.scrollTop = 0;
    this.box.setAttribute("aria-labelledby", `tab-${which}`);
    const titles = COLUMNS[which].map((column, index) => {
      const button = make("button", { type: "button" }, column.title);
      button.addEventListener("click", () => this.sortBy(index));
      const cell = make("th", { scope: "col", class: this.cellClass(column) }, button);
      cell.style.width = `${column.width}%`;
      return cell;
    });
    this.head.replaceChildren(make("tr", {}, ...titles));
    this.markSorting();
  },

  sortBy(index) {
    const [column, direction] = this.sorting[this.which];
    const first = COLUMNS[this.which][index].first ?? 1;
    this.sorting[this.which] = [index, column === index ? -direction : first];
    this.markSorting();
    this.show(this.source, this.now);
  },

  markSorting() {
    const [column, direction] = this.sorting[this.which];
    [...this.head.rows[0].cells].forEach((cell, index) => {
      if (index === column) cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
  },

  cellClass(column) {
    return [column.number && "number", column.name && "name", column.wide && "wide", column.state && "state-cell", column.narrow === false && "narrow-hidden"].filter(Boolean).join(" ");
  },

  /** Show items by key; returns how many pass the filter. */
  show(items, now) {
    this.source = items;
    this.now = now;
    const columns = COLUMNS[this.which];
    const [index, direction] = this.sorting[this.which];
    const value = columns[index].value;
    const rows = [...items.values()].filter((item) => passes(item.tag ?? item.name, shownTag(item.tag ?? ""), item.serves ?? "", shownTag(item.serves ?? ""), item.state ? STATE_WORD[item.state] : item.kind, item.pid ?? "", item.home ?? ""));
    const named = columns[0].value;
    const compare = (one, other) => (one < other ? -1 : one > other ? 1 : 0);
    rows.sort((one, other) => direction * compare(value(one), value(other)) || compare(named(one), named(other)) || compare(one.since ?? 0, other.since ?? 0));
    this.rows = rows;
    this.box.querySelector("table").setAttribute("aria-rowcount", rows.length + 1);
    this.draw();
    return rows.length;
  },

  draw() {
    const height = parseFloat(getComputedStyle(this.box).getPropertyValue("--row"));
    const first = Math.max(0, Math.floor(this.box.scrollTop / height) - OVERSCAN);
    const last = Math.min(this.rows.length, Math.ceil((this.box.scrollTop + Math.max(this.box.clientHeight, 340)) / height) + OVERSCAN);
    while (this.pool.length < last - first) this.pool.push(this.newRow());
    this.pool.forEach((row, index) => {
      const item = this.rows[first + index];
      if (item === undefined || first + index >= last) return row.remove();
      if (!row.isConnected) this.body.insertBefore(row, this.below);
      row.setAttribute("aria-rowindex", first + index + 2);
      this.fill(row, item);
    });
    this.above.firstChild.style.height = `${first * height}px`;
    this.below.firstChild.style.height = `${Math.max(0, this.rows.length - last) * height}px`;
    this.above.hidden = first === 0;
    this.below.hidden = last >= this.rows.length;
  },

  newRow() {
    const row = make("tr");
    COLUMNS[this.which].forEach((column, index) => {
      const cell = make("td", { class: this.cellClass(column) });
      if (column.state) cell.append(make("span", { class: "state" }));
      if (column.name) cell.append(makeEnds());
      row.append(cell);
      // On a narrow screen a row has two lines.
      if (index === 1) row.append(make("td", { class: "break", "aria-hidden": "true" }));
    });
    row.cellsShown = [...row.cells].filter((cell) => !cell.classList.contains("break"));
    return row;
  },

  fill(row, item) {
    const narrow = matchMedia("(max-width: 680px)").matches;
    COLUMNS[this.which].forEach((column, index) => {
      const cell = row.cellsShown[index];
      let text = column.text(item, this.now);
      if (narrow && column.short) text = text && column.short(text);
      const target = column.state ? cell.firstChild : cell;
      if (column.name) setEnds(cell.firstChild, text);
      else setText(target, text);
      if (column.state) setClass(target, `state ${STATE_CLASS[column.state(item)] ?? ""}`);
      if (column.full || column.name) setTitle(cell, column.full ? column.full(item) : text);
    });
  },
};
