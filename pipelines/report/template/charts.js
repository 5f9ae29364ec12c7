"use strict";
// Charts, each drawn when it comes into sight and again when the theme or the width changes.

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const series = (number) => style(`--series-${1 + (number % 5)}`);
// plotly reads a little markup in its labels; a class may be called anything.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const narrow = () => innerWidth < 640;
const CONFIG = { displayModeBar: false, responsive: false, showTips: false };
const EXTREMES = 200; // of the likeliest label errors and of the hardest, beside the evenly spaced points of the map
const drawn = new Map(); // element -> function that draws it

function axis(title, more = {}) {
  return {
    title: title ? { text: title, font: { size: 12, color: style("--faint") }, standoff: 10 } : undefined,
    gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"),
    tickfont: { size: 11, color: style("--faint") }, ticks: "", automargin: true, fixedrange: true, zeroline: false, ...more,
  };
}

function layout(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, showlegend: false, autosize: true,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style("--soft") },
    margin: { l: 8, r: 10, t: 10, b: 8 }, hovermode: "closest", bargap: 0.06,
    hoverlabel: { bgcolor: style("--raised"), bordercolor: style("--line"), font: { color: style("--ink"), size: 12 }, align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11.5, color: style("--soft") } },
    ...more,
  };
}

const framed = { height: 320, margin: { l: 4, r: 14, t: 14, b: 4 } };

function histogram(element, score) {
  const { low, high, counts } = score.histogram;
  const width = (high - low) / counts.length;
  const at = counts.map((_, i) => low + (i + 0.5) * width);
  const total = score.histogram.count, median = score.histogram.percentiles[52];
  const doubtful = (x) => score.name === "difficulty.margin" && x > 0;
  Plotly.react(element, [{
    type: "bar", x: at, y: counts.map((count) => count / total), width,
    marker: { color: at.map((x) => style(doubtful(x) ? "--series-1" : "--series-2")), opacity: 0.85 },
    customdata: counts.map((count, i) => [short(low + i * width), short(low + (i + 1) * width), whole(count), percent(count / total)]),
    hovertemplate: "%{customdata[0]} to %{customdata[1]}<br>%{customdata[2]} images, %{customdata[3]}<extra></extra>",
  }], layout({ height: 200, bargap: 0, margin: { l: 4, r: 8, t: 6, b: 4 },
    shapes: [{ type: "line", x0: median, x1: median, yref: "paper", y0: 0, y1: 1, line: { color: style("--ink"), width: 1, dash: "dot" } }],
    xaxis: axis(plain(score.unit), { showgrid: false, nticks: 7, range: [low, high] }), yaxis: axis("", { tickformat: ".1~%", nticks: 4, rangemode: "tozero" }) }), CONFIG);
}

const charts = {
  map(element) {
    const x = rows.scores["difficulty.margin"], y = rows.scores["difficulty.rmd"];
    const spaced = report.points.filter((id) => x[id] != null && y[id] != null);
    const extreme = [...(report.suspects || []).slice(0, EXTREMES), ...ranked(report.gallery, "difficulty.rmd", true).slice(0, EXTREMES)];
    const shown = [...new Set([...spaced, ...extreme.filter((id) => x[id] != null)])];
    const fitting = spaced.filter((id) => x[id] <= 0).map((id) => y[id]).sort((a, b) => a - b);
    const hard = fitting[Math.floor(0.9 * fitting.length)];
    const groups = { rest: [], hard: [], doubt: [] };
    for (const id of shown) groups[x[id] > 0 ? "doubt" : y[id] >= hard ? "hard" : "rest"].push(id);
    const colors = { rest: style("--neutral"), hard: style("--series-2"), doubt: style("--series-1") };
    const point = (id) => `<b>${plain(rows.key[id])}</b><br>labelled ${plain(className(rows.label[id]))}${rows.nearest[id] !== rows.label[id] ? `, looks like ${plain(className(rows.nearest[id]))}` : ""}`;
    Plotly.react(element, Object.entries(groups).map(([kind, ids]) => ({
      type: "scatter", mode: "markers", x: ids.map((id) => x[id]), y: ids.map((id) => y[id]), customdata: ids, text: ids.map(point),
      marker: { size: 5, color: colors[kind], opacity: kind === "rest" ? 0.4 : 0.62, line: { width: 0 } },
      hovertemplate: "%{text}<br>margin %{x:.4~g}, rmd %{y:.4~g}<extra></extra>",
    })), layout({
      xaxis: axis("margin: doubt of the label →", { zeroline: false }), yaxis: axis("rmd: difficulty →", { zeroline: false }),
      shapes: [{ type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: style("--faint"), width: 1, dash: "dot" } }],
      height: element.clientHeight || undefined,
    }), CONFIG);
    if (!element.dataset.bound) {
      element.dataset.bound = "yes";
      element.on("plotly_click", ({ points }) => sheet.open(points[0].customdata, [...shown].sort((a, b) => x[b] - x[a])));
    }
    const pictured = shown.filter((id) => rows.picture[id] >= 0).length;
    find("#map-note").textContent = spaced.length < report.total
      ? `${whole(spaced.length)} of ${whole(report.total)} images, evenly spaced over the corpus, and the likeliest label errors and hardest images: ${whole(shown.length)} in all, ${whole(pictured)} with their picture in this file.`
      : `All ${whole(report.total)} images, ${whole(pictured)} with their picture in this file.`;
  },

  doubts(element) {
    const parts = report.trusted.tenths, color = style("--series-1");
    return Plotly.react(element, [{
      type: "bar", x: parts.map((_, i) => i + 1), y: parts.map((part) => part.error), marker: { color, opacity: 0.85 },
      error_y: { type: "data", symmetric: false, array: parts.map((part) => part.to - part.error), arrayminus: parts.map((part) => part.error - part.from), color: style("--ink"), thickness: 1, width: 0 },
      customdata: parts.map((part) => [percent(part.error), percent(part.from), percent(part.to), short(part.low), short(part.high), whole(part.count)]),
      hovertemplate: `%{customdata[0]} nearer another class<br>95 %: %{customdata[1]} to %{customdata[2]}<br>%{customdata[5]} images, ${plain(scoreOf.get(report.main).label)} %{customdata[3]} to %{customdata[4]}<extra></extra>`,
    }], layout({ ...framed,
      xaxis: axis("tenth of difficulty, the hardest at the right", { dtick: 1, showgrid: false }), yaxis: axis("share with margin above 0", { tickformat: ".0%", range: [0, 1.02] }) }), CONFIG);
  },

  shrinkage(element) {
    const { shrinkage, log_loss: losses, chosen } = report.trusted.curve;
    const at = shrinkage.indexOf(chosen);
    return Plotly.react(element, [
      { type: "scatter", mode: "lines+markers", x: shrinkage, y: losses, line: { color: style("--series-2"), width: 2 }, marker: { size: 6 }, hovertemplate: "shrinkage %{x:.3~g}<br>%{y:.4~g} nats an image<extra></extra>" },
      { type: "scatter", mode: "markers", x: at < 0 ? [] : [chosen], y: at < 0 ? [] : [losses[at]], marker: { size: 12, color: style("--series-1") }, hovertemplate: "chosen: %{x:.3~g}<br>%{y:.4~g} nats an image<extra></extra>" },
    ], layout({ ...framed,
      xaxis: axis("shrinkage towards the diagonal", { range: [-0.03, 1], showgrid: false }), yaxis: axis("log-loss of the class, nats", { tickformat: ".3~g" }) }), CONFIG);
  },

  difficulty(element) {
    const sets = evaluated().filter(([, set]) => set.by_difficulty.length > 1);
    if (!sets.length) return hide(element);
    const traces = sets.map(([name, set], number) => {
      const parts = set.by_difficulty;
      return {
        type: "scatter", mode: "lines+markers", name: plain(name), x: parts.map((_, i) => i + 1), y: parts.map((part) => part.error),
        line: { color: series(number), width: 2 }, marker: { size: 6 },
        error_y: { type: "data", symmetric: false, array: parts.map((part) => part.to - part.error), arrayminus: parts.map((part) => part.error - part.from), color: series(number), thickness: 1, width: 0 },
        customdata: parts.map((part) => [percent(part.error), percent(part.from), percent(part.to), short(part.low), short(part.high), whole(part.count)]),
        hovertemplate: `${plain(name)}: %{customdata[0]} wrong<br>95 %: %{customdata[1]} to %{customdata[2]}<br>%{customdata[5]} images, ${plain(scoreOf.get(report.main).label)} %{customdata[3]} to %{customdata[4]}<extra></extra>`,
      };
    });
    return Plotly.react(element, traces, layout({ ...framed, showlegend: sets.length > 1,
      xaxis: axis("tenth of difficulty, the hardest at the right", { dtick: 1, showgrid: false }), yaxis: axis("share wrong", { tickformat: ".0%", rangemode: "tozero" }) }), CONFIG);
  },

  risk(element) {
    const sets = evaluated(), place = new Map(sets.map(([name], number) => [name, number]));
    if (!sets.length) return hide(element);
    const line = (name, curve, color, dash) => ({
      type: "scatter", mode: "lines", name: plain(name), x: curve.coverage, y: curve.risk, line: { color, width: 2, dash },
      hovertemplate: `${plain(name)}: of the surest %{x:.1%}<br>%{y:.1%} are wrong<extra></extra>`,
    });
    const traces = [
      ...sets.map(([name, set], number) => line(name, set.risk_coverage, series(number), "solid")),
      ...Object.entries(report.trusts).map(([name, trust]) => line(`${name} (trust)`, trust.risk_coverage, series(place.get(trust.of) ?? 0), "dot")),
    ];
    return Plotly.react(element, traces, layout({ ...framed, showlegend: traces.length > 1,
      xaxis: axis("share kept, the surest first", { tickformat: ".0%", range: [0, 1.01], dtick: 0.25, showgrid: false }), yaxis: axis("share wrong of those kept", { tickformat: ".1~%", rangemode: "tozero" }) }), CONFIG);
  },

  groups(element) {
    const parts = report.groups || [];
    if (!parts.length) return hide(element);
    const sets = [...new Set(parts.map((part) => part.set))];
    const traces = sets.map((name, number) => {
      const mine = parts.filter((part) => part.set === name);
      return { type: "bar", name: plain(name), x: mine.map((part) => plain(part.part)), y: mine.map((part) => part.accuracy), marker: { color: series(number), opacity: 0.85 },
        customdata: mine.map((part) => [percent(part.accuracy), percent(part.confidence), whole(part.count)]),
        hovertemplate: "%{x}<br>accuracy %{customdata[0]}, confidence %{customdata[1]}<br>%{customdata[2]} images<extra></extra>" };
    });
    return Plotly.react(element, traces, layout({ ...framed, showlegend: sets.length > 1, barmode: "group", bargap: 0.35,
      xaxis: axis("", { type: "category", showgrid: false }), yaxis: axis("accuracy", { tickformat: ".0%", range: [0, 1] }) }), CONFIG);
  },
};

function reliability(element, name, set, number) {
  const parts = set.reliability, BINS = 15;
  const x = parts.map((part) => (part.bin + 0.5) / BINS), width = 0.92 / BINS;
  const most = Math.max(...parts.map((part) => part.count));
  const hover = parts.map((part) => [percent(part.accuracy), percent(part.confidence), whole(part.count)]);
  const template = "accuracy %{customdata[0]}<br>confidence %{customdata[1]}<br>%{customdata[2]} images<extra></extra>";
  const bars = { type: "bar", x, y: parts.map((part) => part.accuracy), width, marker: { color: series(number), opacity: 0.8 }, customdata: hover, hovertemplate: template };
  const gap = { type: "bar", x, y: parts.map((part) => part.confidence - part.accuracy), base: parts.map((part) => part.accuracy), width, marker: { color: series(number), opacity: 0.22 }, customdata: hover, hovertemplate: template };
  const counts = { type: "bar", x, y: parts.map((part) => part.count / most), width, yaxis: "y2", marker: { color: style("--neutral"), opacity: 0.6 }, customdata: hover, hovertemplate: template };
  Plotly.react(element, [bars, gap, counts], layout({ barmode: "overlay", height: 300, margin: { l: 4, r: 16, t: 6, b: 4 },
    shapes: [{ type: "line", x0: 0, x1: 1, y0: 0, y1: 1, line: { color: style("--faint"), width: 1, dash: "dot" } }],
    xaxis: axis("confidence", { range: [0, 1], dtick: 0.25, tickformat: ".0%", showgrid: false, anchor: "y2" }), yaxis: axis("accuracy", { range: [0, 1.02], tickformat: ".0%", domain: [0.24, 1] }),
    yaxis2: axis("", { domain: [0, 0.17], showticklabels: false, showgrid: false, range: [0, 1] }) }), CONFIG);
}

function severity(element, title, value, format) {
  const parts = report.severity, clean = parts.find((part) => part.kind === "none");
  const kinds = [...new Set(parts.filter((part) => part.kind !== "none").map((part) => part.kind))];
  const lines = kinds.map((kind) => [clean, ...parts.filter((part) => part.kind === kind)].filter((part) => part && value(part) != null));
  const name = (kind) => plain(kind.replaceAll("_", " "));
  const few = lines.length <= 4; // then each has its own colour
  const color = (i) => (few ? series(i + 1) : style("--neutral"));
  const traces = lines.map((line, i) => ({ type: "scatter", mode: "lines", name: name(kinds[i]), showlegend: few, x: line.map((part) => part.severity), y: line.map(value), line: { color: color(i), width: 1.25 }, opacity: 0.8, hovertemplate: `${name(kinds[i])}, severity %{x}<br>%{y:${format}}<extra></extra>` }));
  const steps = [...new Set(lines.flat().map((part) => part.severity))].sort();
  const mean = steps.map((step) => { const some = lines.flat().filter((part) => part.severity === step).map(value); return some.reduce((a, b) => a + b, 0) / some.length; });
  traces.push({ type: "scatter", mode: "lines+markers", name: few ? "mean" : "mean of the kinds", x: steps, y: mean, line: { color: style("--series-1"), width: 3 }, marker: { size: 7 }, hovertemplate: `mean of the kinds, severity %{x}<br>%{y:${format}}<extra></extra>` });
  Plotly.react(element, traces, layout({ ...framed, showlegend: true, xaxis: axis("severity", { dtick: 1, showgrid: false }), yaxis: axis(title, { tickformat: format }) }), CONFIG);
}

const evaluated = () => Object.entries(report.sets || {}).filter(([, set]) => set);
const hide = (element) => { element.hidden = true; element.closest(".card").hidden = true; drawn.delete(element); };

// ---- when to draw ----
async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

let loaded; // promised once somebody asked
function loadPlotly() {
  loaded ??= unpacked(find("#plotly").textContent).then((source) => document.head.append(make("script", {}, source)));
  return loaded;
}

async function drawFirst(element) {
  near.unobserve(element);
  await loadPlotly();
  element.dataset.drawn = "yes";
  drawn.get(element)();
}

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) drawFirst(target);
}, { rootMargin: "1000px 0px" }); // not at once: reading plotly in would hold up the first clicks

function later(element, draw) {
  drawn.set(element, () => draw(element));
  near.observe(element);
}

function card(parent, heading, remark, about, kind, draw) {
  const chart = make("figure", { class: `chart ${kind}` });
  parent.append(make("article", { class: "card" }, make("h3", {}, make("span", {}, heading), make("small", {}, remark)), about && make("p", {}, about), chart));
  later(chart, draw);
}

for (const element of document.querySelectorAll("[data-chart]")) later(element, charts[element.dataset.chart]);
if (find("#histograms")) {
  for (const score of scores) {
    const about = [score.meaning, score.direction].filter(Boolean).join("; ");
    card(find("#histograms"), score.label, `median ${short(score.histogram.percentiles[52])}`, about || "\u00a0", "", (element) => histogram(element, score));
  }
}
if (find("#reliability")) {
  evaluated().forEach(([name, set], number) => card(find("#reliability"), name, `ECE ${percent(set.ece)}`, "Accuracy by confidence; pale is the gap between them, the dots where there is none. Below, how many.", "reliable", (element) => reliability(element, name, set, number)));
}
if (find("#severities")) {
  const add = (heading, title, value, format) => {
    if (!report.severity.some((part) => value(part) != null)) return;
    card(find("#severities"), heading, "", null, "", (element) => severity(element, title, value, format));
  };
  if (report.main) add(`Mean ${scoreOf.get(report.main).label}`, plain(scoreOf.get(report.main).label), (part) => part.mean, ".4~g");
  for (const [name] of evaluated()) add(`Accuracy of ${name}`, "accuracy", (part) => part.accuracy[name], ".0%");
}

let width = innerWidth, waiting;
const again = () => { for (const [element, draw] of drawn) if (element.dataset.drawn && !element.hidden) draw(); };
document.addEventListener("themed", again);
addEventListener("resize", () => {
  if (innerWidth === width) return; // on a phone the height changes while scrolling
  clearTimeout(waiting);
  waiting = setTimeout(() => { width = innerWidth; again(); }, 150);
});
document.documentElement.dataset.ready = "charts";
