"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const tip = document.getElementById("tip");
  const by = (id) => document.getElementById(id);
  const unique = (values) => [...new Set(values)];
  const percent = (value) => (value === null ? "–" : (100 * value).toFixed(1) + " %");
  const backbones = unique(data.rows.map((row) => row.backbone));
  const trained = backbones.filter((name) => !isBaseline(name));
  const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "down", "bar", "ring"];
  const HEADLINE = { kNN: "accuracy", linear: "accuracy", MLP: "accuracy", "k-means": "NMI", "1-shot": "accuracy",
    "5-shot": "accuracy", "10-shot": "accuracy", retrieval: "mAP", "kNN multi-label": "mAP",
    "linear multi-label": "mAP", "MLP multi-label": "mAP", "dense linear": "mIoU" };

  function isBaseline(name) { return name === "raw" || /^untrained( \(|$)/.test(name); }
  function colour(name) {
    if (name === "raw") return "var(--base1)";
    if (isBaseline(name)) return "var(--base0)";
    return `var(--c${trained.indexOf(name) % 8})`;
  }
  // bars have no shape: several untrained backbones differ by how strong their grey is
  const untrained = backbones.filter((name) => name !== "raw" && isBaseline(name));
  function strength(name) { return untrained.includes(name) ? 0.65 ** untrained.indexOf(name) : 1; }
  function shape(name) { return SHAPES[backbones.indexOf(name) % SHAPES.length]; }
  function make(name, attributes, parent, text) {
    const node = document.createElementNS(NS, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }
  function html(name, parent, text, className) {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    if (parent) parent.appendChild(node);
    return node;
  }
  function symbol(kind, x, y, r, fill, parent) {
    const paths = {
      square: `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
      triangle: `M${x} ${y - r * 1.2}L${x + r * 1.15} ${y + r}H${x - r * 1.15}z`,
      down: `M${x} ${y + r * 1.2}L${x + r * 1.15} ${y - r}H${x - r * 1.15}z`,
      diamond: `M${x} ${y - r * 1.3}L${x + r * 1.3} ${y}L${x} ${y + r * 1.3}L${x - r * 1.3} ${y}z`,
      cross: `M${x - r} ${y - r / 2.6}h${r * 0.62}v${-r * 0.62}h${r * 0.77}v${r * 0.62}h${r * 0.62}v${r * 0.77}h${-r * 0.62}v${r * 0.62}h${-r * 0.77}v${-r * 0.62}h${-r * 0.62}z`,
      bar: `M${x - r * 0.5} ${y - r * 1.2}h${r}v${r * 2.4}h${-r}z`,
    };
    if (kind === "ring") return make("circle", { cx: x, cy: y, r: r * 0.8, fill: "none", stroke: fill, "stroke-width": r * 0.6, class: "mark" }, parent);
    if (kind === "circle") return make("circle", { cx: x, cy: y, r, fill, class: "mark" }, parent);
    return make("path", { d: paths[kind], fill, class: "mark" }, parent);
  }

  // one tooltip for pointer, touch and keyboard
  function show(mark) {
    tip.replaceChildren();
    const { uri, side, across } = data.sheet;
    if (mark.place >= 0 && uri) {
      const view = html("i", tip);
      const zoom = 80 / side;
      const rows = Math.ceil((Math.max(...data.items.places) + 1) / across);
      view.style.backgroundImage = `url(${uri})`;
      view.style.backgroundSize = `${across * side * zoom}px ${rows * side * zoom}px`;
      view.style.backgroundPosition = `-${(mark.place % across) * 80}px -${Math.floor(mark.place / across) * 80}px`;
    }
    tip.append(mark.text);
    tip.hidden = false;
    const box = mark.node.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const x = Math.min(Math.max(4, box.left + box.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 4);
    const above = box.top - own.height - 8;
    tip.style.left = `${x}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  }
  function hide() { tip.hidden = true; }
  function interactive(svg, marks, label) {
    svg.setAttribute("role", "group");
    svg.setAttribute("aria-label", `${label}. Arrow keys go through the marks.`);
    if (!marks.length) return;
    svg.setAttribute("tabindex", "0");
    let current = -1;
    const go = (place) => {
      if (current >= 0) marks[current].node.classList.remove("current");
      current = place;
      if (current < 0) return hide();
      marks[current].node.classList.add("current");
      show(marks[current]);
    };
    marks.forEach((mark, place) => {
      for (const kind of ["pointerenter", "click"]) mark.node.addEventListener(kind, () => go(place));
      mark.node.addEventListener("pointerleave", () => go(-1));
    });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) go((current + step + marks.length) % marks.length);
      else if (event.key === "Escape") go(-1);
      else return;
      event.preventDefault();
    });
    svg.addEventListener("blur", () => go(-1));
  }
  function canvas(section, height, label) {
    const parent = by(section).querySelector(".chart");
    parent.replaceChildren();
    const width = Math.max(240, parent.clientWidth);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height }, parent);
    return { svg, width, height, marks: [], done() { interactive(svg, this.marks, label); } };
  }
  function legend(section, entries) {
    const parent = by(section).querySelector(".legend");
    parent.replaceChildren();
    for (const [name, fill, kind, opacity] of entries) {
      const item = html("span", parent);
      const mark = symbol(kind, 7, 7, 5, fill, make("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, item));
      if (opacity !== undefined) mark.setAttribute("fill-opacity", opacity);
      item.append(name);
    }
  }
  function missing(section) {
    by(section).querySelector(".hint").textContent = `${by("backbone").value} has no ${by("features").value}; choose other features or another backbone.`;
    for (const part of by(section).querySelectorAll(".chart, .legend")) part.replaceChildren();
  }
  function short(text, room) { return text.length > room ? text.slice(0, Math.max(1, room - 1)) + "…" : text; }
  function hide_section(section, is_hidden) { by(section).hidden = is_hidden; return is_hidden; }
  const present = (rows) => backbones.filter((name) => rows.some((row) => row.backbone === name));
  const entries = (names) => names.map((name) => [name, colour(name), shape(name)]);
  function scale(svg, left, right, height, low = 0) {
    for (let share = 0; share <= 1.001; share += 0.25) {
      const x = left + share * (right - left);
      make("line", { x1: x, x2: x, y1: 4, y2: height - 20, class: "axis" }, svg);
      make("text", { x, y: height - 5, "text-anchor": share > 0.99 ? "end" : "middle", class: "quiet" }, svg, `${Math.round(100 * (low + share * (1 - low)))} %`);
    }
  }

  function overview() {
    const features = by("features").value;
    const rows = data.rows.filter((row) => row.value !== null && ((row.features === features && HEADLINE[row.protocol] === row.metric)
      || (row.protocol.startsWith("cross-") && row.metric === "R@5" && involves(row.features, features) && !inMatrix(row))));
    if (hide_section("overview", !rows.length)) return;
    const names = present(rows);
    const groups = unique(rows.map((row) => group(row)));
    const band = names.length * 13 + 12;
    const chart = canvas("overview", groups.length * band + 28, "Values of all protocols");
    const left = chart.width < 520 ? 12 : 236, right = chart.width - 12;
    const top = chart.width < 520 ? 15 : 0;
    const height = groups.length * (band + top) + 28;
    chart.svg.setAttribute("viewBox", `0 0 ${chart.width} ${height}`);
    chart.svg.setAttribute("height", height);
    scale(chart.svg, left, right, height);
    const at = (value) => left + Math.min(1, Math.max(0, value)) * (right - left);
    groups.forEach((name, place) => {
      const start = place * (band + top) + top;
      if (place) make("line", { x1: 0, x2: chart.width, y1: start - top, y2: start - top, class: "axis" }, chart.svg);
      make("text", top ? { x: left, y: start + 2 } : { x: left - 10, y: start + band / 2 + 4, "text-anchor": "end" }, chart.svg, short(name, 38));
      names.forEach((backbone, line) => {
        const row = rows.find((r) => r.backbone === backbone && group(r) === name);
        if (!row) return;
        const y = start + 12 + line * 13;
        const fill = colour(backbone);
        if (row.chance !== null) make("line", { x1: at(row.chance), x2: at(row.chance), y1: y - 5, y2: y + 5, stroke: "var(--quiet)" }, chart.svg);
        if (row.low !== null) make("line", { x1: at(row.low), x2: at(row.high), y1: y, y2: y, stroke: fill, "stroke-width": 2 }, chart.svg);
        const node = symbol(shape(backbone), at(row.value), y, 4.5, fill, chart.svg);
        const gain = row.gain === null ? "" : `\nover untrained: ${(100 * row.gain).toFixed(1)} points (${(100 * row.gain_low).toFixed(1)} to ${(100 * row.gain_high).toFixed(1)})`;
        chart.marks.push({ node, place: -1, text: `${backbone}\n${name}: ${percent(row.value)}\n${percent(row.low)} to ${percent(row.high)}\nchance ${percent(row.chance)}${gain}` });
      });
    });
    legend("overview", entries(names));
    chart.done();
  }
  // more than two pairs of modalities are a matrix, not a row each
  const pairs = unique(data.rows.filter((row) => row.protocol.startsWith("cross-modal")).map((row) => row.features));
  function inMatrix(row) { return pairs.length > 2 && row.protocol.startsWith("cross-modal"); }
  function cross() {
    const all = data.rows.filter((row) => inMatrix(row) && row.metric === "R@1");
    if (hide_section("cross", !all.length)) return;
    const rows = all.filter((row) => row.backbone === by("backbone").value);
    if (!rows.length) return missing("cross");
    const names = unique(pairs.flatMap((pair) => pair.split(" to ")));
    const chances = rows.map((row) => row.chance).filter((value) => value !== null);
    by("cross").querySelector(".hint").textContent = `${by("backbone").value}: R@1 in percent, from the modality of the row to that of the column: how often the nearest item is the same one. `
      + (chances.length ? `Chance is ${percent(Math.min(...chances))}. ` : "") + "Aligned: after a linear map fitted on the train split; direct: without one.";
    const parent = by("cross").querySelector(".chart");
    parent.replaceChildren();
    for (const protocol of unique(rows.map((row) => row.protocol))) {
      const box = html("div", parent);
      html("h3", box, protocol.replace(/^.*\((.*)\)$/, "$1"));
      const width = Math.max(240, box.clientWidth), left = Math.min(120, width * 0.3), top = 24;
      const cell = Math.max(14, Math.min(64, (width - left - 6) / names.length)), height = top + cell * names.length + 6;
      const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height }, box), marks = [];
      names.forEach((from, y) => {
        make("text", { x: left - 6, y: top + cell * (y + 0.5) + 4, "text-anchor": "end" }, svg, short(from, Math.floor(left / 7.5)));
        make("text", { x: left + cell * (y + 0.5), y: top - 8, "text-anchor": "middle" }, svg, short(from, Math.max(2, Math.floor(cell / 7))));
        names.forEach((to, x) => {
          const row = rows.find((r) => r.protocol === protocol && r.features === `${from} to ${to}`);
          if (!row || row.value === null) return;
          const node = make("rect", { x: left + cell * x + 1, y: top + cell * y + 1, width: cell - 2, height: cell - 2, rx: 2,
            fill: `rgba(var(--heat), ${(0.06 + 0.94 * row.value).toFixed(3)})`, class: "mark" }, svg);
          if (cell > 26) make("text", { x: left + cell * (x + 0.5), y: top + cell * (y + 0.5) + 4, "text-anchor": "middle", "pointer-events": "none",
            style: row.value > 0.55 ? "fill: var(--ground)" : "" }, svg, (100 * row.value).toFixed(0));
          marks.push({ node, place: -1, text: `${from} to ${to}: ${percent(row.value)}\n${percent(row.low)} to ${percent(row.high)}\nchance ${percent(row.chance)}` });
        });
      });
      interactive(svg, marks, `Retrieval across modalities, ${protocol}`);
    }
  }
  function group(row) {
    return row.protocol.startsWith("cross-") ? `${row.features}, ${row.protocol.replace(/^cross-\w+ \((.*)\)$/, "$1")} R@5` : `${row.protocol} ${row.metric}`;
  }
  function involves(pair, features) {
    const parts = features.split("+");
    const [name, sources] = pair.split(": "); // "s1 to s2", or "scan: ct to mr"
    return sources ? parts.includes(name) : pair.split(" to ").every((one) => parts.includes(one));
  }

  function predicted() {
    const features = by("features").value, protocol = by("protocol").value;
    return data.rows.filter((row) => row.features === features && row.protocol === protocol && (row.confusion || row.per_class));
  }
  function bars() {
    const rows = predicted();
    if (hide_section("bars", !rows.length)) return;
    const names = present(rows), several = Boolean(rows[0].per_class);
    by("bars").querySelector(".hint").textContent = `${by("protocol").value}, features ${by("features").value}${rows[0].seeds > 1 ? ", first seed" : ""}`
      + (several ? "" : ": share of the items of a class that are predicted as it");
    const labels = several ? data.facts.labels : data.classes;
    by("bars").querySelector("h2").textContent = several ? "Average precision per label" : "Recall per class";
    const band = names.length * 11 + 26;
    const chart = canvas("bars", labels.length * band + 26, several ? "Average precision per label" : "Recall per class");
    const left = 8, right = chart.width - 14;
    scale(chart.svg, left, right, chart.height);
    labels.forEach((label, place) => {
      const start = place * band;
      make("text", { x: left + 2, y: start + 15 }, chart.svg, short(label, Math.floor(chart.width / 8)));
      names.forEach((backbone, line) => {
        const row = rows.find((r) => r.backbone === backbone);
        const counts = several ? [] : row.confusion[place], total = counts.reduce((a, b) => a + b, 0);
        const share = several ? row.per_class[place] : total ? counts[place] / total : 0;
        const node = make("rect", { x: left, y: start + 20 + line * 11, width: Math.max(1.5, share * (right - left)), height: 9, fill: colour(backbone), "fill-opacity": strength(backbone), class: "mark" }, chart.svg);
        chart.marks.push({ node, place: -1, text: `${backbone}\n${label}: ${several ? "" : `${counts[place]} of ${total} items, `}${percent(share)}` });
      });
    });
    legend("bars", names.map((name) => [name, colour(name), "square", strength(name)]));
    chart.done();
  }

  function confusion() {
    const rows = predicted().filter((r) => r.confusion), row = rows.find((r) => r.backbone === by("backbone").value);
    if (hide_section("confusion", !rows.length)) return;
    if (!row) return missing("confusion");
    by("confusion").querySelector(".hint").textContent = `${row.backbone}, ${row.protocol}, features ${row.features}: rows are true classes, columns what they are predicted as; numbers count items, colours are shares of the row`;
    const count = data.classes.length;
    const parent = by("confusion").querySelector(".chart");
    const left = Math.min(130, parent.clientWidth * 0.3), top = 24;
    const cell = Math.max(14, Math.min(64, (Math.max(240, parent.clientWidth) - left - 6) / count));
    const chart = canvas("confusion", top + cell * count + 6, "Confusion matrix");
    data.classes.forEach((label, y) => {
      make("text", { x: left - 6, y: top + cell * (y + 0.5) + 4, "text-anchor": "end" }, chart.svg, short(label, Math.floor(left / 7.5)));
      make("text", { x: left + cell * (y + 0.5), y: top - 8, "text-anchor": "middle" }, chart.svg, short(label, Math.max(2, Math.floor(cell / 8))));
      const total = row.confusion[y].reduce((a, b) => a + b, 0);
      data.classes.forEach((other, x) => {
        const value = row.confusion[y][x], share = total ? value / total : 0;
        const node = make("rect", { x: left + cell * x + 1, y: top + cell * y + 1, width: cell - 2, height: cell - 2, rx: 2,
          fill: `rgba(var(--heat), ${(0.06 + 0.94 * share).toFixed(3)})`, class: "mark" }, chart.svg);
        if (cell > 20) make("text", { x: left + cell * (x + 0.5), y: top + cell * (y + 0.5) + 4, "text-anchor": "middle", "pointer-events": "none",
          style: share > 0.55 ? "fill: var(--ground)" : "" }, chart.svg, value);
        chart.marks.push({ node, place: -1, text: `${label}\npredicted as ${other}: ${value} of ${total} items, ${percent(share)}` });
      });
    });
    chart.done();
  }

  function plane() {
    const found = (data.embeddings[by("backbone").value] || {})[by("features").value];
    if (!found) return missing("plane");
    by("plane").querySelector(".hint").textContent = `${by("backbone").value}, features ${by("features").value}: first two principal components${data.sheet.uri ? "; a mark shows its item" : ""}`;
    const width = by("plane").querySelector(".chart").clientWidth;
    const chart = canvas("plane", Math.min(460, Math.max(260, width * 0.8)), "Embeddings of test items");
    const w = chart.width - 24, h = chart.height - 24;
    make("line", { x1: 12, x2: 12 + w, y1: 12 + h / 2, y2: 12 + h / 2, class: "axis" }, chart.svg);
    make("line", { x1: 12 + w / 2, x2: 12 + w / 2, y1: 12, y2: 12 + h, class: "axis" }, chart.svg);
    found.items.forEach((item, place) => {
      const [x, y] = found.xy[place], label = data.items.labels[item];
      const fill = label < 0 ? "var(--base1)" : `var(--c${label % 8})`;
      const node = symbol(label < 0 ? "ring" : SHAPES[label % SHAPES.length], 12 + (w * (x + 1)) / 2, 12 + (h * (1 - y)) / 2, 4.5, fill, chart.svg);
      node.setAttribute("fill-opacity", 0.85);
      chart.marks.push({ node, place: data.items.places[item], text: `${data.items.names[item]}\n${label < 0 ? "class unknown" : data.classes[label]}` });
    });
    chart.marks.sort((a, b) => a.text.localeCompare(b.text));
    legend("plane", data.classes.map((name, i) => [name, `var(--c${i % 8})`, SHAPES[i % SHAPES.length]]));
    chart.done();
  }

  function ranks() {
    const features = by("features").value;
    const names = backbones.filter((name) => (data.embeddings[name] || {})[features]);
    if (hide_section("ranks", !names.length)) return;
    const chart = canvas("ranks", 250, "Singular values");
    const left = 42, right = chart.width - 10, bottom = 222, floor = -4;
    const longest = Math.max(...names.map((name) => data.embeddings[name][features].spectrum.length));
    for (let power = 0; power >= floor; power--) {
      const y = 10 + (bottom - 10) * (power / floor);
      make("line", { x1: left, x2: right, y1: y, y2: y, class: "axis" }, chart.svg);
      make("text", { x: left - 6, y: y + 4, "text-anchor": "end", class: "quiet" }, chart.svg, power === 0 ? "1" : `1e${power}`);
    }
    make("text", { x: right, y: 244, "text-anchor": "end", class: "quiet" }, chart.svg, `number, 1 to ${longest}`);
    for (const name of names) {
      const values = data.embeddings[name][features].spectrum;
      const at = (value, i) => [left + (longest > 1 ? i / (longest - 1) : 0) * (right - left), 10 + (bottom - 10) * Math.min(1, Math.log10(Math.max(value, 1e-4)) / floor)];
      const line = values.map((value, i) => at(value, i).map((v) => v.toFixed(1)).join(" ")).join("L");
      make("path", { d: `M${line}`, fill: "none", stroke: colour(name), "stroke-width": 2, "stroke-dasharray": isBaseline(name) ? "5 3" : "none" }, chart.svg);
      const step = Math.max(1, Math.floor(values.length / 8));
      for (let i = 0; i < values.length; i += step) {
        const [x, y] = at(values[i], i);
        const node = symbol(shape(name), x, y, 4, colour(name), chart.svg);
        chart.marks.push({ node, place: -1, text: `${name}\nsingular value ${i + 1}: ${values[i].toPrecision(2)} of the largest` });
      }
    }
    legend("ranks", entries(names));
    chart.done();
  }

  function picture(parent, uri, caption, alt, className) {
    const figure = html("figure", parent);
    const image = html("img", figure, undefined, className);
    image.alt = alt;
    image.src = uri;
    html("figcaption", figure, caption);
  }
  function galleries() {
    const maps = by("maps").querySelector(".chart");
    hide_section("maps", !data.examples.length);
    for (const example of data.examples) {
      const item = html("div", maps, undefined, "item");
      html("h3", item, example.id);
      const row = html("div", item, undefined, "gallery");
      for (const [name, uri] of Object.entries(example.pictures)) {
        picture(row, uri, name, `Item ${example.id} in ${name}`);
        for (const [label, own] of Object.entries(example.maps)) {
          if (own[name]) picture(row, own[name], `${label}, ${name}`, `Patch features of ${label} in ${name}, item ${example.id}`, "map");
        }
      }
    }
    hide_section("panels", !data.panels.length);
    const panels = html("div", by("panels").querySelector(".chart"), undefined, "gallery");
    for (const one of data.panels) picture(panels, one.picture, one.title, `Reconstructions, ${one.title}`);
    hide_section("notes", !data.notes.length);
    for (const text of data.notes) html("li", by("notes").querySelector("ul"), text);
  }

  function options(id, values, chosen) {
    for (const value of values) {
      const option = html("option", by(id), value);
      option.value = value;
    }
    if (chosen !== undefined) by(id).value = chosen;
    by(id).closest("label").hidden = !values.length;
    by(id).addEventListener("change", draw);
  }
  function draw() { hide(); overview(); cross(); bars(); confusion(); plane(); ranks(); }

  const facts = data.facts.data;
  by("facts").textContent = `${facts.test_items} items of ${facts.test_split}, probes fitted on ${facts.train_items} items of train; `
    + `${data.classes.length ? data.classes.length + " classes; " : ""}${data.facts.backbones.map((b) => `${b.label}: ${b.class}, ${(b.parameters / 1e6).toFixed(2)} M parameters`).join("; ")}`;
  const features = unique(data.rows.filter((row) => !row.features.includes(" to ")).map((row) => row.features));
  const users = (name) => backbones.filter((b) => (data.embeddings[b] || {})[name]).length;
  const most = Math.max(...features.map(users));
  options("features", features, features.filter((name) => users(name) === most).pop());
  const protocols = unique(data.rows.filter((row) => row.confusion || row.per_class).map((row) => row.protocol));
  options("protocol", protocols, ["linear", "linear multi-label"].find((name) => protocols.includes(name)) || protocols[0]);
  options("backbone", backbones, backbones[0]);
  galleries();
  draw();
  let waiting = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 120);
  });
  addEventListener("scroll", hide, { passive: true });
})();
