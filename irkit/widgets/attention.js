// Attention: every head as a thumbnail, one in full, and the text that lights up with it. Everything is drawn on two
// canvases; there is no element a cell.

const KEPT = 24; // heads held in full
const LISTED = 8; // rows of the table
const MAP = 520; // pixels of the map of one head, at most
const GAP = 3; // pixels between thumbnails
const GRID = [26, 18]; // where the first thumbnail is

function render({ model, el }) {
  const { layers, heads, queries, tokens, scores, size } = model.get("info");
  const [nLayers, nHeads, nKeys] = [layers.length, heads.length, tokens.length];
  const thumbnails = typed(model.get("thumbnails"), Uint8Array);
  const starts = []; // of each query's weights in a head's data, which leaves the future out
  let length = 0;
  for (const query of queries) {
    starts.push(length);
    length += query + 1;
  }
  const flat = queries.length === 1; // one row: its map goes over the whole width
  const full = new Map(); // "layer head" -> Float32Array, the last used at its end
  const asked = new Set();
  let pointed = null; // [row, key] under the pointer in the map, or null
  let preview = null; // the token under the pointer in the text, or null
  let shades, palette; // 256 colours, as [r, g, b] and as pixels
  let picture = null; // the head's map, a pixel a cell
  let atlas = null; // all thumbnails, in the model's order
  let cell = 0; // pixels of a thumbnail

  // The page.
  const view = root(model, el, "attention", "Attention patterns");
  const grid = make("canvas", { tabIndex: 0, role: "img", "aria-label": "All heads; arrow keys choose the layer and the head" });
  const map = make("canvas", { tabIndex: 0, role: "img", "aria-label": "One head; arrow keys choose the token" });
  const title = make("h4");
  const facts = make("div", { className: "irkit-note" });
  const table = make("table", { className: "irkit-table" });
  const text = make("div", { className: "irkit-text" });
  const status = make("div", { className: "irkit-note", role: "status", "aria-live": "polite" });
  const scale = make("i");
  const high = make("span");
  const sorts = { model: "layer and head", entropy: "entropy", previous_token: "previous token" };
  if (scores.induction) sorts.induction = "induction";
  const bar = make(
    "div",
    { className: "irkit-bar" },
    make("span", { className: "irkit-title" }, `Attention · ${nLayers} × ${nHeads} heads · ${nKeys} tokens`),
    choice(model, "sort", "Sort by", sorts),
    choice(model, "direction", "A token", { reads: "reads (query → key)", read_by: "is read by (key → query)" }),
    tick(model, "mask_first", "Hide the first"),
    choice(model, "colours", "", { viridis: "viridis", cividis: "cividis" }),
  );
  const strip = make("div", { className: "irkit-scroll" }, grid);
  const legend = make("div", { className: "irkit-legend irkit-note" }, "0", scale, high);
  const side = make("div", { className: "irkit-side" }, title, facts, table, text, status);
  view.append(bar, strip, make("div", { className: "irkit-columns" }, make("div", { className: flat ? "irkit-across" : "" }, map, legend), side));
  const tip = tooltip(view);
  const spans = tokens.map((token, index) => make("span", { onclick: () => lock(index), onpointerenter: () => hoverText(index) }, token));
  text.append(...spans);
  text.addEventListener("pointerleave", () => hoverText(null));

  // The state: what is chosen is the model's, so that Python sees and sets it.
  const get = (name) => model.get(name);
  const layerAt = () => Math.max(0, layers.indexOf(get("layer")));
  const headAt = () => Math.max(0, heads.indexOf(get("head")));
  const chosenToken = () => preview ?? Math.min(Math.max(get("token"), 0), nKeys - 1);
  const reading = () => get("direction") === "reads";
  function set(values) {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  }

  /** The places of the heads in the grid: indices in the model's order, best first where they are sorted. */
  function order() {
    const all = Array.from({ length: nLayers * nHeads }, (_, index) => index);
    const by = scores[get("sort")];
    if (!by) return all;
    const sign = get("sort") === "entropy" ? 1 : -1; // the sharpest heads first
    return all.sort((a, b) => sign * (by[a] - by[b]) || a - b);
  }
  let places = order();
  /** Column and row of a place: layers across and heads down, or, sorted, row by row. */
  const spot = (place) =>
    get("sort") === "model" ? [Math.floor(place / nHeads), place % nHeads] : [place % nLayers, Math.floor(place / nLayers)];
  const placeAt = (column, row) => (get("sort") === "model" ? column * nHeads + row : row * nLayers + column);
  const headName = (index) => `layer ${layers[Math.floor(index / nHeads)]}, head ${heads[index % nHeads]}`;

  // One head in full.
  function data() {
    const key = `${get("layer")} ${get("head")}`;
    const found = full.get(key);
    if (found) {
      full.delete(key);
      full.set(key, found);
    } else if (!asked.has(key)) {
      asked.add(key);
      model.send({ kind: "head", layer: get("layer"), head: get("head") });
    }
    return found;
  }
  function received(message, buffers) {
    if (message.kind !== "head") return;
    const key = `${message.layer} ${message.head}`;
    asked.delete(key);
    full.set(key, typed(buffers[0], Float32Array));
    if (full.size > KEPT) full.delete(full.keys().next().value);
    picture = null;
    drawAll();
  }
  const weight = (found, row, key) => (key <= queries[row] ? found[starts[row] + key] : 0);
  /** The weights that belong to a token, by the token at their other end. */
  function weights(found, token) {
    if (!reading()) return queries.map((query, row) => ({ token: query, weight: weight(found, row, token) })).filter((each) => each.token >= token);
    const row = queries.indexOf(token);
    return row < 0 ? [] : Array.from({ length: token + 1 }, (_, key) => ({ token: key, weight: weight(found, row, key) }));
  }
  const hidden = (key) => get("mask_first") && key === 0;
  function largest(found) {
    let most = 0;
    queries.forEach((query, row) => {
      for (let key = get("mask_first") ? 1 : 0; key <= query; key++) most = Math.max(most, found[starts[row] + key]);
    });
    return most || 1;
  }
  /** The colour's number: the square root of the weight, so that small weights can be told apart. */
  const shade = (value, most) => Math.round(255 * Math.sqrt(Math.min(1, value / most)));

  // Drawing.
  function recolour() {
    shades = colourMap(get("colours"));
    palette = pixels(shades);
    scale.style.background = `linear-gradient(to right, ${[0, 64, 128, 191, 255].map((at) => css(shades[at])).join(",")})`;
    picture = atlas = null;
  }
  function drawAtlas() {
    const [tall, wide] = size;
    const image = new ImageData(nLayers * wide, nHeads * tall);
    const out = new Uint32Array(image.data.buffer);
    for (let index = 0; index < nLayers * nHeads; index++) {
      const from = index * tall * wide;
      const corner = (index % nHeads) * tall * image.width + Math.floor(index / nHeads) * wide;
      let most = 1;
      const first = get("mask_first") ? 1 : 0;
      for (let at = 0; at < tall * wide; at++) if (at % wide >= first) most = Math.max(most, thumbnails[from + at]);
      for (let at = 0; at < tall * wide; at++) {
        const value = thumbnails[from + at];
        if (value && at % wide >= first) out[corner + Math.floor(at / wide) * image.width + (at % wide)] = palette[Math.round((255 * (value - 1)) / Math.max(most - 1, 1))];
      }
    }
    atlas = new OffscreenCanvas(image.width, image.height);
    atlas.getContext("2d").putImageData(image, 0, 0);
  }
  function drawGrid() {
    const { faint, accent, font, line } = theme(view);
    const [left, top] = GRID;
    const room = strip.clientWidth - left - 2;
    if (room <= 0) return;
    if (!atlas) drawAtlas();
    cell = Math.max(14, Math.min(56, Math.floor(room / nLayers) - GAP));
    const step = cell + GAP;
    const context = sheet(grid, left + nLayers * step + 2, top + nHeads * step + 2);
    const [tall, wide] = size;
    context.font = `10px ${font}`;
    context.fillStyle = faint;
    if (get("sort") === "model") {
      context.textAlign = "center";
      const every = Math.ceil(20 / step);
      layers.forEach((layer, at) => at % every || context.fillText(layer, left + at * step + cell / 2, top / 2));
      context.textAlign = "right";
      heads.forEach((head, at) => context.fillText(head, left - 6, top + at * step + cell / 2));
    } else {
      context.textAlign = "left";
      const values = scores[get("sort")];
      const [from, to] = [values[places[0]], values[places.at(-1)]].map((value) => value.toFixed(2));
      context.fillText(`${sorts[get("sort")]}, row by row: from ${from} to ${to}`, left, top / 2);
    }
    context.imageSmoothingEnabled = wide > cell * (window.devicePixelRatio || 1);
    context.imageSmoothingQuality = "high";
    context.strokeStyle = line;
    places.forEach((index, place) => {
      const [column, row] = spot(place);
      const [x, y] = [left + column * step, top + row * step];
      context.strokeRect(x - 0.5, y - 0.5, cell + 1, cell + 1);
      context.drawImage(atlas, Math.floor(index / nHeads) * wide, (index % nHeads) * tall, wide, tall, x, y, cell, cell);
      if (index === layerAt() * nHeads + headAt()) {
        context.save();
        context.strokeStyle = accent;
        context.lineWidth = 2;
        context.strokeRect(x - 1.5, y - 1.5, cell + 3, cell + 3);
        context.restore();
      }
    });
  }
  function drawPicture(found) {
    const most = largest(found);
    const image = new ImageData(nKeys, queries.length);
    const out = new Uint32Array(image.data.buffer);
    queries.forEach((query, row) => {
      for (let key = get("mask_first") ? 1 : 0; key <= query; key++) out[row * nKeys + key] = palette[shade(found[starts[row] + key], most)];
    });
    picture = new OffscreenCanvas(nKeys, queries.length);
    picture.getContext("2d").putImageData(image, 0, 0);
    picture.most = most;
    high.textContent = `${most.toPrecision(3)} · the colour grows with the square root of the weight`;
  }
  const letters = tokens.map((token) => tokenLabel(token, 12).length);
  const [longest, longestQuery] = [Math.max(...letters), Math.max(...queries.map((query) => letters[query]))];
  /** Where the map's cells are: the labels take their room where cells are large enough to have one each. */
  function frame() {
    const all = Math.max(200, flat ? view.clientWidth - 32 : Math.min(MAP, view.clientWidth - 32));
    const beside = 14 + 7 * longestQuery;
    const beyond = 3.5 * letters.at(-1); // what the last label, slanted, takes behind its cell
    const named = flat ? (all - beside - beyond) / nKeys >= 12 : nKeys <= 40;
    const [left, top] = named ? [beside, 12 + 5.5 * longest] : [34, 20];
    const room = all - left - (flat && named ? beyond : 2);
    const across = named ? Math.min(26, Math.floor(room / nKeys)) : room / nKeys;
    const down = queries.length === nKeys ? across : Math.min(26, room / queries.length);
    return { named, left, top, across, down, width: across * nKeys, height: down * queries.length, beyond: named ? beyond : 2 };
  }
  function drawMap() {
    const { ink, faint, accent, font, line } = theme(view);
    const { named, left, top, across, down, width, height, beyond } = frame();
    const context = sheet(map, left + width + beyond, top + height + 2);
    const found = data();
    context.font = `11px ${font}`;
    const [row, key] = focus();
    const every = named ? 1 : Math.ceil(24 / across);
    for (let at = 0; at < nKeys; at += every) {
      context.save();
      context.translate(left + (at + 0.5) * across, top - 5);
      if (named) context.rotate(-Math.PI / 3.2);
      context.textAlign = named ? "left" : "center";
      context.fillStyle = named && at === key ? accent : faint;
      context.fillText(named ? tokenLabel(tokens[at], 12) : at, 0, named ? 0 : -4);
      context.restore();
    }
    context.textAlign = "right";
    const skip = named ? 1 : Math.ceil(24 / down);
    for (let at = 0; at < queries.length; at += skip) {
      context.fillStyle = named && at === row ? accent : faint;
      context.fillText(named ? tokenLabel(tokens[queries[at]], 12) : queries[at], left - 5, top + (at + 0.5) * down);
    }
    context.strokeStyle = line;
    context.strokeRect(left - 0.5, top - 0.5, width + 1, height + 1);
    if (!found) {
      context.textAlign = "center";
      context.fillStyle = faint;
      context.fillText("asking the kernel for this head …", left + width / 2, top + height / 2);
      return;
    }
    if (!picture) drawPicture(found);
    context.imageSmoothingEnabled = across * (window.devicePixelRatio || 1) < 1;
    context.drawImage(picture, left, top, width, height);
    context.strokeStyle = ink;
    context.globalAlpha = 0.75;
    if (row >= 0 && (reading() || pointed)) context.strokeRect(left, top + row * down, width, Math.max(down, 1));
    if (key >= 0 && (!reading() || pointed)) context.strokeRect(left + key * across, top, Math.max(across, 1), height);
  }
  /** Row and key that the map marks: those under the pointer, else the chosen token's. */
  function focus() {
    if (pointed) return pointed;
    return reading() ? [queries.indexOf(chosenToken()), -1] : [-1, chosenToken()];
  }
  function drawSide() {
    const index = layerAt() * nHeads + headAt();
    title.textContent = `Layer ${get("layer")}, head ${get("head")}`;
    const told = [`entropy ${scores.entropy[index].toFixed(2)} nats`, `previous token ${scores.previous_token[index].toFixed(2)}`];
    if (scores.induction) told.push(`induction ${scores.induction[index].toFixed(2)}`);
    facts.textContent = told.join(" · ");
    const found = data();
    const [row, key] = focus();
    const token = reading() ? (row < 0 ? chosenToken() : queries[row]) : key;
    if (!found) return;
    const all = weights(found, token).filter((each) => !(reading() && hidden(each.token)));
    const most = Math.max(...all.map((each) => each.weight), 1e-9);
    const shares = new Map(all.map((each) => [each.token, Math.round(50 * Math.sqrt(each.weight / most))]));
    spans.forEach((span, at) => {
      span.style.background = shares.get(at) ? `color-mix(in srgb, var(--irkit-accent) ${shares.get(at)}%, transparent)` : "";
      span.classList.toggle("irkit-here", at === token);
    });
    if (preview === null) text.scrollTop = spans[token].offsetTop - text.offsetTop - text.clientHeight / 2;
    all.sort((a, b) => b.weight - a.weight || a.token - b.token);
    const verb = reading() ? "reads" : "is read by";
    table.replaceChildren(
      make("caption", {}, `${token} “`, make("span", { className: "irkit-token" }, tokenLabel(tokens[token], 24)), `” ${verb}`),
      make("tr", {}, ...["position", "token", "weight", ""].map((name) => make("th", { scope: "col" }, name))),
      ...all.slice(0, LISTED).map((each) => {
        const stripe = make("span");
        stripe.style.width = `${(100 * each.weight) / most}%`;
        return make(
          "tr",
          {},
          make("td", { className: "irkit-number" }, each.token),
          make("td", { className: "irkit-token" }, tokenLabel(tokens[each.token], 18)),
          make("td", { className: "irkit-number" }, each.weight.toFixed(4)),
          make("td", { className: "irkit-bars" }, stripe),
        );
      }),
    );
    if (!all.length) table.append(make("tr", {}, make("td", { colSpan: 4 }, "this token's row is not in the trace")));
    status.textContent = get("locked")
      ? `Locked on token ${chosenToken()}; Escape, or a click on it, lets go.`
      : "Hover to look, click to lock. Arrows: layer and head above, tokens in the map.";
  }
  function drawAll() {
    if (!view.clientWidth) return; // hidden: drawn when it is seen
    drawGrid();
    drawMap();
    drawSide();
  }
  const redraw = oncePerFrame(drawAll);
  const redrawHead = oncePerFrame(() => {
    if (!view.clientWidth) return;
    drawMap();
    drawSide();
  });

  // Pointer and keys.
  /** Lock a token; or let it go, where it is the one. */
  function lock(token) {
    set({ token, locked: !(get("locked") && token === get("token")) });
    pointed = preview = null;
  }
  function hoverText(token) {
    preview = get("locked") ? null : token;
    redrawHead();
  }
  function underMap(event) {
    const { left, top, across, down } = frame();
    const box = map.getBoundingClientRect();
    const key = Math.floor((event.clientX - box.left - left) / across);
    const row = Math.floor((event.clientY - box.top - top) / down);
    return key >= 0 && row >= 0 && key < nKeys && row < queries.length ? [row, key] : null;
  }
  map.addEventListener("pointermove", (event) => {
    const at = underMap(event);
    const found = data();
    if (!at || !found) return leaveMap();
    const [row, key] = at;
    const shown = key > queries[row] ? "not read: it comes later" : weight(found, row, key).toFixed(4);
    tip.show(
      event,
      make("span", { className: "irkit-token" }, `${queries[row]} ${tokenLabel(tokens[queries[row]])} → ${key} ${tokenLabel(tokens[key])}`),
      `  ${shown}`,
    );
    if (!get("locked")) pointed = at;
    redrawHead();
  });
  function leaveMap() {
    tip.hide();
    if (pointed) redrawHead();
    pointed = null;
  }
  map.addEventListener("pointerleave", leaveMap);
  map.addEventListener("click", (event) => {
    const at = underMap(event);
    if (at) lock(reading() ? queries[at[0]] : at[1]);
    map.focus({ preventScroll: true });
  });
  function underGrid(event) {
    const [left, top] = GRID;
    const step = cell + GAP;
    const box = grid.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - left) / step);
    const row = Math.floor((event.clientY - box.top - top) / step);
    return column >= 0 && row >= 0 && column < nLayers && row < nHeads ? places[placeAt(column, row)] : undefined;
  }
  function chooseHead(index) {
    set({ layer: layers[Math.floor(index / nHeads)], head: heads[index % nHeads] });
  }
  grid.addEventListener("pointermove", (event) => {
    const index = underGrid(event);
    if (index === undefined) return tip.hide();
    const told = Object.entries(scores).map(([name, values]) => `${name.replace("_", " ")} ${values[index].toFixed(2)}`);
    tip.show(event, make("b", {}, headName(index)), make("br"), told.join(" · "));
  });
  grid.addEventListener("pointerleave", tip.hide);
  grid.addEventListener("click", (event) => {
    const index = underGrid(event);
    if (index !== undefined) chooseHead(index);
    grid.focus({ preventScroll: true });
  });
  grid.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    const [column, row] = spot(places.indexOf(layerAt() * nHeads + headAt()));
    const to = [Math.min(Math.max(column + step[0], 0), nLayers - 1), Math.min(Math.max(row + step[1], 0), nHeads - 1)];
    chooseHead(places[placeAt(...to)]);
  });
  map.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return set({ locked: false });
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return lock(chosenToken());
    }
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    const among = reading() ? queries : tokens.map((_, at) => at);
    const at = Math.max(0, among.indexOf(chosenToken())) + step[0] + step[1];
    set({ token: among[Math.min(Math.max(at, 0), among.length - 1)] });
  });

  model.on("msg:custom", received);
  model.on("change:sort", () => {
    places = order();
    redraw();
  });
  for (const name of ["layer", "head"])
    model.on(`change:${name}`, () => {
      picture = null;
      redraw();
    });
  for (const name of ["token", "direction", "locked"]) model.on(`change:${name}`, redrawHead);
  for (const name of ["colours", "mask_first"])
    model.on(`change:${name}`, () => {
      recolour();
      redraw();
    });
  recolour();
  redraw();
  return whenSeen(view, redraw);
}

export default { render };
