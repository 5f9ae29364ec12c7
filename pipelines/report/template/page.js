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
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
const themed = () => document.dispatchEvent(new Event("themed"));
find("#theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  try { localStorage.setItem("hardset-theme", theme()); } catch { /* a browser that keeps nothing for files */ }
  themed();
});
dark.addEventListener("change", themed);

// ---- one image ----
function picture(id, alt) {
  const at = rows.picture[id];
  if (at < 0) return make("span", { class: "none" }, "no picture here");
  const image = make("img", { src: `data:image/webp;base64,${report.pictures[at]}`, alt, decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 65 && image.naturalHeight < 65));
  return image;
}

function tile(id, lines, list) {
  const label = `${rows.key[id]}, ${className(rows.class[id])}`;
  const text = make("span", { class: "text" }, ...lines.map(([kind, words]) => make("span", { class: kind, title: words }, words)));
  return make(
    "div", { role: "listitem" },
    make("button", { class: "shot", type: "button", "data-id": id, title: label, "aria-label": `${label}: open`, onclick: () => sheet.open(id, list()) },
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
    const line = (name, value, more, title) =>
      make("tr", { title }, make("th", { scope: "row" }, name), make("td", { class: "n" }, value), make("td", {}, make("small", {}, more || "")));
    const found = scores.map((score) => {
      const value = rows.scores[score.name][id];
      const place = percentile(score.name, value);
      const inClass = rows.percentiles[`${score.name}_percentile_in_class`]?.[id];
      const more = [place == null ? null : `above ${place.toFixed(1)} %`, inClass == null ? null : `in its class ${percent(inClass)}`];
      return line(score.label, short(value), more.filter(Boolean).join(" · "), `${score.name}: ${score.meaning} (${score.direction})`);
    });
    for (const [name, values] of Object.entries(rows.predicted)) found.push(line(`prediction (${name})`, className(values[id]), values[id] === rows.label[id] ? "right" : rows.label[id] < 0 ? "" : "wrong"));
    found.push(make("tr", {}, make("th", { scope: "row" }, "shard"), make("td", { colspan: 2 }, `${rows.shard[id]}: ${report.shards[rows.shard[id]]}`)));
    found.push(make("tr", {}, make("th", { scope: "row" }, "row"), make("td", { colspan: 2 }, whole(rows.row[id]))));
    return found;
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
class Gallery {
  constructor(section, choose, lines, words) {
    Object.assign(this, { section, choose, lines, words, ids: [], shown: 0 });
    this.grid = find(".grid", section);
    this.more = find(".more", section);
    this.more.addEventListener("click", () => this.add());
    this.grid.addEventListener("keydown", (event) => this.move(event));
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
    this.grid.append(...next.map((id) => tile(id, this.lines(id), () => this.ids)));
    this.shown += next.length;
    if (!this.ids.length) this.grid.append(make("p", { class: "empty" }, "No image of this file is like that."));
    this.more.hidden = this.shown >= this.ids.length;
    find("output", this.section).textContent = this.words(this.shown, this.ids.length);
  }

  move(event) {
    const shots = [...this.grid.querySelectorAll(".shot")];
    const at = shots.indexOf(document.activeElement);
    const wide = getComputedStyle(this.grid).gridTemplateColumns.split(" ").length;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
    if (!by || at < 0 || !shots[at + by]) return;
    event.preventDefault();
    shots[at + by].focus();
  }
}

function option(value, text) { return make("option", { value }, text); }

function ranked(ids, name, highest) {
  const values = rows.scores[name];
  return ids.filter((id) => values[id] != null).sort((a, b) => (highest ? values[b] - values[a] : values[a] - values[b]) || a - b);
}

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
  const doubt = (id) => (margin?.[id] > 0 ? [["to", `→ ${className(rows.nearest[id])}`]] : []);
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
  const heads = ["Class", ["Images", "n"], ...(boxes.length ? [[`${label}, median`, "n"], ["", "box"]] : []), ...(doubted ? [["Nearer another", "n"], "Most often"] : [])];
  find("thead", table).append(make("tr", {}, ...heads.map((head) => (Array.isArray(head) ? make("th", { class: head[1] }, head[0]) : make("th", {}, head)))));
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

// ---- start ----
function strip(figure) {
  const hard = report.main ? ranked(report.gallery, report.main, true) : report.gallery;
  const ids = hard.slice(0, 18);
  find(".grid", figure).append(...ids.map((id) => tile(id, [["name", className(rows.class[id])]], () => hard)));
  find("figcaption", figure).textContent = report.main ? `The hardest by ${scoreOf.get(report.main).label}, under the class on their label.` : "Some images of this corpus.";
}

const galleryOf = (id, build) => (find(id) ? build(find(id)) : null);
const gallery = galleryOf("#gallery", mainGallery);
galleryOf("#suspects", suspectGallery);
if (find("#classes")) classTable(find("#classes"), gallery);
if (find("#strip") && report.gallery?.length) strip(find("#strip"));

const links = new Map([...document.querySelectorAll(".bar nav a")].map((link) => [link.getAttribute("href").slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) links.get(target.id)?.classList.toggle("here", isIntersecting);
}, { rootMargin: "-45% 0px -50% 0px" });
for (const section of document.querySelectorAll("main > section")) seen.observe(section);
document.documentElement.dataset.ready = "page";
