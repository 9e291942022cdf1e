// The attention page. Data: lm/pictures/page.py. No library; text reaches the page by textContent alone.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const svg = $("drawing");
  const FAINTEST = 5; // of 255: a weaker line is not drawn
  const state = { kind: 0, layer: 0, heads: [0], view: "matrix", values: "weights", scale: "one", word: null, column: null };
  let hovered = null; // a word's number under the pointer: shown in place of the chosen one

  // ---------------------------------------------------------------- the data

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  for (const kind of data.kinds) {
    kind.q = kind.queries.length;
    kind.k = kind.keys.length;
    kind.weights = bytes(kind.weights);
    if (kind.energies) kind.energies.values = bytes(kind.energies.values);
  }
  const kindNow = () => data.kinds[state.kind];
  const showsEnergies = () => state.values === "energies" && Boolean(kindNow().energies);

  // The map of a head: uint8 [q * k].
  function map(kind, layer, head, energies = showsEnergies()) {
    const size = kind.q * kind.k;
    const from = (layer * kind.heads.length + head) * size;
    return (energies ? kind.energies.values : kind.weights).subarray(from, from + size);
  }

  function exact(kind, byte, energies = showsEnergies()) {
    if (!energies) return (byte / 255).toFixed(2);
    return (kind.energies.low + (byte / 255) * (kind.energies.high - kind.energies.low)).toFixed(2);
  }

  // ---------------------------------------------------------------- small helpers

  function make(name, attributes = {}, text = null, parent = null) {
    const element = parent && parent.namespaceURI === svg.namespaceURI
      ? document.createElementNS(svg.namespaceURI, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  // Arrow keys move among the elements of a group of which one has the focus.
  function arrows(group, columns, move) {
    group.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(), Home: -Infinity, End: Infinity };
      if (!(event.key in steps)) return;
      event.preventDefault();
      move(steps[event.key]);
    });
  }
  const within = (value, count) => Math.max(0, Math.min(count - 1, value));

  // Grey pixels: black 0, white 1, as in the paper; or white the largest of the map.
  // A causal map's first row has but one place to look at: it is left out of what is the largest.
  function paint(canvas, values, { q, k, kind }, relative) {
    canvas.width = k;
    canvas.height = q;
    const image = new ImageData(k, q);
    const largest = relative ? values.subarray(kind === "decoder" && q > 1 ? k : 0).reduce((a, b) => Math.max(a, b), 1) : 255;
    for (let i = 0; i < values.length; i++) {
      const grey = Math.min(255, Math.round((values[i] / largest) * 255));
      image.data.set([grey, grey, grey, 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  const ruler = document.createElement("canvas").getContext("2d");
  function widest(words, size) {
    ruler.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
    return Math.ceil(Math.max(...words.map((word) => ruler.measureText(word).width)));
  }

  // ---------------------------------------------------------------- kinds and heads

  function buildKinds() {
    data.kinds.forEach((kind, i) => {
      const tab = make("button", { role: "tab", type: "button", "aria-controls": "detail" }, kind.name, $("kinds"));
      tab.addEventListener("click", () => chooseKind(i));
    });
    arrows($("kinds"), () => 1, (step) => {
      chooseKind(within(state.kind + step, data.kinds.length));
      $("kinds").children[state.kind].focus();
    });
  }

  function chooseKind(i) {
    if (i === state.kind) return;
    Object.assign(state, { kind: i, word: null, column: null });
    state.layer = within(state.layer, kindNow().layers.length);
    state.heads = [within(state.heads[0], kindNow().heads.length)];
    buildGrid();
    draw();
  }

  function buildGrid() {
    const kind = kindNow(), grid = $("grid"), rows = kind.layers.length, columns = kind.heads.length;
    grid.replaceChildren();
    $("overview").hidden = rows * columns === 1;
    const side = Math.max(20, Math.min(64, Math.floor(Math.min(560, innerWidth - 80) / columns) - 8));
    const ratio = Math.max(kind.q, kind.k), wide = Math.max(6, (side * kind.k) / ratio), high = Math.max(6, (side * kind.q) / ratio);
    grid.style.gridTemplateColumns = `auto repeat(${columns}, auto)`;
    make("span", { class: "name", "aria-hidden": "true" }, "", grid);
    kind.heads.forEach((head) => make("span", { class: "name", "aria-hidden": "true" }, String(head), grid));
    for (let l = 0; l < rows; l++) {
      make("span", { class: "name", "aria-hidden": "true" }, String(kind.layers[l]), grid);
      for (let h = 0; h < columns; h++) {
        const name = `layer ${kind.layers[l]}, head ${kind.heads[h]}`;
        const button = make("button", { type: "button", "aria-label": name, title: name }, null, grid);
        const canvas = make("canvas", {}, null, button);
        paint(canvas, map(kind, l, h, false), kind, true);
        canvas.style.cssText = `width:${wide}px;height:${high}px;image-rendering:${ratio > side ? "auto" : "pixelated"}`;
        button.addEventListener("click", (event) => {
          if (event.shiftKey && state.layer === l) return toggleHead(h);
          Object.assign(state, { layer: l, heads: [h] });
          draw();
        });
      }
    }
    $("overview-hint").textContent =
      `${rows} ${rows === 1 ? "layer" : "layers"} down, ${columns} ${columns === 1 ? "head" : "heads"} across; ` +
      "each as bright as its largest weight. Shift and click: several heads of a layer, as lines.";
  }

  const cells = () => [...$("grid").querySelectorAll("button")];

  function toggleHead(h) {
    const heads = state.heads.includes(h) ? state.heads.filter((x) => x !== h) : [...state.heads, h].sort((a, b) => a - b);
    if (!heads.length) return;
    state.heads = heads;
    if (heads.length > 1) Object.assign(state, { view: "lines", values: "weights" });
    draw();
  }

  function buildHeadChips() {
    const kind = kindNow(), box = $("heads");
    box.hidden = state.view !== "lines" || kind.heads.length === 1;
    [...box.querySelectorAll("button")].forEach((button) => button.remove());
    if (box.hidden) return;
    const all = make("button", { type: "button", class: "plain" }, state.heads.length === kind.heads.length ? "one" : "all", box);
    all.addEventListener("click", () => {
      state.heads = state.heads.length === kind.heads.length ? [0] : kind.heads.map((_, h) => h);
      draw();
      $("heads").querySelector("button").focus();
    });
    kind.heads.forEach((head, h) => {
      const button = make("button", { type: "button", "aria-pressed": state.heads.includes(h), "aria-label": `head ${head}` }, String(head), box);
      button.style.setProperty("--of", colour(h));
      button.addEventListener("click", () => {
        toggleHead(h);
        $("heads").querySelectorAll("button")[h + 1].focus();
      });
    });
  }
  const colour = (h) => data.colours[h % data.colours.length];

  // ---------------------------------------------------------------- words that can be chosen

  // A group of query words, one of which can have the focus; `place(i)` gives the box of word i.
  function words(kind, place, size, anchor) {
    const list = make("g", { role: "listbox", "aria-label": "what attends" }, null, svg);
    kind.queries.forEach((word, i) => {
      const { x, y, width, height } = place(i);
      const chosen = state.word === i;
      const item = make("g", { class: "word", role: "option", "aria-selected": chosen, tabindex: i === (state.word ?? 0) ? 0 : -1,
        "aria-label": word }, null, list);
      make("rect", { class: "plate", x, y, width, height, rx: 3 }, null, item);
      const at = anchor === "end" ? x + width - 6 : x + 6;
      make("text", { x: at, y: y + height / 2, "font-size": size, "text-anchor": anchor, "dominant-baseline": "central" }, word, item);
      item.addEventListener("pointerenter", () => hover(i));
      item.addEventListener("pointerleave", () => hover(null));
      item.addEventListener("click", () => choose(state.word === i ? null : i));
      item.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(state.word === i ? null : i, true); }
        if (event.key === "Escape") choose(null, true);
      });
    });
    arrows(list, () => 1, (step) => choose(within((state.word ?? -Math.sign(step)) + step, kind.q), true));
  }

  function choose(i, focus = false) {
    const last = state.word ?? 0;
    state.word = i;
    draw();
    if (focus) svg.querySelectorAll(".word")[i ?? last].focus();
  }

  let redrawing = () => {};
  function hover(i) {
    if (hovered === i) return;
    hovered = i;
    redrawing();
  }
  const wordNow = () => hovered ?? state.word;

  // ---------------------------------------------------------------- the matrix

  function drawMatrix(kind) {
    const values = map(kind, state.layer, state.heads[0]);
    const room = Math.max(300, $("detail").clientWidth);
    const size0 = 14, left = Math.max(100, Math.min(220, widest(kind.queries, size0) + 18)), top0 = Math.min(220, widest(kind.keys, size0) + 18);
    const top = top0 + 20;
    // As large as the window shows whole, never so small that a label cannot be read: then the drawing scrolls.
    const cell = Math.max(14, Math.min(34, Math.floor((room - left - 24) / kind.k), Math.floor((0.85 * innerHeight - top - 14) / kind.q)));
    const size = Math.min(size0, cell - 1);
    const width = left + kind.k * cell + 14, height = top + kind.q * cell + 14;
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    const [across, down] = kind.kind === "cross" ? ["source →", "translation ↓"] : ["attended to →", "attending ↓"];
    make("text", { class: "axis", x: left, y: 15 }, across, svg);
    make("text", { class: "axis", x: left - 8, y: top - 8, "text-anchor": "end" }, down, svg);
    const columns = kind.keys.map((word, j) => {
      const group = make("g", {}, null, svg), x = left + (j + 0.5) * cell;
      make("text", { transform: `translate(${x},${top - 6}) rotate(-90)`, "font-size": size, "dominant-baseline": "central" }, word, group);
      return group;
    });
    const canvas = document.createElement("canvas");
    paint(canvas, values, kind, state.scale === "largest" && !showsEnergies());
    const image = make("image", { href: canvas.toDataURL(), x: left, y: top, width: kind.k * cell, height: kind.q * cell,
      preserveAspectRatio: "none", role: "img", "aria-label": $("caption").textContent }, null, svg);
    const shades = [0, 1].map(() => make("rect", { class: "shade", x: left, width: kind.k * cell, y: top, height: 0 }, null, svg));
    const mark = make("rect", { class: "cross", width: cell, height: cell, visibility: "hidden" }, null, svg);
    words(kind, (i) => ({ x: 4, y: top + i * cell, width: left - 8, height: cell }), size, "end");
    image.addEventListener("pointermove", (event) => {
      const box = image.getBoundingClientRect();
      const j = within(Math.floor(((event.clientX - box.left) / box.width) * kind.k), kind.k);
      const i = within(Math.floor(((event.clientY - box.top) / box.height) * kind.q), kind.q);
      if (state.column === j && hovered === i) return;
      state.column = j;
      hovered = i;
      redrawing();
    });
    image.addEventListener("pointerleave", () => { state.column = null; hovered = null; redrawing(); });
    image.addEventListener("click", () => choose(state.word === hovered ? null : hovered));
    redrawing = () => {
      const i = wordNow(), j = state.column;
      const row = i === null ? null : values.subarray(i * kind.k, (i + 1) * kind.k);
      // A row alone, where a word has been chosen or is pointed at; the cell under the pointer leaves the rest as it is.
      const alone = i !== null && j === null;
      shades[0].setAttribute("height", alone ? i * cell : 0);
      shades[1].setAttribute("y", top + (alone ? i + 1 : 0) * cell);
      shades[1].setAttribute("height", alone ? (kind.q - i - 1) * cell : 0);
      const most = row ? Math.max(1, ...row) : 1;
      columns.forEach((group, c) => {
        group.setAttribute("opacity", !row ? 1 : j !== null ? (c === j ? 1 : 0.4) : 0.3 + 0.7 * (row[c] / most));
        group.firstChild.setAttribute("font-weight", row && (j !== null ? c === j : row[c] === most) ? 650 : 400);
      });
      mark.setAttribute("visibility", j === null || i === null ? "hidden" : "visible");
      if (j !== null && i !== null) {
        mark.setAttribute("x", left + j * cell);
        mark.setAttribute("y", top + i * cell);
      }
      pale(i);
      tell(kind, i, j, values);
    };
    redrawing();
    $("legend").textContent = showsEnergies()
      ? `Energies before the softmax: black ${kind.energies.low.toFixed(2)}, white ${kind.energies.high.toFixed(2)}.`
      : state.scale === "one" ? "Black 0, white 1." : "Black 0, white the largest weight of this map.";
  }

  function pale(i) {
    svg.querySelectorAll(".word").forEach((item, at) => item.classList.toggle("pale", i !== null && at !== i && at !== state.word));
  }

  // ---------------------------------------------------------------- the lines

  function drawLines(kind) {
    const step = 23, size = 14, top = 34;
    const left = Math.max(90, Math.min(240, widest(kind.queries, size) + 22)), right = Math.max(90, Math.min(240, widest(kind.keys, size) + 22));
    const bar = 9, bars = state.heads.length * bar + 6;
    const rows = Math.max(kind.q, kind.k), room = $("detail").clientWidth - left - right - bars - 12;
    const between = Math.max(90, Math.min(room, 320, Math.max(170, 9 * rows)));
    svg.setAttribute("width", left + between + bars + right + 8);
    svg.setAttribute("height", top + rows * step + 14);
    const [from, to] = kind.kind === "cross" ? ["translation", "source"] : ["attending", "attended to"];
    make("text", { class: "axis", x: left - 10, y: 18, "text-anchor": "end" }, from, svg);
    make("text", { class: "axis", x: left + between + bars + 6, y: 18 }, to, svg);
    const middle = (i, count) => top + ((rows - count) / 2 + i + 0.5) * step;
    const beams = make("g", { "stroke-linecap": "butt" }, null, svg), weights = make("g", {}, null, svg);
    const keys = kind.keys.map((word, j) =>
      make("text", { x: left + between + bars + 6, y: middle(j, kind.k), "font-size": size, "dominant-baseline": "central" }, word, svg));
    words(kind, (i) => ({ x: 4, y: middle(i, kind.q) - step / 2, width: left - 8, height: step }), size, "end");
    const maps = state.heads.map((h) => [h, map(kind, state.layer, h, false)]);
    redrawing = () => {
      const only = wordNow();
      beams.replaceChildren();
      weights.replaceChildren();
      const drawn = [];
      for (const [h, values] of maps)
        for (let i = only ?? 0; i < (only === null ? kind.q : only + 1); i++)
          for (let j = 0; j < kind.k; j++) if (values[i * kind.k + j] >= FAINTEST) drawn.push([values[i * kind.k + j], i, j, h]);
      drawn.sort((a, b) => a[0] - b[0]); // the strongest on top
      for (const [weight, i, j, h] of drawn) {
        const w = only === null ? weight / 255 : Math.sqrt(weight / 255); // a row alone has room for its faint lines
        make("line", { x1: left, y1: middle(i, kind.q), x2: left + between + (only === null ? bars : 0), y2: middle(j, kind.k), stroke: colour(h),
          "stroke-opacity": w.toFixed(3), "stroke-width": (0.7 + 2.3 * w).toFixed(2) }, null, beams);
        if (only !== null)
          make("rect", { x: left + between + 3 + state.heads.indexOf(h) * bar, y: middle(j, kind.k) - step / 2 + 2, width: bar,
            height: step - 4, fill: colour(h), "fill-opacity": w.toFixed(3) }, null, weights);
      }
      keys.forEach((text, j) => {
        const most = only === null ? 1 : Math.max(...maps.map(([, values]) => values[only * kind.k + j])) / 255;
        text.setAttribute("opacity", 0.35 + 0.65 * Math.min(1, 2 * most));
      });
      pale(only);
      tell(kind, only, null, maps.length === 1 ? maps[0][1] : null);
    };
    redrawing();
    $("legend").textContent = "A line is as strong as its weight. Point at a word, or choose it, to see its row alone.";
  }

  // ---------------------------------------------------------------- what is said in words

  // The readout: a cell's weight, a row's three largest, or what to do.
  function tell(kind, i, j, values) {
    const line = $("readout");
    line.replaceChildren();
    const add = (text, name = null) => line.append(name ? make(name === "quiet" ? "span" : name, name === "quiet" ? { class: name } : {}, text) : text);
    if (i === null) return add("Point at a word on the left, or move there with Tab and the arrow keys.", "quiet");
    add(kind.queries[i], "b");
    if (j !== null && values) {
      add(showsEnergies() ? " with " : " attends to ");
      add(kind.keys[j], "b");
      add(`: ${exact(kind, values[i * kind.k + j])}`);
    } else if (values) {
      const row = [...values.subarray(i * kind.k, (i + 1) * kind.k)].map((value, c) => [value, c]).sort((a, b) => b[0] - a[0]);
      const energies = state.view === "matrix" && showsEnergies();
      add(energies ? " has the highest energies with " : " attends to ");
      row.slice(0, 3).filter(([value]) => energies || value > 0).forEach(([value, c], n) => {
        if (n) add(", ");
        add(kind.keys[c], "b");
        add(` ${exact(kind, value, energies)}`);
      });
    } else add(" and the chosen heads, each in its colour");
  }

  // ---------------------------------------------------------------- all together

  function draw() {
    const kind = kindNow();
    hovered = null;
    state.column = null;
    if (!kind.energies || state.view === "lines") state.values = "weights";
    if (state.view === "matrix") state.heads = [state.heads[0]];
    [...$("kinds").children].forEach((tab, i) => {
      tab.setAttribute("aria-selected", i === state.kind);
      tab.tabIndex = i === state.kind ? 0 : -1;
    });
    cells().forEach((button, i) => {
      const l = Math.floor(i / kind.heads.length), h = i % kind.heads.length;
      const chosen = l === state.layer && state.heads.includes(h);
      button.setAttribute("aria-pressed", chosen);
      button.tabIndex = l === state.layer && h === state.heads[0] ? 0 : -1;
    });
    const several = state.heads.length > 1;
    const names = state.heads.map((h) => kind.heads[h]).join(", ");
    $("caption").textContent = kind.name === "Alignment" ? (showsEnergies() ? "Alignment: the energies" : "Alignment")
      : `${kind.name}, layer ${kind.layers[state.layer]}, ${several ? "heads" : "head"} ${names}`;
    const bits = kind.entropy[state.layer][state.heads[0]];
    $("facts").textContent = several || showsEnergies() ? "" : `spreads over ${(2 ** bits).toFixed(1)} of ${kind.k} tokens (${bits.toFixed(2)} bits on average)`;
    $("values").hidden = !kind.energies || state.view === "lines";
    $("scales").hidden = state.view === "lines" || showsEnergies();
    for (const [name, value] of [["view", state.view], ["values", state.values], ["scale", state.scale]])
      document.querySelectorAll(`input[name=${name}]`).forEach((input) => { input.checked = input.value === value; });
    buildHeadChips();
    svg.replaceChildren();
    svg.setAttribute("aria-label", $("caption").textContent);
    (state.view === "lines" ? drawLines : drawMatrix)(kind);
    remember();
  }

  // What is shown is in the address, so that a link shows it again.
  function remember() {
    const kind = kindNow();
    const parts = { kind: kind.kind, layer: kind.layers[state.layer], head: state.heads.map((h) => kind.heads[h]).join("."), view: state.view };
    if (state.values !== "weights") parts.values = state.values;
    if (state.scale !== "one") parts.scale = state.scale;
    if (state.word !== null) parts.word = state.word;
    history.replaceState(null, "", "#" + new URLSearchParams(parts));
  }

  function recall() {
    const parts = new URLSearchParams(location.hash.length > 1 ? location.hash.slice(1) : data.opening);
    const at = (list, value) => Math.max(0, list.map(String).indexOf(value));
    if (!data.kinds.some((kind) => kind.kind === parts.get("kind"))) state.kind = data.kinds.length - 1;
    else state.kind = data.kinds.findIndex((kind) => kind.kind === parts.get("kind"));
    const kind = kindNow();
    state.layer = at(kind.layers, parts.get("layer"));
    state.heads = [...new Set((parts.get("head") || "").split(".").map((head) => at(kind.heads, head)))].sort((a, b) => a - b);
    state.view = parts.get("view") === "lines" ? "lines" : "matrix";
    state.values = parts.get("values") === "energies" ? "energies" : "weights";
    state.scale = parts.get("scale") === "largest" ? "largest" : "one";
    const word = Number(parts.get("word") ?? -1);
    state.word = word >= 0 && word < kind.q ? word : null;
  }

  $("title").textContent = data.title;
  const read = data.kinds.some((kind) => kind.kind !== "decoder") ? "Source" : "Text";
  for (const [name, text] of [[read, data.source], ["Output", data.target]]) {
    if (!text) continue;
    make("dt", {}, name, $("texts"));
    make("dd", { dir: "auto" }, text, $("texts"));
  }
  buildKinds();
  arrows($("grid"), () => kindNow().heads.length, (step) => {
    const all = cells(), now = all.indexOf(document.activeElement);
    const next = within(now + step, all.length), columns = kindNow().heads.length;
    Object.assign(state, { layer: Math.floor(next / columns), heads: [next % columns] });
    draw();
    all[next].focus();
  });
  for (const name of ["view", "values", "scale"])
    document.querySelectorAll(`input[name=${name}]`).forEach((input) => input.addEventListener("change", () => { state[name] = input.value; draw(); }));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && state.word !== null) choose(null); });
  addEventListener("hashchange", () => { recall(); buildGrid(); draw(); });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  recall();
  buildGrid();
  draw();
})();
