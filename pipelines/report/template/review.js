"use strict";
// One sample after another: a person decides, this browser keeps it, a CSV file leaves. Text from the corpus is never markup.

const review = JSON.parse(document.getElementById("data").textContent);
const { samples, classes, queues, pictures } = review;
const STORE = `hardset-review ${review.id}`;
const Z = 1.959963984540054; // two-sided 95 %

const find = (selector) => document.querySelector(selector);
const named = (label) => (label == null || label < 0 ? "no class" : classes[label]);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// ---- state: a list of events, of which the last about a sample counts; undo removes the last ----
let state = { events: [], by: "", queue: queues[0]?.name, skipped: [] };
let keeps = true; // whether this browser keeps the state

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE));
    if (kept) state = { ...state, ...kept, events: kept.events.filter(({ id }) => id in samples) };
  } catch { keeps = false; }
}

function keep() {
  try { localStorage.setItem(STORE, JSON.stringify(state)); } catch { keeps = false; }
  find("#kept").textContent = keeps ? "" : "This browser keeps nothing for this file: save before you close the page.";
}

const decisions = () => new Map(state.events.map((event) => [event.id, event]));
const queue = () => queues.find(({ name }) => name === state.queue) ?? queues[0];
const current = () => {
  const made = decisions();
  return queue()?.ids.find((id) => !made.has(id) && !state.skipped.includes(id));
};

function decide(decision, label) {
  const id = current();
  if (id == null) return;
  state.events.push({ id, decision, label: label ?? samples[id].label, queue: state.queue, when: new Date().toISOString() });
  keep();
  draw();
}

function undo() {
  const last = state.events.pop();
  if (!last) return;
  if (queues.some(({ name }) => name === last.queue)) state.queue = last.queue;
  state.skipped = state.skipped.filter((id) => id !== last.id);
  keep();
  draw();
}

const does = {
  keep: () => decide("keep"),
  take: () => { const label = suggestion(); if (label != null) decide("relabel", label); },
  drop: () => decide("drop"),
  skip: () => { const id = current(); if (id != null) { state.skipped.push(id); keep(); draw(); } },
  undo,
  save,
  search: openSearch,
};

const suggestion = () => { const id = current(); return id == null ? null : samples[id].suggestion; };

// ---- one sample ----
function draw() {
  drawQueues();
  const id = current(), shown = id != null;
  find("#sample").hidden = !shown;
  find("#end").hidden = shown;
  closeSearch();
  for (const name of ["keep", "take", "search", "drop", "skip"]) find(`[data-do=${name}]`).disabled = !shown;
  find("[data-do=undo]").disabled = !state.events.length;
  if (shown) drawSample(samples[id], id);
  else find("#end").textContent = state.skipped.length ? "Nothing is left in this queue but what you skipped. Reload the page to see it again." : "Nothing is left in this queue.";
  drawState();
}

function drawSample(sample, id) {
  const frame = find("#frame");
  frame.replaceChildren(...(sample.original == null ? [image(sample.picture, sample.key)] : [
    make("figure", {}, image(sample.picture, sample.key), make("figcaption", {}, "this one")),
    make("figure", {}, image(sample.original.picture, sample.original.key), make("figcaption", {}, "the one to keep")),
  ]));
  frame.classList.toggle("two", sample.original != null);
  find("#place").textContent = `${sample.key} · shard ${sample.shard}, row ${sample.row}`;
  find("#label").textContent = named(sample.label);
  find("#suggestion").textContent = sample.suggestion == null ? "none" : named(sample.suggestion);
  find("#suggestion").closest("p").hidden = queue().name === "duplicates";
  find("[data-do=take]").disabled = sample.suggestion == null;
  find("#scores").replaceChildren(...Object.entries(sample.scores).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  find("#near").replaceChildren(...near(sample));
  find("#sample").dataset.id = id;
}

function near(sample) {
  if (!sample.near?.length) return [];
  const items = sample.near.map((one) => make("li", { class: one.label === sample.label ? "" : "other" }, image(one.picture, named(one.label)), named(one.label)));
  return [make("p", { class: "fine" }, "Its nearest neighbours, the nearest first, with their labels"), make("ul", { class: "near" }, ...items)];
}

function image(at, alt) {
  if (at == null || at < 0) return make("span", { class: "none" }, "no picture");
  return make("img", { src: `data:image/webp;base64,${pictures[at]}`, alt, decoding: "async", onload: ({ target }) => target.classList.toggle("small", Math.max(target.naturalWidth, target.naturalHeight) <= 64) });
}

function drawQueues() {
  const made = decisions();
  find("#queues").replaceChildren(...queues.map(({ name, title, ids }) => make("button", {
    type: "button", role: "tab", "aria-selected": String(name === queue().name), "data-queue": name,
    onclick: () => { state.queue = name; keep(); draw(); },
  }, `${title} ${ids.filter((id) => made.has(id)).length}/${ids.length}`)));
  find("#question").textContent = queue()?.question ?? "There is nothing to review in this run yet.";
}

// ---- what the decisions mean ----
function wilson(errors, looked) {
  if (!looked) return { rate: NaN, low: 0, high: 1 };
  const p = errors / looked, centre = p + (Z * Z) / (2 * looked), scale = 1 + (Z * Z) / looked;
  const half = Z * Math.sqrt((p * (1 - p)) / looked + (Z * Z) / (4 * looked * looked));
  return { rate: p, low: Math.max(0, (centre - half) / scale), high: Math.min(1, (centre + half) / scale) };
}

// The same as ops.review.stratified_rate: a test compares the two.
function stratified(sizes, errors, looked) {
  const total = sizes.reduce((sum, size) => sum + size, 0);
  let rate = 0, below = 0, above = 0;
  sizes.forEach((size, at) => {
    const { rate: found, low, high } = wilson(errors[at], looked[at]), p = looked[at] ? found : 0.5, share = size / total;
    rate += share * p;
    below += (share * (p - low)) ** 2;
    above += (share * (high - p)) ** 2;
  });
  return { rate, low: Math.max(0, rate - Math.sqrt(below)), high: Math.min(1, rate + Math.sqrt(above)) };
}

function estimate() {
  const made = decisions(), { strata, sizes, ids } = queues.find(({ name }) => name === "random") ?? {};
  if (!ids) return null;
  const errors = sizes.map(() => 0), looked = sizes.map(() => 0);
  ids.forEach((id, at) => {
    const event = made.get(id);
    if (!event) return;
    looked[strata[at]] += 1;
    errors[strata[at]] += event.decision !== "keep";
  });
  return { ...stratified(sizes, errors, looked), looked: looked.reduce((sum, count) => sum + count, 0) };
}

function drawState() {
  const made = decisions(), { ids = [], name } = queue() ?? {}, done = ids.filter((id) => made.has(id));
  find("#progress").value = ids.length ? done.length / ids.length : 0;
  find("#done").textContent = `${done.length} of ${ids.length} in this queue, ${made.size} decisions in all${state.skipped.length ? `, ${state.skipped.length} skipped` : ""}`;
  find("#meaning").textContent = meaning(name, done.map((id) => made.get(id)));
}

function meaning(name, events) {
  const wrong = events.filter(({ decision }) => decision !== "keep").length;
  const interval = ({ low, high }) => `95 % interval ${percent(low)} to ${percent(high)}`;
  if (name === "random") {
    const found = estimate();
    return found.looked ? `Estimated share of wrong labels in the whole corpus: ${percent(found.rate)}, ${interval(found)}, from ${found.looked} looks at samples drawn at random within ${queue().sizes.length} ranges of label_error.` : "";
  }
  if (!events.length) return "";
  const shares = wilson(wrong, events.length), share = percent(shares.rate);
  if (name === "suspects") return `Of the first ${events.length} suspects ${wrong} have a wrong label: precision ${share}, ${interval(shares)}.`;
  if (name === "hard") return `Of ${events.length} hard images ${events.length - wrong} are fair test images: ${percent(1 - shares.rate)}, ${interval({ low: 1 - shares.high, high: 1 - shares.low })}.`;
  return `Of ${events.length} samples ${wrong} are dropped or relabelled.`;
}

// ---- another class ----
let chosen = 0;
function openSearch() {
  if (current() == null) return;
  find("#search").hidden = false;
  find("#wanted").value = "";
  listClasses();
  find("#wanted").focus();
}
function closeSearch() {
  find("#search").hidden = true;
  if (document.activeElement === find("#wanted")) find("#wanted").blur();
}
function matches() {
  const text = find("#wanted").value.trim().toLowerCase();
  const starts = (name) => name.toLowerCase().startsWith(text);
  return classes.map((name, label) => ({ name, label })).filter(({ name }) => name.toLowerCase().includes(text))
    .sort((a, b) => starts(b.name) - starts(a.name) || a.label - b.label).slice(0, 50);
}
function listClasses() {
  chosen = 0;
  find("#found").replaceChildren(...matches().map(({ name, label }, at) => make("li", { role: "option", "aria-selected": String(at === chosen), onclick: () => choose(label) }, name)));
}
function move(by) {
  const items = [...find("#found").children];
  if (!items.length) return;
  chosen = (chosen + by + items.length) % items.length;
  items.forEach((item, at) => item.setAttribute("aria-selected", String(at === chosen)));
  items[chosen].scrollIntoView({ block: "nearest" });
}
function choose(label) {
  const own = samples[current()].label;
  closeSearch();
  decide(label === own ? "keep" : "relabel", label);
}
find("#wanted").addEventListener("input", listClasses);
find("#wanted").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") move(1);
  else if (event.key === "ArrowUp") move(-1);
  else if (event.key === "Escape") closeSearch();
  else if (event.key === "Enter") { const found = matches()[chosen]; if (found) choose(found.label); }
  else return;
  event.preventDefault();
  event.stopPropagation();
});
find("#search").addEventListener("submit", (event) => event.preventDefault());

// ---- the file ----
const FORMULA = /^[=+\-@\t\r]/; // a spreadsheet would run such a cell; shard and row name the sample without it
const cell = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : String(value));

function csv() {
  const lines = [["key", "shard", "row", "decision", "label", "by", "when"]];
  for (const { id, decision, label, when } of decisions().values()) {
    const { key, shard, row } = samples[id];
    lines.push([FORMULA.test(key) ? "" : key, String(shard), String(row), decision, decision === "drop" || label == null || label < 0 ? "" : review.written[label], FORMULA.test(state.by) ? "" : state.by, when]);
  }
  return lines.map((line) => line.map(cell).join(",")).join("\n") + "\n";
}

function save() {
  const address = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  make("a", { href: address, download: "decisions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// ---- keys and buttons ----
const KEYS = { k: "keep", enter: "take", c: "search", "/": "search", d: "drop", " ": "skip", u: "undo", s: "save" };
document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "q") {
    state.queue = queues[(queues.indexOf(queue()) + 1) % queues.length]?.name;
    keep();
    draw();
    return;
  }
  const action = KEYS[event.key.toLowerCase()];
  // Space and Enter press the button in focus, as everywhere.
  if (!action || (event.target instanceof HTMLButtonElement && [" ", "Enter"].includes(event.key))) return;
  event.preventDefault();
  does[action]();
});
for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", () => { does[button.dataset.do](); if (button.dataset.do !== "search") button.blur(); });
}
find("#by").addEventListener("input", ({ target }) => { state.by = target.value.trim(); keep(); });
find("#theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("hardset-theme", theme); } catch { /* a browser that keeps nothing for files */ }
});

load();
state.skipped = [];
find("#by").value = state.by;
keep();
draw();
document.documentElement.dataset.ready = "";
