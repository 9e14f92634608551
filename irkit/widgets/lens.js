// The logit lens: layers up, positions across, the likeliest next token in each cell; one token followed through all.
// One canvas as wide as the page shows the columns in sight.

const NARROW = 74; // pixels of a cell, at least; wider where there is room
const BROAD = 118;
const TALL = 19;
const LEFT = 48; // room of the layers' names
const TOP = 22; // and of the text's tokens
const CHART = [420, 150];

function render({ model, el }) {
  const { layers, positions, tokens, k, words } = model.get("info");
  const [nLayers, nPositions] = [layers.length, positions.length];
  const ids = typed(model.get("ids"), Int32Array);
  const logprobs = typed(model.get("logprobs"), Float32Array);
  const kl = typed(model.get("kl"), Float32Array);
  const farthest = Math.max(...kl, 1e-6);
  let pointed = null; // [row, column] under the pointer, or null
  let shades;
  let wide = NARROW; // pixels of a cell

  const view = root(model, el, "lens", "Logit lens");
  const canvas = make("canvas", { tabIndex: 0, role: "img", "aria-label": "Layers and positions; arrow keys choose" });
  const spacer = make("div", {}, canvas);
  const scroll = make("div", { className: "irkit-wide" }, spacer);
  const title = make("h4");
  const facts = make("div", { className: "irkit-note" });
  const table = make("table", { className: "irkit-table" });
  const chart = make("canvas", { role: "img" });
  const chartTitle = make("h4");
  const chartFacts = make("div", { className: "irkit-note" });
  const status = make("div", { className: "irkit-note", role: "status", "aria-live": "polite" });
  const scale = make("i");
  const ends = [make("span"), make("span")];
  const wanted = make("input", { type: "text", size: 12, placeholder: " Paris", "aria-label": "Token to follow" });
  const form = make("form", { className: "irkit-follow" }, make("label", {}, "Follow ", wanted), make("button", {}, "Follow"));
  view.append(
    make(
      "div",
      { className: "irkit-bar" },
      make("span", { className: "irkit-title" }, `Logit lens · ${nLayers} layers · ${nPositions} positions`),
      choice(model, "shown", "Colour by", { probability: "probability", kl: "KL from the last layer", rank: "rank of the followed token" }),
      choice(model, "colours", "", { viridis: "viridis", cividis: "cividis" }),
      make("span", { className: "irkit-legend" }, ends[0], scale, ends[1]),
    ),
    scroll,
    make(
      "div",
      { className: "irkit-columns" },
      make("div", { className: "irkit-side" }, title, facts, table, status),
      make("div", { className: "irkit-side" }, chartTitle, chartFacts, chart, form),
    ),
  );
  const tip = tooltip(view);

  const get = (name) => model.get(name);
  function set(values) {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  }
  const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
  const place = () => pointed ?? [within(layers.indexOf(get("layer")), nLayers), within(positions.indexOf(get("position")), nPositions)];
  const word = (id) => words[id] ?? `#${id}`;
  const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(2)} %`;
  const ranks = () => typed(get("ranks"), Int32Array);
  const shade = {
    probability: (at) => Math.round(255 * Math.exp(logprobs[at * k])),
    kl: (at) => Math.round(255 * (kl[at] / farthest)),
    rank: (at, its, worst) => Math.round(255 * (1 - Math.log1p(its[at]) / Math.log1p(worst))),
  };

  function drawGrid() {
    const { ink, faint, accent, font, line } = theme(view);
    shades = colourMap(get("colours"));
    if (scroll.clientWidth <= LEFT) return;
    wide = Math.min(BROAD, Math.max(NARROW, Math.floor((scroll.clientWidth - LEFT - 2) / nPositions)));
    const width = Math.min(scroll.clientWidth, LEFT + nPositions * wide + 2);
    const letters = Math.floor((wide - 8) / 7);
    const context = sheet(canvas, width, TOP + nLayers * TALL + 2);
    spacer.style.width = `${LEFT + nPositions * wide + 2}px`;
    const offset = scroll.scrollLeft;
    const its = ranks();
    const worst = its.reduce((a, b) => Math.max(a, b), 1);
    const how = shade[get("shown")];
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, width - LEFT, TOP + nLayers * TALL + 2);
    context.clip();
    const from = Math.floor(offset / wide);
    const to = Math.min(nPositions, Math.ceil((offset + width - LEFT) / wide));
    const [row, column] = place();
    for (let at = from; at < to; at++) {
      const x = LEFT + at * wide - offset;
      context.font = `${at === column ? "bold " : ""}11px ${font}`;
      context.fillStyle = at === column ? accent : faint;
      context.fillText(tokenLabel(tokens[at], letters + 1), x + 4, TOP / 2);
      context.font = `11px ${font}`;
      for (let layer = 0; layer < nLayers; layer++) {
        const cell = layer * nPositions + at;
        const colour = shades[how(cell, its, worst)];
        const y = TOP + (nLayers - 1 - layer) * TALL;
        context.fillStyle = css(colour);
        context.fillRect(x, y, wide - 1, TALL - 1);
        context.fillStyle = inkOn(colour);
        context.fillText(tokenLabel(word(ids[cell * k]), letters), x + 4, y + TALL / 2);
        if (word(ids[cell * k]) === get("followed")) {
          context.strokeStyle = inkOn(colour);
          context.strokeRect(x + 1.5, y + 1.5, wide - 4, TALL - 4);
        }
      }
    }
    context.strokeStyle = ink;
    context.lineWidth = 2;
    context.strokeRect(LEFT + column * wide - offset - 0.5, TOP + (nLayers - 1 - row) * TALL - 0.5, wide, TALL);
    context.restore();
    context.textAlign = "right";
    layers.forEach((name, layer) => {
      context.fillStyle = layer === row ? accent : faint;
      context.fillText(name, LEFT - 6, TOP + (nLayers - 1 - layer) * TALL + TALL / 2);
    });
    context.strokeStyle = line;
    scale.style.background = `linear-gradient(to right, ${[0, 64, 128, 191, 255].map((at) => css(shades[at])).join(",")})`;
    const told = { probability: ["0", "1"], kl: ["0", `${farthest.toFixed(1)} nats`], rank: [`rank ${worst}`, "0"] };
    told[get("shown")].forEach((text, at) => (ends[at].textContent = text));
  }
  function drawSide() {
    const [row, column] = place();
    const cell = row * nPositions + column;
    title.textContent = `Layer ${layers[row]}, after ${positions[column]} “${tokenLabel(tokens[column], 24)}”`;
    facts.textContent = `KL from the last layer ${kl[cell].toFixed(3)} nats · click a token to follow it`;
    const best = Math.exp(logprobs[cell * k]);
    table.replaceChildren(
      make("tr", {}, ...["", "next token", "probability", ""].map((name) => make("th", { scope: "col" }, name))),
      ...Array.from({ length: k }, (_, index) => {
        const id = ids[cell * k + index];
        const stripe = make("span");
        stripe.style.width = `${(100 * Math.exp(logprobs[cell * k + index])) / best}%`;
        const pick = make("button", { className: "irkit-pick", onclick: () => follow(id) }, tokenLabel(word(id), 24));
        pick.classList.toggle("irkit-here", word(id) === get("followed"));
        return make(
          "tr",
          {},
          make("td", { className: "irkit-number" }, index + 1),
          make("td", { className: "irkit-token" }, pick),
          make("td", { className: "irkit-number" }, percent(logprobs[cell * k + index])),
          make("td", { className: "irkit-bars" }, stripe),
        );
      }),
    );
    const problem = get("problem");
    status.textContent = problem || (get("locked") ? "Locked; Escape, or a click on the cell, lets go." : "Hover to look, click to lock, arrow keys to move.");
    drawChart(row, column);
  }
  /** The rank of the followed token by layer, on a logarithmic scale, the first place on top. */
  function drawChart(row, column) {
    const { faint, accent, font, line, ink } = theme(view);
    const its = ranks();
    const probabilities = typed(get("probabilities"), Float32Array);
    const at = (layer) => layer * nPositions + column;
    const name = get("followed") ? `“${tokenLabel(get("followed"), 24)}”` : "the token that is chosen at the end";
    chartTitle.textContent = `Rank of ${name}`;
    chartFacts.textContent = `layer ${layers[row]}: ${its[at(row)]} ahead of it, probability ${(100 * probabilities[at(row)]).toFixed(2)} %`;
    const [width, height] = [Math.min(CHART[0], chart.parentElement.clientWidth), CHART[1]];
    const context = sheet(chart, width, height);
    const [left, right, top, bottom] = [44, 8, 8, 20];
    const worst = Math.max(10, ...layers.map((_, layer) => its[at(layer)]));
    const x = (layer) => left + ((width - left - right) * layer) / Math.max(nLayers - 1, 1);
    const y = (rank) => top + ((height - top - bottom) * Math.log1p(rank)) / Math.log1p(worst);
    context.font = `10px ${font}`;
    context.fillStyle = faint;
    context.strokeStyle = line;
    context.textAlign = "right";
    for (let rank = 0; rank <= worst; rank = rank ? 10 * rank : 10) {
      context.fillText(rank, left - 6, y(rank));
      context.strokeRect(left, y(rank), width - left - right, 0);
    }
    context.textAlign = "center";
    const every = Math.ceil(nLayers / 8);
    layers.forEach((name, layer) => layer % every || context.fillText(name, x(layer), height - 8));
    context.strokeStyle = accent;
    context.lineWidth = 2;
    context.beginPath();
    layers.forEach((_, layer) => context.lineTo(x(layer), y(its[at(layer)])));
    context.stroke();
    context.fillStyle = ink;
    context.beginPath();
    context.arc(x(row), y(its[at(row)]), 3.5, 0, 7);
    context.fill();
    chart.setAttribute("aria-label", `Ranks by layer: ${layers.map((name, layer) => `${name}: ${its[at(layer)]}`).join(", ")}`);
  }
  function drawAll() {
    drawGrid();
    drawSide();
  }
  const redraw = oncePerFrame(drawAll);

  const follow = (token) => model.send({ kind: "follow", token });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (wanted.value) follow(wanted.value);
  });
  function under(event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - LEFT + scroll.scrollLeft) / wide);
    const row = nLayers - 1 - Math.floor((event.clientY - box.top - TOP) / TALL);
    const inside = event.clientX - box.left >= LEFT && column < nPositions && row >= 0 && row < nLayers;
    return inside ? [row, column] : null;
  }
  canvas.addEventListener("pointermove", (event) => {
    const at = under(event);
    if (!at) return leave();
    const cell = at[0] * nPositions + at[1];
    const lines = Array.from({ length: k }, (_, index) => [word(ids[cell * k + index]), percent(logprobs[cell * k + index])]);
    tip.show(
      event,
      make("b", {}, `layer ${layers[at[0]]}, position ${positions[at[1]]}`),
      ...lines.map(([name, share]) => make("div", {}, make("span", { className: "irkit-token" }, tokenLabel(name)), `  ${share}`)),
      make("div", {}, `KL ${kl[cell].toFixed(3)} nats · rank ${ranks()[cell]}`),
    );
    if (!get("locked")) pointed = at;
    redraw();
  });
  function leave() {
    tip.hide();
    if (pointed) redraw();
    pointed = null;
  }
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("click", (event) => {
    const at = under(event);
    if (at) lock(at);
    canvas.focus({ preventScroll: true });
  });
  function lock([row, column]) {
    const same = layers[row] === get("layer") && positions[column] === get("position");
    pointed = null;
    set({ layer: layers[row], position: positions[column], locked: !(same && get("locked")) });
  }
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return set({ locked: false });
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return lock(place());
    }
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    pointed = null;
    const [row, column] = place();
    set({ layer: layers[within(row + step[0], nLayers)], position: positions[within(column + step[1], nPositions)] });
    reveal();
  });
  /** Scroll until the chosen position is in sight. */
  function reveal() {
    const x = place()[1] * wide;
    const room = scroll.clientWidth - LEFT - wide;
    scroll.scrollLeft = Math.min(Math.max(scroll.scrollLeft, x - room), x);
  }
  scroll.addEventListener("scroll", redraw);
  for (const name of ["layer", "position", "locked", "shown", "colours", "ranks", "probabilities", "followed", "problem"]) {
    model.on(`change:${name}`, redraw);
  }
  drawAll();
  reveal();
  return whenSeen(view, redraw);
}

export default { render };
