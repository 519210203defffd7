"use strict";
/* State, polling, filling the page, and the keyboard. */

const address = new URL(location.href);
const TOKEN = address.searchParams.get("token") ?? "";
const POLL_MS = 1000;
const SLOWEST_POLL_MS = 5000;
const DECISIONS_KEPT = 300;
const PROBLEMS_SHOWN = 3;
const THEMES = ["system", "light", "dark"];

const view = {
  namespace: address.searchParams.get("namespace"),
  window_s: [120, 600, 3600].find((seconds) => seconds === Number(address.searchParams.get("window"))) ?? 600,
  chosen: address.searchParams.has("window"),
  paused: false,
};

/** What the server has told so far. */
const known = {
  epoch: "", look: 0, head: null, namespaces: [], devices: [], findings: [], waiters: [], memory: new Map(), load: [],
  decisions: [], copies: new Map(), models: new Map(), members: new Map(), urgent: 0, lost: 0, heardAt: 0,
};

/** The time of the server's clock now, which runs on here between two answers. */
function serverNow() {
  if (!known.head) return 0;
  const stands = view.paused || document.body.classList.contains("stale");
  return known.head.now + (stands ? 0 : Math.min(5, (performance.now() - known.heardAt) / 1000));
}

/* ---- from the server ---- */

let polling = null;
let failures = 0;
let asked = 0;

async function poll() {
  clearTimeout(polling);
  if (document.hidden || view.paused) return;
  const mine = ++asked;
  const query = new URLSearchParams({ epoch: known.epoch, look: known.look, window: view.window_s });
  if (view.namespace !== null) query.set("namespace", view.namespace);
  try {
    const answer = await fetch(`api/state?${query}`, { headers: { Authorization: `Bearer ${TOKEN}` } });
    if (mine !== asked) return;
    if (answer.status === 401 || answer.status === 403) return notice("The token is no longer valid: open the URL that `mpmm dashboard` printed last.", true);
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const said = await answer.json();
    if (mine !== asked) return;
    failures = 0;
    take(said);
  } catch (error) {
    if (mine !== asked) return;
    failures += 1;
    if (error instanceof TypeError || !known.head) notice("The dashboard's server does not answer: this is its last picture. The page continues by itself.", true);
    else notice(`This page failed: ${error.message}`, true);
  }
  polling = setTimeout(poll, Math.min(SLOWEST_POLL_MS, POLL_MS * 1.5 ** Math.min(failures, 8)));
}

function take(said) {
  known.namespaces = said.namespaces;
  showNamespaces(said);
  const state = said.state;
  if (state === null) {
    forget();
    known.head = null;
    document.body.classList.add("empty");
    notice(nothingSaid(said), false);
    return show();
  }
  document.body.classList.remove("empty");
  if (state.complete) forget();
  merge(state);
  chooseFirstWindow();
  if (said.problem === null) notice("", false);
  else notice(`${said.problem}. This is the last picture.`, true);
  show();
}

/** Begin with two minutes if little more is known, unless the user has chosen. */
function chooseFirstWindow() {
  if (view.chosen) return;
  view.chosen = true;
  const oldest = Math.min(...[...known.memory.values()].map((points) => points[0]?.[0] ?? Infinity));
  if (known.head.now - oldest < 150) view.window_s = 120;
  markWindow();
}

function nothingSaid(said) {
  if (said.problem !== null && !said.problem.startsWith("there is no namespace")) return said.problem;
  const awaited = said.namespace ?? said.only;
  return `${awaited ? `There is no namespace ${awaited}` : "There are no namespaces"} in ${said.root} yet. This page will show the first one that starts.`;
}

function forget() {
  Object.assign(known, { epoch: "", look: 0, devices: [], findings: [], urgent: 0, waiters: [], load: [], decisions: [], lost: 0 });
  for (const part of ["memory", "copies", "models", "members"]) known[part].clear();
  tagNames.clear();
  timeline.clear();
}

function merge(state) {
  const { epoch, look, head, devices, findings, urgent, waiters, lost } = state;
  Object.assign(known, { epoch, look, head, devices, findings, urgent, waiters, lost, heardAt: performance.now() });
  for (const [tag, name] of Object.entries(state.names)) tagNames.set(tag, name);
  const from_s = head.now - view.window_s;
  for (const [row, points] of Object.entries(state.memory)) {
    const all = [...(known.memory.get(row) ?? []), ...points];
    // One point from before the window, so that the line begins at the edge.
    const first = Math.max(0, all.findIndex((point) => point[0] >= from_s) - 1);
    known.memory.set(row, all.slice(first));
  }
  known.load = [...known.load, ...state.load].filter((point) => point[0] >= from_s);
  known.decisions = [...known.decisions, ...state.decisions].slice(-DECISIONS_KEPT);
  for (const part of ["copies", "models", "members"]) {
    for (const [key, row] of Object.entries(state[part].set)) known[part].set(key, row);
    for (const key of state[part].gone) known[part].delete(key);
  }
  timeline.add(state.spans);
  timeline.prune(from_s);
}

/* ---- to the page ---- */

function notice(text, stale) {
  const element = byId("notice");
  setText(element, text);
  element.hidden = !text;
  document.body.classList.toggle("stale", stale);
  showHealth();
}

function show() {
  showHealth();
  showFindings();
  showTiles();
  showDevices();
  showHost();
  showLists();
  showTable();
  drawCharts(false);
  showFoot();
}

function showNamespaces(said) {
  const select = byId("namespace");
  const options = said.namespaces.map((one) => [one.name, one.shown + (one.problem === null ? "" : " (ended)") + (one.urgent ? " ⚠" : "")]);
  if (said.namespace !== null && !said.namespaces.some((one) => one.name === said.namespace)) options.push([said.namespace, `${said.namespace} (not there)`]);
  if (!options.length) options.push(["", "no namespaces"]);
  const key = JSON.stringify(options);
  if (select.key !== key) {
    select.key = key;
    select.replaceChildren(...options.map(([name, shown]) => make("option", { value: name }, shown)));
  }
  select.value = said.namespace ?? "";
  select.disabled = options.length < 2;
}

function showHealth() {
  const pill = byId("health");
  const urgent = known.urgent;
  const stale = document.body.classList.contains("stale");
  let [text, kind] = ["all well", "good"];
  if (view.paused) [text, kind] = ["paused", "warn"];
  else if (stale) [text, kind] = ["not live", "warn"];
  else if (!known.head) [text, kind] = ["nothing there", ""];
  else if (urgent) [text, kind] = [urgent === 1 ? "1 problem" : `${urgent} problems`, "bad"];
  setText(pill, text);
  setClass(pill, `pill ${kind}`);
  document.title = `${urgent ? `(${urgent}) ` : ""}${known.head ? `${known.head.namespace} – ` : ""}mpmm`;
}

function showFindings() {
  const box = byId("findings");
  const key = JSON.stringify(known.findings.map((one) => one.text));
  if (box.key === key) return;
  box.key = key;
  box.hidden = !known.findings.length;
  const opened = new Set([...box.querySelectorAll("details[open]")].map((one) => one.className));
  const fold = (name, title, texts) => {
    const items = texts.map((text) => make("li", {}, text));
    const attributes = opened.has(name) ? { class: name, open: "" } : { class: name };
    return texts.length ? [make("details", attributes, make("summary", {}, title), make("ul", {}, ...items))] : [];
  };
  const urgent = known.findings.filter((one) => one.urgent).map((one) => one.text);
  const notes = known.findings.filter((one) => !one.urgent).map((one) => one.text);
  const shown = urgent.slice(0, PROBLEMS_SHOWN).map((text) => make("p", {}, make("b", {}, "Attention"), text));
  const more = plural(known.urgent - shown.length, "more problem");
  box.replaceChildren(...shown, ...fold("more-problems", more, urgent.slice(PROBLEMS_SHOWN)), ...fold("notes", plural(notes.length, "note"), notes));
}

function showTiles() {
  const head = known.head;
  const states = head?.states ?? {};
  const of = (state) => states[state] ?? 0;
  const say = (name, figure, note) => {
    setText(byId(`tile-${name}`), head ? figure : "–");
    setText(byId(`tile-${name}-note`), head ? note : "");
  };
  const loaded = of("active") + of("idle");
  const leases = of("leased");
  say("active", count(of("active")), leases ? `and ${plural(leases, "lease")}` : "copies");
  const suspended = of("suspended") + of("suspending") + of("resuming");
  say("loaded", count(loaded), `${count(of("idle"))} idle${suspended ? `, ${count(suspended)} suspended` : ""}`);
  say("loading", count(of("loading")), of("unloading") ? `${count(of("unloading"))} unloading` : `${plural(head?.loads ?? 0, "load")} so far`);
  say("waiting", count(head?.waiting ?? 0), head?.waiting ? `longest ${duration(head.longest_wait)}` : "no request");
  byId("tile-waiting").parentElement.classList.toggle("waiting", Boolean(head?.waiting));
  const uses = head ? head.hits + head.loads : 0;
  say("reuse", uses ? `${((head.hits / uses) * 100).toFixed(head.hits / uses > 0.995 ? 1 : 0)} %` : "–", `${count(head?.hits ?? 0)} of ${count(uses)} uses`);
  const bad = [[head?.failed_loads, "failed load"], [head?.out_of_memory, "out of memory", "out of memory"], [head?.timeouts, "time-out"]].filter(([number]) => number);
  say("evictions", count(head?.evictions ?? 0), bad.length ? bad.map(([number, one, many]) => plural(number, one, many)).join(", ") : "no failed loads");
}

/* Elements of a device are made once, and filled at each look. */
function deviceCard(row) {
  const [title, figure, bar, keys] = [make("h3"), make("span", { class: "figure" }), make("div", { class: "stack", "aria-hidden": "true" }), make("ul", { class: "keys" })];
  const parts = {};
  for (const [name, ground, word] of [["active", "hold", "in use"], ["idle", "stay", "idle"], ["other", "other", "not mpmm's"], ["reserved", "reserved", "reserved"], ["free", "free", "free"]]) {
    const segment = make("i", { class: `${ground}-ground` });
    if (name !== "free") bar.append(segment);
    const text = make("span");
    const key = make("li", {}, make("i", { class: `${ground}-ground` }), text);
    keys.append(key);
    parts[name] = { segment, key, text, word };
  }
  const limit = make("i", { class: "limit" });
  bar.append(limit);
  const canvas = make("canvas", { tabindex: "0", role: "img", "aria-describedby": "chart-keys" });
  const card = make("article", { class: "device" }, make("div", { class: "top" }, title, figure), bar, keys, canvas);
  Object.assign(card, { title_: title, figure, parts, limit, canvas });
  canvas.row = row;
  watchPointer(canvas, "memory");
  return card;
}

function showDevices() {
  const box = byId("devices");
  const cards = (box.cards ??= new Map());
  const wanted = new Set(known.devices.map((device) => String(device.row)));
  for (const [row, card] of cards) {
    if (!wanted.has(row)) {
      card.remove();
      cards.delete(row);
    }
  }
  box.dataset.count = known.devices.length;
  box.toggleAttribute("data-many", known.devices.length > 4);
  for (const device of known.devices) {
    const row = String(device.row);
    if (!cards.has(row)) {
      cards.set(row, deviceCard(row));
      box.append(cards.get(row));
    }
    fillDevice(cards.get(row), device);
  }
}

function showHost() {
  const head = known.head;
  const uses = Boolean(head && (head.suspends || head.host_mb));
  setText(byId("host-note"), uses ? `Suspended copies take ${memory(head.host_mb)} of host memory, of the ${memory(head.host_budget_mb)} allowed` : "");
  for (const key of byId("timeline-legend").querySelectorAll(".suspend, .sleep")) key.hidden = !uses;
}

function fillDevice(card, device) {
  const total = Math.max(device.total, 1);
  const used = device.used ?? 0;
  const free = device.limit - Math.max(used, device.committed ?? 0);
  const other = Math.max(0, used - device.active_mb - device.idle_mb);
  const name = `Device ${device.row}`;
  if (card.title_.textContent !== `${name} ${device.name}`) card.title_.replaceChildren(`${name} `, make("span", { title: device.uuid }, device.name));
  const share = device.limit ? ` · ${Math.round((used / device.limit) * 100)} %` : "";
  card.figure.replaceChildren(make("b", {}, device.used === null ? "not measured" : memory(used)), ` of ${memory(device.limit)}${share}`);
  card.classList.toggle("full", used > device.limit);
  const amounts = { active: Math.min(device.active_mb, used), idle: Math.min(device.idle_mb, used), other, reserved: device.reserved, free: Math.max(0, free) };
  for (const [part, { segment, key, text, word }] of Object.entries(card.parts)) {
    const amount = amounts[part] ?? 0;
    segment.style.width = `${(amount / total) * 100}%`;
    key.hidden = amount < 1 && part !== "free";
    setText(text, `${word} ${memory(amount)}`);
  }
  card.limit.style.left = `calc(${Math.min(100, (device.limit / total) * 100)}% - 1px)`;
  const alone = device.alone === null ? "" : ` ${device.alone} runs alone there, to be measured.`;
  const label = `${name}, ${device.name}: ${memory(used)} in use of a limit of ${memory(device.limit)}, ${plural(device.copies, "copy", "copies")} loaded.${alone}`;
  if (card.canvas.getAttribute("aria-label") !== label) card.canvas.setAttribute("aria-label", label);
}

function showLists() {
  const now = serverNow();
  const total = known.head?.waiting ?? 0;
  setText(byId("waiting-note"), total ? `${count(total)}, the longest for ${duration(known.head.longest_wait)}` : "");
  showWaiters(byId("waiters"), known.waiters, total, now);
  showDecisions(byId("decisions"), known.decisions, byId("category").value, now);
}

function showTable() {
  const items = known[table.which];
  const matching = table.show(items, serverNow());
  setText(byId("table-note"), matching === items.size ? count(items.size) : `${count(matching)} of ${count(items.size)}`);
}

function showFoot() {
  const head = known.head;
  if (!head) return setText(byId("foot"), "");
  const leader = head.leader === null ? "no leader" : `leader pid ${head.leader}`;
  const source = head.accounting_only ? "memory by accounting" : `memory by ${head.source}, ${duration(head.polled_ago)} ago`;
  const lost = known.lost ? `, ${plural(known.lost, "event")} overwritten unseen` : "";
  setText(byId("foot"), `${head.namespace}: up for ${duration(head.up)}, ${plural(head.members.worker ?? 0, "worker")}, ${plural(head.members.server ?? 0, "model server")}, ${leader}, ${source}${lost}`);
}

function drawCharts(anew) {
  const now = serverNow();
  const points = (row) => known.memory.get(String(row)) ?? [];
  const cards = byId("devices").cards ?? new Map();
  for (const device of known.devices) drawMemory(cards.get(String(device.row)).canvas, device, points(device.row), now, view.window_s);
  for (const [name, column, colour] of [["waiting", 1, "wait"], ["active", 2, "hold"], ["loading", 3, "load"], ["loaded", 4, "hold"]]) {
    drawSpark(byId(`spark-${name}`), known.load, column, colour, now, view.window_s);
  }
  timeline.choose(now, anew);
  timeline.draw(byId("timeline"), now, view.window_s);
  const hiddenLanes = timeline.total - timeline.chosen.length;
  const capped = hiddenLanes > 0;
  setText(byId("timeline-note"), capped ? `${count(timeline.chosen.length)} of ${count(timeline.total)} copies, those last in use.` : "");
  byId("timeline-more").hidden = !capped;
  const label = `What each copy did in the last ${duration(view.window_s)}: ${plural(timeline.total, "line")}.`;
  if (byId("timeline").getAttribute("aria-label") !== label) byId("timeline").setAttribute("aria-label", label);
}

/* ---- the cursor on the charts ---- */

function watchPointer(canvas, kind) {
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const { left, right } = canvas.plot ?? { left: 0, right: box.width };
    const x = event.clientX - box.left;
    if (x < left || x > right) return leave();
    cursor.ago = ((right - x) / (right - left)) * view.window_s;
    cursor.on = kind;
    cursor.lane = kind === "timeline" ? Math.floor((event.clientY - box.top) / canvas.plot.lane) : null;
    showTip(canvas, event.clientX, event.clientY);
  };
  const leave = () => {
    if (cursor.ago === null) return;
    cursor.ago = cursor.lane = cursor.on = null;
    byId("tip").hidden = true;
    drawCharts(false);
  };
  canvas.addEventListener("pointermove", at);
  canvas.addEventListener("pointerdown", at);
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => moveCursor(event, canvas, kind, leave));
}

function moveCursor(event, canvas, kind, leave) {
  const step = view.window_s / STEPS_OF_CURSOR;
  const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key === "Escape") return leave();
  if (!moves[event.key] || !canvas.plot || event.ctrlKey || event.metaKey || event.altKey) return;
  if (kind === "memory" && moves[event.key][1]) return;
  event.preventDefault();
  const [ago, lane] = moves[event.key];
  cursor.on = kind;
  cursor.ago = Math.min(view.window_s, Math.max(0, (cursor.ago ?? 0) + ago));
  cursor.lane = kind === "timeline" ? Math.min(timeline.chosen.length - 1, Math.max(0, (cursor.lane ?? 0) + lane)) : null;
  const box = canvas.getBoundingClientRect();
  const { left, right } = canvas.plot;
  const y = kind === "timeline" ? cursor.lane * canvas.plot.lane + 12 : 30;
  showTip(canvas, box.left + right - (cursor.ago / view.window_s) * (right - left), box.top + y);
}

function showTip(canvas, x, y) {
  const now = serverNow();
  const time_s = now - cursor.ago;
  const when = new Date((known.head.wall - (known.head.now - time_s)) * 1000).toLocaleTimeString();
  const lines = [`${when}, ${duration(cursor.ago)} ago`];
  if (cursor.on === "memory") {
    const points = (known.memory.get(canvas.row) ?? []).filter((point) => point[0] <= time_s + 0.5);
    const point = points[points.length - 1];
    if (point) lines.push(`${memory(point[1])} in use`, ...(point[2] > point[1] + 1 ? [`${memory(point[2])} with what is reserved`] : []));
    else lines.push("not measured yet");
  } else {
    const name = timeline.chosen[cursor.lane];
    if (name !== undefined) {
      const tag = tagOf(name);
      lines[0] = `${shownTag(tag)} · ${lines[0]}`;
      if (tagNames.has(tag)) lines.push(tag);
      const slack_s = view.window_s / 600;
      const spans = timeline.at(cursor.lane, time_s, now, slack_s).slice(0, 3);
      lines.push(...(spans.length ? spans.map((span) => spanSaid(span, now)) : ["not loaded"]));
    }
  }
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line) => make("p", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
  drawCharts(false);
}

/* ---- what users do ---- */

function chooseNamespace(name) {
  view.namespace = name;
  remember("namespace", name);
  forget();
  poll();
}

function stepNamespace(by) {
  const names = known.namespaces.map((one) => one.name);
  if (names.length < 2) return;
  const at = names.indexOf(byId("namespace").value);
  chooseNamespace(names[(at + by + names.length) % names.length]);
}

function chooseWindow(seconds) {
  view.window_s = seconds;
  view.chosen = true;
  remember("window", seconds);
  markWindow();
  known.epoch = "";
  if (view.paused) togglePause();
  else poll();
}

function markWindow() {
  for (const button of byId("windows").children) button.setAttribute("aria-pressed", String(Number(button.dataset.window) === view.window_s));
}

/** Keep a choice in the address, so that a reload and a bookmark keep it. */
function remember(name, value) {
  address.searchParams.set(name, value);
  history.replaceState(null, "", address);
}

function togglePause() {
  view.paused = !view.paused;
  const button = byId("pause");
  button.setAttribute("aria-pressed", String(view.paused));
  button.setAttribute("aria-label", view.paused ? "Continue" : "Pause");
  showHealth();
  if (!view.paused) poll();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", `Theme: ${theme === "system" ? "same as system" : theme}`);
  try {
    localStorage.setItem("mpmm-theme", theme);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
  readColours();
  drawCharts(false);
}

function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
}

function applyFilter() {
  filter.words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  showLists();
  showTable();
  drawCharts(true);
}

function chooseTab(which, focus) {
  for (const name of ["copies", "models", "members"]) {
    const tab = byId(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === which));
    tab.tabIndex = name === which ? 0 : -1;
    if (name === which && focus) tab.focus();
  }
  table.choose(which);
  showTable();
}

function stepTab(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return;
  event.preventDefault();
  const names = ["copies", "models", "members"];
  chooseTab(names[(names.indexOf(table.which) + by + 3) % 3], true);
}

function jump(id) {
  byId(id).focus({ preventScroll: true });
  byId(id).scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth", block: "start" });
}

const SHORTCUTS = {
  "?": () => byId("help").showModal(),
  "/": () => byId("filter").focus(),
  n: () => stepNamespace(1),
  N: () => stepNamespace(-1),
  p: togglePause,
  t: nextTheme,
  1: () => chooseWindow(120),
  2: () => chooseWindow(600),
  3: () => chooseWindow(3600),
  m: () => jump("memory"),
  l: () => jump("timeline-title"),
  w: () => jump("waiting-title"),
  d: () => jump("decisions-title"),
  c: () => jump("tables-title"),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const typing = event.target.matches("input, select, textarea");
  if (event.target === byId("filter") && event.key === "Escape") {
    event.target.value = "";
    event.target.blur();
    return applyFilter();
  }
  if (typing || !SHORTCUTS[event.key]) return;
  event.preventDefault();
  SHORTCUTS[event.key]();
}

function start() {
  let theme = "system";
  try {
    theme = localStorage.getItem("mpmm-theme") ?? theme;
  } catch {
    // The browser keeps nothing.
  }
  table.start();
  setTheme(THEMES.includes(theme) ? theme : "system");
  markWindow();
  watchPointer(byId("timeline"), "timeline");
  addEventListener("keydown", onKey);
  addEventListener("resize", () => (drawCharts(false), table.draw()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (readColours(), drawCharts(false)));
  matchMedia("(max-width: 680px)").addEventListener("change", () => table.show(known[table.which], serverNow()));
  document.addEventListener("visibilitychange", poll);
  byId("namespace").addEventListener("change", (event) => chooseNamespace(event.target.value));
  byId("windows").addEventListener("click", (event) => event.target.dataset.window && chooseWindow(Number(event.target.dataset.window)));
  byId("pause").addEventListener("click", togglePause);
  byId("theme").addEventListener("click", nextTheme);
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  byId("filter").addEventListener("input", applyFilter);
  byId("category").addEventListener("change", showLists);
  byId("timeline-more").addEventListener("click", () => ((timeline.most += MORE_LANES), drawCharts(true)));
  for (const name of ["copies", "models", "members"]) {
    byId(`tab-${name}`).addEventListener("click", () => chooseTab(name, false));
    byId(`tab-${name}`).addEventListener("keydown", stepTab);
  }
  poll();
}

start();
