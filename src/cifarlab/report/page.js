// Draws the page's charts from its one block of JSON. All that comes from it is set as text, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const known = (value) => value !== null && value !== undefined;

  const element = (space) => (name, attributes = {}, ...children) => {
    const node = space ? document.createElementNS(space, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (!known(value) || value === false) continue;
      if (key === "size") node.style.fontSize = `${value}px`;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((child) => known(child) && child !== false));
    return node;
  };
  const h = element(null);
  const s = element("http://www.w3.org/2000/svg");

  // --- figures and scales -------------------------------------------------------------------------

  const percent = (value, digits = 2) => (known(value) ? `${(100 * value).toFixed(digits)}%` : "–");
  const signed = (value, digits = 2) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
  const short = (value) => (known(value) ? String(Number(value.toPrecision(4))) : "–");
  const tick = (value) => String(Number(value.toPrecision(10)));
  function duration(seconds) {
    if (!known(seconds)) return "–";
    if (seconds < 99.95) return `${seconds.toFixed(1)} s`;
    if (seconds < 3599.5) return `${Math.floor(Math.round(seconds) / 60)} min ${String(Math.round(seconds) % 60).padStart(2, "0")} s`;
    const minutes = Math.round(seconds / 60);
    return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  }
  const roundTime = (t) => (t < 60 ? `${tick(t)} s` : t < 3600 ? `${tick(t / 60)} min` : `${tick(t / 3600)} h`);
  const TIMES = [0.01, 0.1, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000, 86400, 259200, 864000];

  function scale([low, high], [from, to], log) {
    const there = log ? Math.log : (x) => x;
    const back = log ? Math.exp : (x) => x;
    const [a, b] = [there(low), there(high)];
    const place = (x) => from + ((there(x) - a) / (b - a || 1)) * (to - from);
    place.invert = (pixel) => back(a + ((pixel - from) / (to - from)) * (b - a));
    place.ticks = (count) => (log && high / low > 8 ? powers(low, high, count) : steps(low, high, count));
    return place;
  }
  function steps(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const far = (by) => Math.abs(Math.log((by * power) / rough));
    const step = power * [1, 2, 5, 10].reduce((a, b) => (far(b) < far(a) ? b : a));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step && found.length < 50; i++) found.push(i * step);
    return found;
  }
  function powers(low, high, count) {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const by of [1, 2, 5]) if (by * 10 ** p >= low * 0.999 && by * 10 ** p <= high * 1.001) found.push([by, by * 10 ** p]);
    const kept = found.length > count ? found.filter(([by]) => by === 1) : found;
    return kept.filter((_, i) => i % Math.ceil(kept.length / count) === 0).map(([, value]) => value);
  }
  function extent(values, pad, [least, most] = [-Infinity, Infinity]) {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    const room = (high - low) * pad || Math.abs(high) * 0.05 || 0.5;
    return [Math.max(low - room, least), Math.min(high + room, most)];
  }
  const measure = document.createElement("canvas").getContext("2d");
  function textWidth(text, size = 11) {
    measure.font = `${size}px system-ui, sans-serif`;
    return measure.measureText(text).width;
  }
  function fitted(text, room, size = 11) {
    if (textWidth(text, size) <= room) return text;
    let length = text.length;
    while (length > 1 && textWidth(`${text.slice(0, length)}…`, size) > room) length--;
    return `${text.slice(0, length)}…`;
  }

  // --- marks --------------------------------------------------------------------------------------

  const colour = (slot) => `var(--s${slot < 7 ? slot : 7})`;
  const SHAPES = [
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-4.6L4.4,3.6H-4.4z", "M0,-5L5,0L0,5L-5,0z",
    "M0,4.6L4.4,-3.6H-4.4z", "M-1.4,-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3z", "M-4.4,-2.4L-2.4,-4.4L0,-2L2.4,-4.4L4.4,-2.4L2,0L4.4,2.4L2.4,4.4L0,2L-2.4,4.4L-4.4,2.4L-2,0z",
  ];
  const mark = (slot, hollow, more = {}) =>
    s("path", { d: SHAPES[slot % 7], fill: hollow ? "var(--paper)" : colour(slot), stroke: hollow ? colour(slot) : "var(--paper)", "stroke-width": hollow ? 1.6 : 0.8, ...more });
  const key = (slot, text, hollow) => h("li", {}, s("svg", { width: 12, height: 12, viewBox: "-6 -6 12 12", "aria-hidden": "true" }, mark(slot, hollow)), text);

  const tip = $("tip");
  function showTip(text, left, top) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, left + 14 + box.width > innerWidth ? left - box.width - 10 : left + 14)}px`;
    tip.style.top = `${Math.max(4, top + 14 + box.height > innerHeight ? top - box.height - 10 : top + 14)}px`;
  }
  const hideTip = () => { tip.hidden = true; };
  function tipAt(node, text) {
    const box = node.getBoundingClientRect();
    showTip(text, box.right - 10, box.bottom - 10);
  }

  // Draws into a box, and again whenever the box has got another width.
  function chart(box, draw) {
    let width = null;
    const again = () => { width = box.clientWidth; hideTip(); draw(); };
    new ResizeObserver(() => { if (box.clientWidth && box.clientWidth !== width) again(); }).observe(box);
    again();
    return again;
  }

  function axes(box, { height, x, y, label, left = 46, right = 14, top = 12, bottom = 36, title }) {
    const width = Math.max(260, box.clientWidth);
    const X = scale(x.domain, [left, width - right], x.log);
    const Y = scale(y.domain, [height - bottom, top], y.log);
    const svg = s("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label });
    for (const value of y.ticks ?? Y.ticks(Math.max(3, (height - top - bottom) / 40)))
      svg.append(s("line", { class: "grid", x1: left, x2: width - right, y1: Y(value), y2: Y(value) }),
        s("text", { x: left - 6, y: Y(value) + 4, "text-anchor": "end" }, (y.format ?? tick)(value)));
    const inside = (x.ticks ?? X.ticks(Math.max(3, width / 90))).filter((value) => value >= x.domain[0] && value <= x.domain[1]);
    let free = -Infinity;
    for (const value of inside) {
      const text = (x.format ?? tick)(value);
      const half = textWidth(text) / 2;
      svg.append(s("line", { class: "axis", x1: X(value), x2: X(value), y1: height - bottom, y2: height - bottom + 4 }));
      if (X(value) - half < free) continue;
      free = X(value) + half + 8;
      svg.append(s("text", { x: Math.min(X(value), width - half), y: height - bottom + 16, "text-anchor": "middle" }, text));
    }
    svg.append(s("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
    if (x.label) svg.append(s("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, x.label));
    if (title) svg.append(s("text", { class: "title", x: 0, y: 12 }, title));
    return { svg, X, Y, width, height, left, right: width - right, top, bottom: height - bottom };
  }

  // Points that are read by hovering and by the arrow keys; the page's tab order holds one of each chart.
  function addPoints(frame, points) {
    const nodes = [...points].sort((a, b) => a.x - b.x).map((point) => {
      const place = `translate(${frame.X(point.x).toFixed(1)},${frame.Y(point.y).toFixed(1)})`;
      const node = mark(point.slot, point.hollow, { class: "point", transform: place, tabindex: -1, role: "img", "aria-label": point.text });
      node.addEventListener("pointermove", (event) => showTip(point.text, event.clientX, event.clientY));
      node.addEventListener("pointerleave", hideTip);
      node.addEventListener("focus", () => tipAt(node, point.text));
      node.addEventListener("blur", hideTip);
      const open = () => { if (point.run !== undefined) show(point.run); };
      node.addEventListener("click", open);
      node.addEventListener("keydown", (event) => {
        const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
        if (by) { event.preventDefault(); nodes[(nodes.indexOf(node) + by + nodes.length) % nodes.length].focus(); }
        if (event.key === "Enter") open();
      });
      return node;
    });
    nodes[0]?.setAttribute("tabindex", 0);
    frame.svg.append(...nodes);
  }
  // Names beside their points, those left out that would lie over others.
  function addLabels(frame, labels, points) {
    const taken = points.map(({ x, y }) => [frame.X(x) - 5, frame.Y(y) - 5, frame.X(x) + 5, frame.Y(y) + 5]);
    for (const { x, y, name } of labels) {
      const text = fitted(name, 150);
      const width = textWidth(text) + 2;
      const [px, py] = [frame.X(x), frame.Y(y)];
      for (const [dx, dy] of [[8, 4], [-8 - width, 4], [-width / 2, -9], [-width / 2, 17], [8, -8], [-8 - width, -8]]) {
        const box = [px + dx, py + dy - 9, px + dx + width, py + dy + 2];
        const clear = taken.every((b) => box[2] < b[0] || b[2] < box[0] || box[3] < b[1] || b[3] < box[1]);
        if (!clear || box[0] < frame.left || box[2] > frame.width || box[1] < 0 || box[3] > frame.bottom) continue;
        taken.push(box);
        frame.svg.append(s("text", { class: "halo", x: px + dx, y: py + dy }, text));
        break;
      }
    }
  }
  function show(run) {
    const section = $(`run-${run}`);
    if (section) { section.open = true; location.hash = `run-${run}`; section.scrollIntoView(); }
    else if (data.runs[run].page) location.href = data.runs[run].page;
  }
  function choice(names, chosen, change, label) {
    const buttons = names.map(([value, text]) => h("button", {
      type: "button", "aria-pressed": String(value === chosen),
      onclick: (event) => { buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === event.currentTarget))); change(value); },
    }, text));
    return h("span", { class: "group", role: "group", "aria-label": label }, buttons);
  }

  // --- tables -------------------------------------------------------------------------------------

  const collator = new Intl.Collator("en", { numeric: true });
  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const figure = head.classList.contains("figure");
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : figure;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => {
        const cell = row.cells[column];
        return [row, figure ? (cell.dataset.value === undefined ? null : Number(cell.dataset.value)) : cell.textContent.trim()];
      });
      rows.sort(([, a], [, b]) => {
        if (a === null || b === null) return (a === null) - (b === null);  // what is unknown stays below
        return (figure ? a - b : collator.compare(a, b)) * (down ? -1 : 1);
      });
      table.tBodies[0].append(...rows.map(([row]) => row));
    }));
  }
  function makeTable(caption, headings, rows) {
    const table = h("table", { class: "sortable" }, h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, headings.map(([text, figure]) => h("th", { scope: "col", class: figure ? "figure" : "text" }, h("button", { type: "button" }, text))))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", { class: cell.value !== undefined ? "figure" : null, "data-value": cell.value }, cell.text ?? cell))))));
    sortable(table);
    return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, table);
  }
  document.querySelectorAll("table.sortable").forEach(sortable);
  $("filter")?.addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...$("run-table").tBodies[0].rows];
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    $("filtered").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} runs`;
  });

  // --- accuracy and time --------------------------------------------------------------------------

  function front(dataset) {
    const runs = data.runs.map((run, number) => ({ ...run, number })).filter((run) => run.dataset === dataset && run.time > 0);
    const counts = new Map();
    runs.forEach((run) => counts.set(run.name, (counts.get(run.name) ?? 0) + 1));
    const names = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
    const references = data.references.datasets[dataset];
    // The test set is scored for few of a study's runs.
    const having = (kind) => runs.filter((run) => known(run[kind])).length;
    let which = having("val_accuracy") > having("accuracy") ? "val_accuracy" : "accuracy";
    let withReferences = false;
    const box = h("div");
    const kinds = [["accuracy", "test"], ["val_accuracy", "validation"]].filter(([kind]) => having(kind));
    if (!kinds.length) return;
    const keys = names.slice(0, 7).map((name, slot) => key(slot, name));
    if (names.length > 7) keys.push(key(7, `${names.length - 7} others`));
    const controls = h("p", { class: "controls" },
      kinds.length > 1 && choice(kinds, which, (kind) => { which = kind; again(); }, "which accuracy"),
      references && h("label", {}, h("input", { type: "checkbox", onchange: (event) => { withReferences = event.target.checked; again(); } }), `reference experiments (${data.references.machine})`));
    $("fronts").append(h("div", { class: "front" }, h("h3", {}, dataset), controls, h("ul", { class: "keys" }, keys), box));
    const again = chart(box, () => {
      const points = runs.filter((run) => known(run[which])).map((run) => ({
        x: run.time, y: run[which], slot: names.indexOf(run.name), run: run.number,
        text: `${run.label}\n${percent(run[which])} in ${duration(run.time)}\n${run.folder}`,
      }));
      const others = withReferences ? references.map((one) => ({
        x: one.seconds, y: one.accuracy, slot: 7, hollow: true, name: one.name,
        text: `${one.name}, reference\n${percent(one.accuracy)} in ${duration(one.seconds)}`,
      })) : [];
      const all = [...points, ...others];
      const times = all.map((point) => point.x);
      const log = Math.max(...times) > 4 * Math.min(...times);
      const domain = log ? [Math.min(...times) / 1.2, Math.max(...times) * 1.35] : extent(times, 0.12, [0, Infinity]);
      const inside = TIMES.filter((t) => t >= domain[0] && t <= domain[1]);
      const frame = axes(box, {
        height: Math.min(380, Math.max(280, box.clientWidth * 0.5)), label: `${kinds.find(([kind]) => kind === which)[1]} accuracy on ${dataset} by training time`,
        x: { domain, log, label: "training time", format: log ? roundTime : (t) => duration(t), ticks: log && inside.length > 1 ? inside : undefined },
        y: { domain: extent(all.map((point) => point.y), 0.08, [0, 1]), format: (value) => `${tick(100 * value)}%` },
      });
      const best = data.fronts[dataset][which].map((number) => data.runs[number]);
      const labels = new Map(best.map((run) => [run.name, { x: run.time, y: run[which], name: run.name }]));
      const line = best.map((run, i) => `${i ? `H${frame.X(run.time)}V` : `M${frame.X(run.time)},`}${frame.Y(run[which])}`).join("");
      if (best.length) frame.svg.append(s("path", { class: "pareto", d: `${line}H${frame.right}`, fill: "none", stroke: "var(--muted)", "stroke-width": 1.2 }));
      addPoints(frame, [...points, ...others]);
      addLabels(frame, [...others, ...labels.values()], all);
      box.replaceChildren(frame.svg);
    });
  }
  if ($("fronts")) Object.keys(data.fronts).forEach(front);

  // --- curves -------------------------------------------------------------------------------------

  const curved = Object.keys(data.details).map(Number).filter((run) => data.details[run].curves)
    .sort((a, b) => (data.runs[b].accuracy ?? data.runs[b].val_accuracy ?? -1) - (data.runs[a].accuracy ?? data.runs[a].val_accuracy ?? -1));
  const chosen = curved.slice(0, 6);
  const boxes = [...document.querySelectorAll("#run-table input")];
  let zoom = null;
  const DASHES = { train: "5 4", val: null, ema_val: "1.5 3" };
  const WORDS = { train: "training", val: "validation", ema_val: "averaged" };
  const PANELS = [
    { title: "Loss", of: (c) => ["train", "val", "ema_val"].map((part) => [part, c[`${part}_loss`]]), format: short, cut: true },
    { title: "Accuracy", of: (c) => ["train", "val", "ema_val"].map((part) => [part, c[`${part}_accuracy`]]), format: percent, axis: (v) => `${tick(100 * v)}%` },
    { title: "Gap: training minus validation accuracy, points", of: (c) => [["gap", c.train_accuracy && c.val_accuracy && c.train_accuracy.map((value, i) => (known(value) && known(c.val_accuracy[i]) ? 100 * (value - c.val_accuracy[i]) : null))]], format: signed },
    { title: "Learning rate", of: (c) => [["lr", c.lr]], format: short, log: true },
  ];
  function panel(box, { title, of, format, axis, cut, log }) {
    return chart(box, () => {
      const series = chosen.flatMap((run, slot) => of(data.details[run].curves).filter(([, values]) => values).map(([part, values]) => ({
        run, slot, part, points: data.details[run].curves.epoch.map((epoch, i) => [epoch, values[i]]).filter(([x, y]) => known(x) && known(y)),
      }))).filter((one) => one.points.length);
      const epochs = [...new Set(series.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
      if (!epochs.length) return box.replaceChildren();
      const whole = epochs.length > 1 ? [epochs[0], epochs.at(-1)] : [epochs[0] - 1, epochs[0] + 1];
      const domain = zoom ?? whole;
      const heights = series.flatMap((one) => one.points.filter(([x]) => x >= domain[0] && x <= domain[1]).map(([, y]) => y)).sort((a, b) => a - b);
      if (!heights.length) heights.push(0, 1);
      const isLog = log && heights[0] > 0 && heights.at(-1) / heights[0] > 20;
      let range = isLog ? [heights[0] / 1.3, heights.at(-1) * 1.3] : extent(heights, 0.06);
      if (cut && heights.length >= 20) range[1] = Math.min(range[1], 3 * heights[Math.floor(0.95 * heights.length)]);  // a few wild ones leave the picture
      const small = !isLog && Math.max(...range.map(Math.abs)) < 0.01;
      const frame = axes(box, {
        height: 230, top: 26, left: 52, title, label: `${title} by epoch`,
        x: { domain, label: "epoch", format: (v) => (Number.isInteger(v) ? String(v) : ""), ticks: undefined },
        y: { domain: range, log: isLog, format: axis ?? (isLog || small ? (v) => Number(v.toPrecision(2)).toExponential() : tick) },
      });
      const clip = `clip-${PANELS.findIndex((one) => one.title === title)}`;
      frame.svg.append(s("clipPath", { id: clip }, s("rect", { x: frame.left - 4, y: frame.top - 4, width: frame.right - frame.left + 8, height: frame.bottom - frame.top + 5 })));
      const lines = s("g", { "clip-path": `url(#${clip})` });
      for (const { slot, part, points } of series) {
        const d = points.map(([x, y], i) => `${i ? "L" : "M"}${frame.X(x).toFixed(1)},${frame.Y(y).toFixed(1)}`).join("");
        lines.append(s("path", { d, fill: "none", stroke: colour(slot), "stroke-width": part === "train" ? 1.2 : 1.7, "stroke-dasharray": DASHES[part], class: "curve" }));
        const [x, y] = points.at(-1);
        if (part !== "train" || points.length === 1) lines.append(mark(slot, part === "train", { transform: `translate(${frame.X(x)},${frame.Y(y)})` }));
      }
      const rule = s("line", { class: "rule", stroke: "var(--muted)", y1: frame.top, y2: frame.bottom, visibility: "hidden" });
      const band = s("rect", { y: frame.top, height: frame.bottom - frame.top, fill: "var(--accent)", opacity: 0.15, width: 0 });
      frame.svg.append(lines, rule, band);
      frame.svg.setAttribute("tabindex", 0);

      let current = null;
      const seen = epochs.filter((epoch) => epoch >= domain[0] && epoch <= domain[1]);
      const read = (epoch, left, top) => {
        current = epoch;
        rule.setAttribute("visibility", "visible");
        for (const end of ["x1", "x2"]) rule.setAttribute(end, frame.X(epoch));
        const rows = chosen.map((run) => {
          const own = series.filter((one) => one.run === run).map(({ part, points }) => {
            const found = points.find(([x]) => x === epoch);
            return found && `${WORDS[part] ? `${WORDS[part]} ` : ""}${format(found[1])}`;
          }).filter(Boolean);
          return own.length && `${data.runs[run].label}: ${own.join(", ")}`;
        }).filter(Boolean);
        showTip(`epoch ${epoch}\n${rows.join("\n")}`, left, top);
      };
      const leave = () => { hideTip(); rule.setAttribute("visibility", "hidden"); };
      const across = (event) => {
        const view = frame.svg.getBoundingClientRect();
        return ((event.clientX - view.left) / view.width) * frame.width;
      };
      let began = null;
      frame.svg.addEventListener("pointerdown", (event) => { began = across(event); });
      frame.svg.addEventListener("pointermove", (event) => {
        const at = across(event);
        if (began !== null && event.buttons) {
          band.setAttribute("x", Math.min(began, at));
          band.setAttribute("width", Math.abs(at - began));
        } else began = null;
        const wanted = frame.X.invert(at);
        if (seen.length) read(seen.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a)), event.clientX, event.clientY);
      });
      frame.svg.addEventListener("pointerup", (event) => {
        const [from, to] = [began, across(event)].sort((a, b) => a - b).map((at) => frame.X.invert(Math.max(frame.left, Math.min(frame.right, at))));
        if (began !== null && Math.abs(across(event) - began) > 8) zoomTo([from, to]);
        began = null;
      });
      frame.svg.addEventListener("pointerleave", leave);
      frame.svg.addEventListener("blur", leave);
      frame.svg.addEventListener("dblclick", () => zoomTo(null));
      frame.svg.addEventListener("keydown", (event) => {
        if (event.key === "Escape") zoomTo(null);
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!by || !seen.length) return;
        event.preventDefault();
        const next = current === null ? 0 : Math.max(0, Math.min(seen.length - 1, seen.indexOf(current) + by));
        const view = frame.svg.getBoundingClientRect();
        read(seen[next], view.left + (frame.X(seen[next]) / frame.width) * view.width, view.top + 30);
      });
      box.replaceChildren(frame.svg);
    });
  }
  let panels = [];
  function zoomTo(domain) {
    zoom = domain;
    panels.forEach((again) => again());
  }
  function zoomBy(factor) {
    const epochs = chosen.flatMap((run) => data.details[run].curves.epoch).filter(known);
    const [low, high] = [Math.min(...epochs), Math.max(...epochs)];
    const [from, to] = zoom ?? [low, high];
    const [middle, half] = [(from + to) / 2, ((to - from) / 2) * factor];
    zoomTo(half * 2 >= high - low ? null : [Math.max(low, middle - half), Math.min(high, middle + half)]);
  }
  function legend() {
    boxes.forEach((box) => { box.checked = chosen.includes(Number(box.value)); });
    $("legend").replaceChildren(h("ul", { class: "keys" }, chosen.map((run, slot) => key(slot, `${data.runs[run].label}${known(data.runs[run].gap) ? `, gap at its best ${signed(100 * data.runs[run].gap)}` : ""}`))));
  }
  if ($("panels")) {
    for (const box of boxes) {
      box.disabled = false;
      box.addEventListener("change", () => {
        const run = Number(box.value);
        if (box.checked) chosen.push(run); else chosen.splice(chosen.indexOf(run), 1);
        legend();
        zoomTo(zoom);
      });
    }
    $("zoom").append(...[["Zoom in", () => zoomBy(0.5)], ["Zoom out", () => zoomBy(2)], ["Whole run", () => zoomTo(null)]].map(([text, onclick]) => h("button", { type: "button", onclick }, text)));
    const places = PANELS.map(() => h("div"));
    $("panels").append(...places);
    legend();
    panels = PANELS.map((spec, i) => panel(places[i], spec));
  }

  // --- two recipes --------------------------------------------------------------------------------

  function recipe(run) {
    const values = [...data.recipes.common];
    for (const [place, value] of data.recipes.others[run]) values[place] = value;
    return values;
  }
  if ($("difference")) {
    const runs = Object.keys(data.recipes.others);
    const compare = () => {
      const [one, other] = [$("one").value, $("other").value];
      if (!one || !other) return;
      const [a, b] = [recipe(one), recipe(other)];
      const rows = data.recipes.fields.map((field, i) => [field, a[i] ?? "–", b[i] ?? "–"]).filter(([, x, y]) => x !== y);
      $("differences").replaceChildren(rows.length
        ? h("div", { class: "scroll" }, h("table", { class: "differences" }, h("thead", {}, h("tr", {}, ["field", "one", "the other"].map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell)))))))
        : h("p", { class: "note" }, "No field differs."));
    };
    for (const [id, run] of [["one", runs[0]], ["other", runs[1]]]) {
      $(id).append(...runs.map((number) => h("option", { value: number }, `${data.runs[number].label} · ${data.runs[number].dataset} · ${data.runs[number].folder}`)));
      if (run !== undefined) $(id).value = run;
      $(id).addEventListener("change", compare);
    }
    compare();
  }

  // --- one run ------------------------------------------------------------------------------------

  function matrixOf({ confusion, classes }) {
    const count = classes.length;
    const rows = classes.map(() => new Array(count).fill(0));
    let place = 0;
    for (let i = 0; i < confusion.length; i += 2) {
      place += confusion[i];
      rows[Math.floor(place / count)][place % count] = confusion[i + 1];
    }
    return rows;
  }
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  // Classes that are confused stand side by side: from the most confused pair on, always the next most confused with the last.
  function byConfusion(matrix) {
    const both = (a, b) => matrix[a][b] + matrix[b][a];
    const left = new Set(matrix.keys());
    const errors = matrix.map((row, i) => sum(row) - row[i] + sum(matrix.map((other, j) => (i === j ? 0 : other[i]))));
    const most = (score) => [...left].reduce((a, b) => (score(b) > score(a) ? b : a));
    const order = [];
    let last = most((c) => Math.max(0, ...matrix.map((_, other) => (other === c ? 0 : both(c, other)))));
    while (last !== undefined) {
      order.push(last);
      left.delete(last);
      if (!left.size) break;
      const next = most((c) => both(order.at(-1), c));
      last = both(order.at(-1), next) ? next : most((c) => errors[c]);
    }
    return order;
  }
  function confusionChart(box, classes, matrix, rows) {
    const count = classes.length;
    const orders = {
      classes: [...matrix.keys()],
      confusion: byConfusion(matrix),
      recall: [...matrix.keys()].sort((a, b) => (rows[a].recall ?? 2) - (rows[b].recall ?? 2)),
    };
    let order = orders[count > 20 ? "confusion" : "classes"];
    const place = h("div");
    box.append(h("p", { class: "controls" }, choice([["classes", "as classes"], ["confusion", "confused together"], ["recall", "lowest recall first"]], count > 20 ? "confusion" : "classes", (name) => { order = orders[name]; again(); }, "order of the classes")), place);
    const again = chart(place, () => {
      const width = Math.max(260, Math.min(place.clientWidth, count > 30 ? 1000 : 560));
      const names = Math.min(100, width * 0.2, 8 + Math.max(...classes.map((name) => textWidth(name))));
      const left = names + 18;
      const size = (width - left - 4) / count;
      const font = Math.min(11, size * 0.95);
      const legible = size >= 6.5;
      const top = legible ? names + 18 : 18;
      const svg = s("svg", { class: "chart matrix", viewBox: `0 0 ${width} ${top + size * count + 4}`, role: "img", tabindex: 0, "aria-label": `Confusion matrix of ${count} classes; arrow keys read its cells` });
      svg.style.maxWidth = `${width}px`;
      svg.append(s("text", { x: left, y: 10 }, "predicted →"), s("text", { transform: `translate(10,${top + size * count})rotate(-90)` }, "true →"));
      order.forEach((own, row) => {
        if (legible) svg.append(
          s("text", { x: left - 5, y: top + size * (row + 0.5) + font * 0.35, "text-anchor": "end", size: font }, fitted(classes[own], names - 4, font)),
          s("text", { transform: `translate(${left + size * (row + 0.5) + font * 0.35},${top - 5})rotate(-90)`, size: font }, fitted(classes[own], names - 4, font)));
        order.forEach((other, column) => {
          const number = matrix[own][other];
          if (!number) return;
          const share = number / rows[own].support;
          svg.append(s("rect", { class: "cell", x: left + size * column, y: top + size * row, width: Math.max(size - (size > 12 ? 1 : 0.2), 1), height: Math.max(size - (size > 12 ? 1 : 0.2), 1), fill: `rgba(var(--cell), ${Math.max(0.06, Math.sqrt(share) * 0.95).toFixed(3)})` }));
          if (size >= 24) svg.append(s("text", { class: share > 0.2 ? "inside" : "strong", x: left + size * (column + 0.5), y: top + size * (row + 0.5) + 4, "text-anchor": "middle" }, String(number)));
        });
      });
      const ring = s("rect", { width: size, height: size, fill: "none", stroke: "var(--ink)", "stroke-width": 1.5, visibility: "hidden" });
      svg.append(s("rect", { x: left - 0.5, y: top - 0.5, width: size * count + 1, height: size * count + 1, fill: "none", class: "axis" }), ring);
      let cell = [0, 0];
      const read = (row, column, at) => {
        if (row < 0 || column < 0 || row >= count || column >= count) return leave();
        cell = [row, column];
        const [own, other] = [order[row], order[column]];
        const view = svg.getBoundingClientRect();
        const by = view.width / width;
        ring.setAttribute("x", left + size * column);
        ring.setAttribute("y", top + size * row);
        ring.setAttribute("visibility", "visible");
        const share = rows[own].support ? percent(matrix[own][other] / rows[own].support, 1) : "–";
        showTip(`true: ${classes[own]}\npredicted: ${classes[other]}\n${matrix[own][other]} of ${rows[own].support} (${share})`, at?.clientX ?? view.left + (left + size * column) * by, at?.clientY ?? view.top + (top + size * row) * by);
      };
      const leave = () => { ring.setAttribute("visibility", "hidden"); hideTip(); };
      svg.addEventListener("pointermove", (event) => {
        const view = svg.getBoundingClientRect();
        const by = width / view.width;
        read(Math.floor(((event.clientY - view.top) * by - top) / size), Math.floor(((event.clientX - view.left) * by - left) / size), event);
      });
      svg.addEventListener("pointerleave", leave);
      svg.addEventListener("blur", leave);
      svg.addEventListener("keydown", (event) => {
        const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
        if (!by) return;
        event.preventDefault();
        read(...cell.map((value, i) => Math.max(0, Math.min(count - 1, value + by[i]))));
      });
      place.replaceChildren(svg);
    });
  }
  function reliabilityChart(box, bins) {
    const total = sum(bins.map((bin) => bin.count));
    const ece = sum(bins.map((bin) => (bin.count / total) * Math.abs((bin.accuracy ?? 0) - (bin.confidence ?? 0))));
    box.append(h("h3", {}, `Reliability: ECE ${percent(ece)}`), h("p", { class: "note" }, "Accuracy by confidence, in 15 bins; on the dashed line a network is as often right as it says. Below: the share of images."));
    const place = h("div");
    box.append(place);
    chart(place, () => {
      const frame = axes(place, {
        height: 330, bottom: 84, label: `Reliability diagram, ECE ${percent(ece)}`,
        x: { domain: [0, 1], format: (v) => percent(v, 0), label: "" }, y: { domain: [0, 1], format: (v) => percent(v, 0) },
      });
      const { svg, X, Y } = frame;
      const wide = X(1 / bins.length) - X(0) - 2;
      const most = Math.max(...bins.map((bin) => bin.count));
      const points = [];
      bins.forEach((bin, i) => {
        const x = X(i / bins.length) + 1;
        const tall = (bin.count / most) * 38;
        svg.append(s("rect", { x, y: 330 - 18 - tall, width: wide, height: tall, fill: "var(--s7)" }));
        if (!bin.count) return;
        svg.append(s("rect", { x, y: Y(bin.accuracy), width: wide, height: Math.max(0, Y(0) - Y(bin.accuracy)), fill: "rgba(var(--cell), 0.35)" }));
        points.push({ x: (i + 0.5) / bins.length, y: bin.accuracy, slot: 0, text: `confidence ${percent(bin.confidence, 1)}\naccuracy ${percent(bin.accuracy, 1)}\n${bin.count} images (${percent(bin.count / total, 1)})` });
      });
      svg.append(s("line", { x1: X(0), x2: X(1), y1: Y(0), y2: Y(1), stroke: "var(--muted)", "stroke-dasharray": "4 4" }), s("text", { x: (X(0) + X(1)) / 2, y: 328, "text-anchor": "middle" }, "confidence"));
      addPoints(frame, points);
      place.replaceChildren(svg);
    });
  }
  const TITLES = { most_wrong: "Most wrong: the test images of the highest loss", least_sure: "Least sure: the smallest margin between two classes", augmented: "Training images of the first epoch as the network saw them, before mixing" };
  function pictures(name, { sheet, size: [height, width], columns, items }, classes) {
    const lines = Math.ceil(items.length / columns);
    const grid = h("div", { class: "pictures" });
    grid.style.setProperty("--sheet", `url("${sheet}")`);
    items.forEach((item, i) => {
      const own = classes[item.label] ?? String(item.label);
      const guess = (item.guesses ?? []).map(([place, share]) => [classes[place] ?? String(place), share, place === item.label]);
      const words = [`image ${item.index}`, `class ${own}`, ...guess.map(([text, share]) => `${percent(share, 1)} ${text}`)];
      if (guess.length && !guess.some(([, , right]) => right)) words.push(`${percent(item.own, 1)} ${own}`);
      const picture = h("span", { class: "picture", role: "img", "aria-label": words.join(", "), title: words.join("\n") });
      picture.style.aspectRatio = `${width} / ${height}`;
      picture.style.backgroundSize = `${columns * 100}% ${lines * 100}%`;
      picture.style.backgroundPosition = `${columns > 1 ? ((i % columns) / (columns - 1)) * 100 : 0}% ${lines > 1 ? (Math.floor(i / columns) / (lines - 1)) * 100 : 0}%`;
      grid.append(h("figure", {}, picture, h("figcaption", {}, own, guess.slice(0, name === "most_wrong" ? 1 : 2).map(([text, share, right]) => [h("br"), h("span", { class: right ? "muted" : "wrong" }, `${text} ${percent(share, 1)}`)]))));
    });
    return h("div", { class: "wide" }, h("h3", {}, TITLES[name]), grid);
  }
  function detail(section) {
    const box = section.querySelector(".drawn");
    const one = data.details[section.id.slice(4)];
    if (box.childElementCount) return;
    const place = (wide) => { const node = h("div", { class: wide ? "wide" : null }); box.append(node); return node; };
    if (one.confusion) {
      const matrix = matrixOf(one);
      const rows = matrix.map((row, i) => {
        const [support, predicted] = [sum(row), sum(matrix.map((other) => other[i]))];
        const [precision, recall] = [predicted ? row[i] / predicted : null, support ? row[i] / support : null];
        return { support, precision, recall, f1: support + predicted ? (2 * row[i]) / (support + predicted) : null };
      });
      const first = place(matrix.length > 30);
      first.append(h("h3", {}, "Confusion matrix of the test set"));
      confusionChart(first, one.classes, matrix, rows);
      const beside = place();
      if (one.reliability) reliabilityChart(beside, one.reliability);
      const figure = (value, bar) => {
        const fill = h("i");
        fill.style.width = percent(value ?? 0);
        return { value: value ?? "", text: h("span", {}, percent(value, 1), bar && h("span", { class: "bar", "aria-hidden": "true" }, fill)) };
      };
      place().append(h("h3", {}, "Each class"), makeTable("Precision and recall of each class", [["class"], ["images", true], ["precision", true], ["recall", true], ["F1", true]],
        rows.map((row, i) => [one.classes[i], { value: row.support, text: String(row.support) }, figure(row.precision), figure(row.recall, true), figure(row.f1)])));
      const pairs = matrix.flatMap((row, i) => row.map((number, j) => [i, j, number])).filter(([i, j, number]) => i !== j && number).sort((a, b) => b[2] - a[2]).slice(0, 30);
      if (pairs.length) (matrix.length > 30 ? place() : beside).append(h("h3", {}, "Commonest confusions"), makeTable("Commonest confusions", [["true class"], ["predicted"], ["images", true], ["of the class", true]],
        pairs.map(([i, j, number]) => [one.classes[i], one.classes[j], { value: number, text: String(number) }, figure(number / rows[i].support)])));
    } else if (one.reliability) reliabilityChart(place(), one.reliability);
    for (const [name, list] of Object.entries(one.pictures ?? {})) box.append(pictures(name, list, one.classes));
  }
  document.querySelectorAll("details.run").forEach((section) => {
    section.addEventListener("toggle", () => { if (section.open) detail(section); });
    if (section.open) detail(section);
  });
  const follow = () => { const section = document.getElementById(location.hash.slice(1)); if (section?.matches("details.run")) section.open = true; };
  addEventListener("hashchange", follow);
  follow();

  // --- studies ------------------------------------------------------------------------------------

  function forest(box, study) {
    const arms = study.arms.slice(1).filter((arm) => known(arm.difference));
    if (!arms.length || arms.length > 300) return;
    box.append(h("h3", {}, `Difference from ${study.arms[0].name}, in points of validation accuracy, with 95% intervals`));
    const place = h("div");
    box.append(place);
    chart(place, () => {
      const width = Math.max(260, place.clientWidth);
      const narrow = width < 700;
      const said = arms.map((arm) => `${signed(100 * arm.difference)}${known(arm.low) && known(arm.high) ? ` [${signed(100 * arm.low)}, ${signed(100 * arm.high)}]` : ""}  ${arm.verdict ?? ""}`);
      const left = narrow ? 8 : Math.min(width * 0.34, 14 + Math.max(...arms.map((arm) => textWidth(arm.name, 12))));
      const right = narrow ? 8 : Math.min(width * 0.34, 20 + Math.max(...said.map((text) => textWidth(text))));
      const tall = narrow ? 44 : 24;
      const frame = axes(place, {
        height: arms.length * tall + 56, left, right, top: 8, bottom: 38, label: `Forest plot of ${arms.length} arms`,
        x: { domain: extent([0, ...arms.flatMap((arm) => [arm.difference, arm.low, arm.high].filter(known))].map((v) => 100 * v), 0.06), format: (v) => (v ? signed(v, 2).replace(/\.?0+$/, "") : "0"), label: "points" },
        y: { domain: [0, 1], ticks: [] },
      });
      const { svg, X } = frame;
      if (known(study.resolve)) svg.append(s("rect", { x: Math.max(left, X(-100 * study.resolve)), width: Math.min(frame.right, X(100 * study.resolve)) - Math.max(left, X(-100 * study.resolve)), y: 4, height: frame.bottom - 4, fill: "var(--faint)" }));
      svg.append(s("line", { x1: X(0), x2: X(0), y1: 4, y2: frame.bottom, stroke: "var(--muted)" }));
      const points = arms.map((arm, i) => {
        const y = 8 + i * tall + (narrow ? 30 : tall / 2);
        const beyond = known(arm.low) && arm.low > 0 ? 2 : known(arm.high) && arm.high < 0 ? 4 : null;
        const ink = beyond === null ? "var(--s7)" : beyond === 2 ? "var(--good)" : "var(--bad)";
        if (known(arm.low) && known(arm.high)) svg.append(s("line", { x1: X(100 * arm.low), x2: X(100 * arm.high), y1: y, y2: y, stroke: ink, "stroke-width": beyond === null ? 1.4 : 2.4 }));
        const words = beyond === null ? "" : "strong";
        if (narrow) svg.append(s("text", { class: `halo ${words}`, x: 0, y: y - 13 }, fitted(arm.name, width - textWidth(said[i]) - 16)), s("text", { class: `halo ${words}`, x: width, y: y - 13, "text-anchor": "end" }, said[i]));
        else svg.append(s("text", { class: words, x: left - 12, y: y + 4, "text-anchor": "end", size: 12 }, fitted(arm.name, left - 14, 12)), s("text", { class: words, x: frame.right + 14, y: y + 4 }, fitted(said[i], right - 14)));
        return { x: 100 * arm.difference, y: (frame.bottom - y) / (frame.bottom - frame.top), slot: beyond ?? 0, hollow: beyond === null, ink, text: `${arm.name}\n${said[i]}` };
      });
      addPoints(frame, points);
      svg.querySelectorAll(".point").forEach((node, i) => {
        const { ink, hollow } = [...points].sort((a, b) => a.x - b.x)[i];
        node.setAttribute(hollow ? "stroke" : "fill", ink);
      });
      place.replaceChildren(svg);
    });
  }
  function scatter(box, title, points, x) {
    const place = h("div");
    box.append(place);
    chart(place, () => {
      const frame = axes(place, { height: 220, top: 26, title: fitted(title, place.clientWidth - 10, 12), label: `Validation accuracy against ${title}`, x, y: { domain: extent(points.map((point) => point.y), 0.08, [0, 1]), format: (v) => `${tick(100 * v)}%` } });
      addPoints(frame, points);
      place.replaceChildren(frame.svg);
    });
  }
  function search(box, study) {
    const trials = study.arms.map((arm, number) => ({ ...arm, number })).filter((arm) => known(arm.accuracy));
    if (!trials.length) return;
    const grid = h("div", { class: "panels" });
    box.append(grid);
    const text = (arm) => `trial ${arm.number}: ${percent(arm.accuracy)}\n${arm.name}`;
    scatter(grid, "trial", trials.map((arm) => ({ x: arm.number, y: arm.accuracy, slot: 0, hollow: true, text: text(arm) })), { domain: extent(trials.map((arm) => arm.number), 0.03), format: (v) => (Number.isInteger(v) ? String(v) : "") });
    const fields = [...new Set(trials.flatMap((arm) => Object.keys(arm.changes)))];
    for (const field of fields.slice(0, 24)) {
      const those = trials.filter((arm) => field in arm.changes);
      const values = those.map((arm) => arm.changes[field]);
      const point = (arm, x) => ({ x, y: arm.accuracy, slot: 0, hollow: true, text: text(arm) });
      if (values.every((value) => typeof value === "number")) {
        const log = Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
        const domain = log ? [Math.min(...values) / 1.2, Math.max(...values) * 1.2] : extent(values, 0.04);
        scatter(grid, field, those.map((arm) => point(arm, arm.changes[field])), { domain, log, format: (v) => (log && v < 0.01 ? v.toExponential(0) : tick(v)) });
      } else {
        const names = [...new Set(values.map(String))];
        const beside = (arm, i) => names.indexOf(String(arm.changes[field])) + (((i * 7) % 11) - 5) / 40;  // so that few lie over others
        scatter(grid, field, those.map((arm, i) => point(arm, beside(arm, i))), { domain: [-0.6, names.length - 0.4], ticks: [...names.keys()], format: (v) => fitted(names[v], 300 / names.length) });
      }
    }
  }
  document.querySelectorAll(".study-charts").forEach((box) => {
    const study = data.studies[Number(box.dataset.study)];
    if (study.design === "search") search(box, study);
    if (study.design !== "search" || study.arms.length <= 40) forest(box, study);
  });
})();
