"use strict";
// Galleries, tables and the sheet of one image. Everything from the corpus goes in as text, never as markup.

const report = JSON.parse(document.getElementById("data").textContent);
const { rows, scores = [], classes = [] } = report;
const scoreOf = new Map(scores.map((score) => [score.name, score]));
const PAGE = innerWidth < 640 ? 12 : 40; // images added at a time

const find = (selector, root = document) => root.querySelector(selector);
const className = (number) => (number < 0 || number == null ? "no class" : classes[number]);
const whole = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1 %" : share < 1 && share > 0.9995 ? "> 99.9 %" : `${(100 * share).toFixed(1)} %`);
const short = (value) => {
  if (value == null) return "–";
  const text = Math.abs(value) >= 1000 ? whole(value) : String(Number(value.toPrecision(4)));
  return text.replace("-", "−");
};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// ---- theme ----
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.dispatchEvent(new Event("themed"));
}
find("#theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  try { localStorage.setItem("hardset-theme", document.documentElement.dataset.theme); } catch { /* a browser that keeps nothing for files */ }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ({ matches }) => setTheme(matches ? "dark" : "light"));

// ---- one image ----
function picture(id, alt) {
  const at = rows.picture[id];
  if (at < 0) return make("span", { class: "none" }, "no picture here");
  return make("img", { src: `data:image/webp;base64,${report.pictures[at]}`, alt, decoding: "async", onload: (event) => enlarge(event.target) });
}

// A small picture shows its pixels, all of one size: it is enlarged by a whole number of the screen's, or fills its frame where that would waste much.
function enlarge(image) {
  const longer = Math.max(image.naturalWidth, image.naturalHeight);
  if (longer > 64 || !image.parentElement) return; // its list may have been drawn anew meanwhile
  image.classList.add("small");
  const room = image.parentElement.clientWidth * devicePixelRatio, times = Math.floor(room / longer);
  if (times < 1 || times > 7) return;
  image.style.width = `${(times * image.naturalWidth) / devicePixelRatio}px`;
  image.style.height = `${(times * image.naturalHeight) / devicePixelRatio}px`;
}

function tile(id, lines, list, first) {
  const label = `${rows.key[id]}, ${className(rows.class[id])}`;
  const text = make("span", { class: "text" }, ...lines.map(([kind, words]) => make("span", { class: kind, title: words }, words)));
  return make(
    "div", { role: "listitem" },
    make("button", { class: "shot", type: "button", tabindex: first ? 0 : -1, "data-id": id, title: label, "aria-label": `${label}: open`, onclick: () => sheet.open(id, list()) },
      make("span", { class: "frame" }, picture(id, "")), text),
  );
}

// The share of the corpus below a value, read off the percentiles of its score.
const STEPS = [0, 0.1, 0.5, ...Array.from({ length: 99 }, (_, i) => i + 1), 99.5, 99.9, 100];
function percentile(name, value) {
  const at = scoreOf.get(name)?.histogram.percentiles;
  if (!at || value == null) return null;
  if (value <= at[0]) return 0;
  for (let i = 1; i < at.length; i++) {
    if (value <= at[i]) {
      const span = at[i] - at[i - 1];
      return STEPS[i - 1] + (span > 0 ? (value - at[i - 1]) / span : 1) * (STEPS[i] - STEPS[i - 1]);
    }
  }
  return 100;
}

const sheet = {
  element: find("#row"), list: [], at: 0, from: null,

  open(id, list) {
    this.from = document.activeElement;
    this.list = list;
    this.at = Math.max(0, list.indexOf(id));
    this.show();
    if (!this.element.open) this.element.showModal();
    find(".on", this.element).focus({ preventScroll: true });
    this.element.scrollTop = 0;
  },

  step(by) {
    const next = this.at + by;
    if (next < 0 || next >= this.list.length) return;
    this.at = next;
    this.show();
  },

  show() {
    const id = this.list[this.at];
    find(".picture", this.element).replaceChildren(picture(id, `${rows.key[id]}, ${className(rows.class[id])}`));
    find(".facts h2", this.element).textContent = rows.key[id];
    find(".verdict", this.element).replaceChildren(...this.verdict(id));
    find(".facts tbody", this.element).replaceChildren(...this.lines(id));
    find(".facts .settings", this.element).replaceChildren(...this.whereabouts(id));
    find(".steps output", this.element).textContent = `${whole(this.at + 1)} of ${whole(this.list.length)}`;
    find(".back", this.element).disabled = this.at === 0;
    find(".on", this.element).disabled = this.at === this.list.length - 1;
  },

  verdict(id) {
    const nearest = rows.nearest?.[id] ?? -1;
    if (rows.label[id] < 0) return nearest < 0 ? ["no label"] : ["no label; nearest to ", make("b", {}, className(nearest))];
    const words = ["labelled ", make("b", {}, className(rows.label[id]))];
    if (nearest >= 0 && nearest !== rows.label[id]) words.push(", looks like ", make("b", {}, className(nearest)));
    return words;
  },

  lines(id) {
    const line = (name, title, ...cells) => make("tr", { title }, make("th", { scope: "row" }, name), ...cells);
    const cell = (text) => make("td", { class: "n" }, text);
    const found = scores.map((score) => {
      const value = rows.scores[score.name][id], place = percentile(score.name, value);
      const inClass = rows.in_class[score.name]?.[id];
      return line(score.label, `${score.name}: ${score.meaning} (${score.direction})`,
        cell(short(value)), cell(place == null ? "–" : percent(place / 100)), cell(inClass == null ? "–" : percent(inClass)));
    });
    for (const [name, values] of Object.entries(rows.predicted)) {
      const outcome = rows.label[id] < 0 ? "" : values[id] === rows.label[id] ? "right" : "wrong";
      found.push(line(`prediction (${name})`, null, make("td", { class: "n", colspan: 3 }, className(values[id]), outcome && make("small", {}, ` ${outcome}`))));
    }
    return found;
  },

  whereabouts(id) {
    const entry = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
    return [entry("Shard", `${rows.shard[id]}: ${report.shards[rows.shard[id]]}`), entry("Row", whole(rows.row[id]))];
  },
};

find(".back", sheet.element).addEventListener("click", () => sheet.step(-1));
find(".on", sheet.element).addEventListener("click", () => sheet.step(1));
sheet.element.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (by) { event.preventDefault(); sheet.step(by); }
});
sheet.element.addEventListener("click", (event) => { if (event.target === sheet.element) sheet.element.close(); });
sheet.element.addEventListener("close", () => {
  // Back to where one was: the tile of the image last looked at, if it is there.
  const grid = sheet.from?.closest?.(".grid");
  (grid && find(`[data-id="${sheet.list[sheet.at]}"]`, grid) || sheet.from)?.focus?.();
});

// ---- galleries ----
// One stop of the Tab key for a whole grid; the arrow keys move within it.
function moveInside(grid) {
  grid.addEventListener("keydown", (event) => {
    const shots = [...grid.querySelectorAll(".shot")], at = shots.indexOf(document.activeElement);
    const wide = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
    if (!by || at < 0 || !shots[at + by]) return;
    event.preventDefault();
    shots[at + by].focus();
  });
  grid.addEventListener("focusin", (event) => {
    for (const shot of grid.querySelectorAll(".shot")) shot.tabIndex = shot === event.target ? 0 : -1;
  });
}

class Gallery {
  constructor(section, choose, lines, words) {
    Object.assign(this, { section, choose, lines, words, ids: [], shown: 0 });
    this.grid = find(".grid", section);
    this.more = find(".more", section);
    this.more.addEventListener("click", () => this.add());
    moveInside(this.grid);
    find("form", section).addEventListener("submit", (event) => event.preventDefault());
    find("form", section).addEventListener("change", () => this.update());
  }

  update() {
    this.ids = this.choose();
    this.shown = 0;
    this.grid.replaceChildren();
    this.add();
  }

  add() {
    const next = this.ids.slice(this.shown, this.shown + PAGE);
    this.grid.append(...next.map((id, at) => tile(id, this.lines(id), () => this.ids, this.shown + at === 0)));
    this.shown += next.length;
    if (!this.ids.length) this.grid.append(make("p", { class: "empty" }, "No image of this file is like that."));
    this.more.hidden = this.shown >= this.ids.length;
    find("output", this.section).textContent = this.words(this.shown, this.ids.length);
  }
}

function option(value, text) { return make("option", { value }, text); }

function ranked(ids, name, highest) {
  const values = rows.scores[name];
  return ids.filter((id) => values[id] != null).sort((a, b) => (highest ? values[b] - values[a] : values[a] - values[b]) || a - b);
}

// The line under a picture that says which class it looks like instead.
const doubt = (id) => (rows.scores["difficulty.margin"]?.[id] > 0 ? [["to", `→ ${className(rows.nearest[id])}`]] : []);

function mainGallery(section) {
  const form = find("form", section).elements;
  form.score.append(...scores.map((score) => option(score.name, score.label)));
  if (report.main) form.score.value = report.main;
  const there = [...new Set(report.gallery.map((id) => rows.class[id]))].filter((number) => number >= 0).sort((a, b) => a - b);
  form.class.append(option("", "all classes"), ...there.map((number) => option(number, className(number))));
  find(".classes", section).hidden = there.length < 2;
  const margin = rows.scores["difficulty.margin"];
  find(".labels", section).hidden = !report.doubted;
  const fits = (id) => !form.labels.value || (margin[id] != null && margin[id] > 0 === (form.labels.value === "doubt"));
  const choose = () => ranked(report.gallery.filter((id) => (!form.class.value || rows.class[id] === +form.class.value) && fits(id)), form.score.value, form.order.value === "high");
  const lines = (id) => [["name", className(rows.class[id])], ...doubt(id), ["value", `${scoreOf.get(form.score.value).label} ${short(rows.scores[form.score.value][id])}`]];
  const gallery = new Gallery(section, choose, lines, (shown, all) => `${whole(shown)} of ${whole(all)} pictures in this file`);
  // How many from the top are the corpus's own, not just those of this file.
  const known = () => {
    if (form.class.value) return form.score.value === report.main && (!form.labels.value || (form.labels.value === "fit" && form.order.value === "high")) ? report.each : 0;
    if (!form.labels.value) return report.exact[form.order.value][form.score.value];
    return form.labels.value === "fit" && form.order.value === "high" && form.score.value === report.main ? report.fitting : 0;
  };
  const about = () => {
    const score = scoreOf.get(form.score.value);
    const sure = Math.min(known(), gallery.ids.length);
    const first = sure ? `The first ${whole(sure)} are the first of the whole corpus; the rest are others that have their picture here.` : "Of this choice the file holds some images, not the first of the whole corpus.";
    find(".about", section).textContent = `${score.label}: ${score.meaning || "a score of this run"}${score.direction ? `; ${score.direction}` : ""}. ${first}`;
  };
  find("form", section).addEventListener("change", about);
  gallery.show = (number, order = "high") => { form.class.value = String(number); form.labels.value = ""; form.order.value = order; form.score.value = report.main || form.score.value; gallery.update(); about(); };
  gallery.update();
  about();
  return gallery;
}

function suspectGallery(section) {
  const form = find("form", section).elements;
  const fill = (select, values) => {
    const there = [...new Set(report.suspects.map((id) => values[id]))].sort((a, b) => a - b);
    select.append(option("", "any class"), ...there.map((number) => option(number, className(number))));
  };
  fill(form.given, rows.label);
  fill(form.nearest, rows.nearest);
  const fits = (id, name, values) => form[name].value === "" || values[id] === +form[name].value;
  const choose = () => report.suspects.filter((id) => fits(id, "given", rows.label) && fits(id, "nearest", rows.nearest));
  const lines = (id) => [["name", className(rows.label[id])], ["to", `→ ${className(rows.nearest[id])}`], ["value", `margin ${short(rows.scores["difficulty.margin"][id])}`]];
  const gallery = new Gallery(section, choose, lines, (shown, all) => `${whole(shown)} of ${whole(all)} shown in this file, ${whole(report.doubted)} in the corpus`);
  const buttons = report.pairs.slice(0, 8).filter(([given, nearest]) => report.suspects.some((id) => rows.label[id] === given && rows.nearest[id] === nearest));
  const press = () => { for (const button of find(".pairs", section).children) button.setAttribute("aria-pressed", button.dataset.given === form.given.value && button.dataset.nearest === form.nearest.value); };
  find(".pairs", section).append(...buttons.map(([given, nearest, count]) =>
    make("button", { type: "button", "data-given": given, "data-nearest": nearest, "aria-pressed": "false", onclick: (event) => {
      const on = event.currentTarget.getAttribute("aria-pressed") === "true";
      form.given.value = on ? "" : given;
      form.nearest.value = on ? "" : nearest;
      gallery.update();
      press();
    } }, make("b", {}, className(given)), " → ", make("b", {}, className(nearest)), ` ${whole(count)}`)));
  find("form", section).addEventListener("change", press);
  gallery.update();
  return gallery;
}

// ---- classes ----
function classTable(section, gallery) {
  const table = find("table", section), FEW = 30;
  const ranked = [...report.per_class].sort((a, b) => (b.box?.[2] ?? -Infinity) - (a.box?.[2] ?? -Infinity));
  const boxes = ranked.filter((entry) => entry.box);
  const low = Math.min(...boxes.map((entry) => entry.box[0])), high = Math.max(...boxes.map((entry) => entry.box[4]));
  const at = (value) => `${(100 * (value - low)) / (high - low || 1)}%`;
  const doubted = ranked.some((entry) => entry.doubted), label = scoreOf.get(report.main)?.label;
  const heads = ["Class", ["Images", "n"], ...(boxes.length ? [[`${label}, median`, "n"], [`${label}, spread`, "box"]] : []), ...(doubted ? [["Nearer another", "n"], "Most often"] : [])];
  find("thead", table).append(make("tr", {}, ...heads.map((head) => (Array.isArray(head) ? make("th", { class: head[1] }, head[0]) : make("th", {}, head)))));
  if (boxes.length) find("th.box", table).replaceChildren(make("div", { class: "scale" }, make("span", {}, short(low)), make("span", {}, `${label}, spread`), make("span", {}, short(high))));
  const range = (box) => {
    const span = (tag, from, to) => make(tag, { style: `left:${at(from)};width:${(100 * (to - from)) / (high - low || 1)}%` });
    return make("div", { class: "range" }, span("i", box[0], box[4]), span("b", box[1], box[3]), make("u", { style: `left:${at(box[2])}` }));
  };
  const line = (entry) => {
    const name = gallery
      ? make("button", { type: "button", onclick: () => { gallery.show(entry.class); find("#gallery").scrollIntoView(); } }, className(entry.class))
      : className(entry.class);
    const cells = [make("th", { scope: "row" }, name), make("td", { class: "n" }, whole(entry.count))];
    if (boxes.length) cells.push(make("td", { class: "n" }, entry.box ? short(entry.box[2]) : "–"), make("td", { class: "box" }, entry.box ? range(entry.box) : ""));
    if (doubted) cells.push(make("td", { class: "n" }, percent(entry.doubted / entry.count)), make("td", {}, entry.suggested == null ? "–" : className(entry.suggested)));
    return make("tr", {}, ...cells);
  };
  const more = find(".more", section);
  find("tbody", table).append(...ranked.slice(0, FEW).map(line));
  more.hidden = ranked.length <= FEW;
  more.textContent = `Show all ${whole(ranked.length)}`;
  more.addEventListener("click", () => { find("tbody", table).append(...ranked.slice(FEW).map(line)); more.hidden = true; });
}

// ---- agreement ----
function agreementTable(table) {
  const { names, spearman, kendall } = report.agreement;
  const cell = (i, j) => {
    if (i === j) return make("td", { class: "itself" });
    const value = (i > j ? spearman : kendall)[i][j];
    if (value == null) return make("td", {}, "–");
    const text = value.toFixed(2).replace(/^-0.00$/, "0.00").replace("-", "−");
    const shade = `--share: ${(50 * Math.abs(value)).toFixed(1)}%`; // at half its strength a colour still lets the text be read
    return make("td", { class: value < 0 ? "opposes" : "agrees", style: shade, title: `${names[i]} and ${names[j]}: ${i > j ? "Spearman" : "Kendall"} ${short(value)}` }, text);
  };
  table.append(
    make("thead", {}, make("tr", {}, make("td", {}), ...names.map((name) => make("th", { scope: "col" }, make("span", {}, name))))),
    make("tbody", {}, ...names.map((name, i) => make("tr", {}, make("th", { scope: "row" }, name), ...names.map((_, j) => cell(i, j))))),
  );
}

// ---- start ----
// The first screen's pictures: what the two kinds of suspects look like, and what they differ from.
function strips(parent) {
  const margin = rows.scores["difficulty.margin"], score = scoreOf.get(report.main);
  const hardest = score ? ranked(report.gallery, report.main, true) : [];
  const strip = (caption, ids) => {
    if (!ids.length) return;
    const grid = make("div", { class: "grid", role: "list" });
    grid.append(...ids.slice(0, 6).map((id, at) => tile(id, [["name", className(rows.class[id])], ...doubt(id)], () => ids, at === 0)));
    moveInside(grid);
    parent.append(make("figure", { class: "strip" }, make("figcaption", {}, caption), grid));
  };
  if (!score) strip("Some images of this corpus", report.gallery);
  strip("Labels most in doubt: given → nearest class", report.suspects || []);
  strip(`Hardest by ${score?.label}${report.doubted ? ", label fits" : ""}`, report.doubted ? hardest.filter((id) => margin[id] <= 0) : hardest);
  strip(`Easiest by ${score?.label}`, [...hardest].reverse());
}

const galleryOf = (id, build) => (find(id) ? build(find(id)) : null);
const gallery = galleryOf("#gallery", mainGallery);
galleryOf("#suspects", suspectGallery);
if (find("#classes")) classTable(find("#classes"), gallery);
if (find("#agreement")) agreementTable(find("#agreement table"));
if (find("#strips") && report.gallery?.length) strips(find("#strips"));

const links = new Map([...document.querySelectorAll(".bar nav a")].map((link) => [link.getAttribute("href").slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) links.get(target.id)?.classList.toggle("here", isIntersecting);
}, { rootMargin: "-45% 0px -50% 0px" });
for (const section of document.querySelectorAll("main > section")) seen.observe(section);
document.documentElement.dataset.ready = "page";
