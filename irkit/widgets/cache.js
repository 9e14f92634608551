// A KV cache: its text, and a map of layers up and positions across; what is chosen can be rewound to, forked, dropped.

const SPACE = [40, 20]; // room of the layers' numbers, and of the positions
const NEAR = 300; // tokens of the text to each side of the chosen one
const TALL = 9; // pixels of a layer, at least

function render({ model, el }) {
  const kept = new Map(); // "part head" -> Float32Array [layer, position] of this version
  const asked = new Set();
  let info = model.get("info");
  let pointed = null; // [layer, position] under the pointer
  let wide = 8; // pixels of a position

  const view = root(model, el, "cache", "KV cache");
  const get = (trait) => model.get(trait);
  function set(values) {
    for (const [trait, value] of Object.entries(values)) model.set(trait, value);
    model.save_changes();
  }
  const count = () => info.ids.length;
  const position = () => clamp(get("position"), Math.max(count(), 1));
  /** The positions that are chosen, from the first to the last. */
  function range() {
    const until = clamp(get("until"), Math.max(count(), 1));
    return [Math.min(position(), until), Math.max(position(), until)];
  }

  // The page.
  const title = make("span", { className: "irkit-title" });
  const heads = { "-1": "mean of all" };
  for (let head = 0; head < info.heads; head++) heads[head] = `head ${head}`;
  const head = choice(model, "head", "Of", heads, Number);
  const again = make("button", { onclick: () => model.send({ kind: "refresh" }), title: "What does the cache hold now?" }, "Look again");
  const fill = make("div", { className: "irkit-fill" }, make("i"), make("i"));
  const facts = make("div", { className: "irkit-note" });
  const map = make("canvas", { tabIndex: 0, role: "img", "aria-label": "Layers and positions; arrow keys choose, Shift with them chooses several positions" });
  const spacer = make("div", {}, map);
  const scroll = make("div", { className: "irkit-wide" }, spacer);
  const scale = make("i");
  const ends = [make("span"), make("span")];
  const text = make("div", { className: "irkit-text", role: "group", "aria-label": "Text of the cache" });
  const here = make("h4");
  const told = make("div", { className: "irkit-note", role: "status", "aria-live": "polite" });
  const act = (kind, words) => make("button", { onclick: () => words() }, kind);
  const fork = act("Fork here", () => model.send({ kind: "fork", position: range()[1] + 1 }));
  const rewind = act("Rewind to here", () => model.send({ kind: "rewind", position: range()[1] + 1 }));
  const drop = act("Drop", () => model.send({ kind: "drop", first: range()[0], last: range()[1] }));
  fork.title = "A fork that ends with the chosen token";
  rewind.title = "Forget what comes after the chosen token";
  drop.title = "Forget the chosen tokens; those behind move up";
  const chart = make("canvas", { role: "img" });
  const table = make("table", { className: "irkit-table" });
  const forks = make("div", { className: "irkit-forks" });
  view.append(
    make(
      "div",
      { className: "irkit-bar" },
      title,
      choice(model, "shown", "Length of", { keys: "keys", values: "values" }),
      head,
      choice(model, "scaled_by", "Colours of", { layer: "each layer", all: "all layers" }),
      choice(model, "colours", "", { viridis: "viridis", cividis: "cividis" }),
      again,
    ),
    fill,
    facts,
    scroll,
    make("div", { className: "irkit-legend irkit-note" }, ends[0], scale, ends[1]),
    make(
      "div",
      { className: "irkit-columns" },
      make("div", { className: "irkit-side" }, text, make("div", { className: "irkit-row" }, fork, rewind, drop), told, forks),
      make("div", { className: "irkit-side" }, here, chart, make("details", {}, make("summary", {}, "As a table"), table)),
    ),
  );
  const tip = tooltip(view);

  // What is shown.
  function lengths(part = get("shown")) {
    const key = `${part} ${get("head")}`;
    if (!kept.has(key) && !asked.has(key) && count()) {
      asked.add(key);
      model.send({ kind: "lengths", part, head: get("head"), version: info.version });
    }
    return kept.get(key);
  }
  function received(message, buffers) {
    if (message.kind !== "lengths" || message.version !== info.version) return;
    kept.set(`${message.part} ${message.head}`, typed(buffers[0], Float32Array));
    redraw();
  }
  /** The least and the largest of each layer, or of all, without the first position, on which attention rests. */
  function bounds(values) {
    const n = count();
    const each = Array.from({ length: info.layers }, (_, layer) => {
      let [low, high] = [Infinity, 0];
      for (let at = n > 1 ? 1 : 0; at < n; at++) {
        low = Math.min(low, values[layer * n + at]);
        high = Math.max(high, values[layer * n + at]);
      }
      return [low, high];
    });
    if (get("scaled_by") === "layer") return each;
    const all = [Math.min(...each.map(([low]) => low)), Math.max(...each.map(([, high]) => high))];
    return each.map(() => all);
  }
  const layerTall = () => Math.max(TALL, Math.min(16, Math.floor(420 / info.layers)));
  const rowY = (layer) => SPACE[1] + (info.layers - 1 - layer) * layerTall();
  function drawMap() {
    const n = count();
    const room = scroll.clientWidth - SPACE[0] - 4;
    if (room <= 0) return;
    wide = Math.max(3, Math.min(28, Math.floor(room / Math.max(n, 1))));
    const width = Math.min(scroll.clientWidth, SPACE[0] + n * wide + 3);
    spacer.style.width = `${SPACE[0] + n * wide + 3}px`;
    const tall = layerTall();
    const context = sheet(map, Math.max(width, 120), SPACE[1] + info.layers * tall + 3);
    const { ink, faint, accent, font } = theme(view);
    context.font = `10px ${font}`;
    context.fillStyle = faint;
    if (!n) return context.fillText("nothing is held", 8, 30);
    const offset = scroll.scrollLeft;
    const values = lengths();
    const shades = colourMap(get("colours"));
    scale.style.background = `linear-gradient(to right, ${[0, 64, 128, 191, 255].map((at) => css(shades[at])).join(",")})`;
    const [from, to] = [Math.floor(offset / wide), Math.min(n, Math.ceil((offset + width - SPACE[0]) / wide))];
    context.save();
    context.beginPath();
    context.rect(SPACE[0] - 1, 0, width, SPACE[1] + info.layers * tall + 3);
    context.clip();
    const every = Math.ceil(34 / wide / 5) * 5;
    context.textAlign = "center";
    for (let at = Math.ceil(from / every) * every; at < to; at += every) context.fillText(at, SPACE[0] + (at + 0.5) * wide - offset, SPACE[1] / 2);
    if (values) {
      const limits = bounds(values);
      for (let layer = 0; layer < info.layers; layer++) {
        const [low, high] = limits[layer];
        for (let at = from; at < to; at++) {
          const part = (values[layer * n + at] - low) / Math.max(high - low, 1e-6);
          context.fillStyle = css(shades[Math.round(255 * Math.min(Math.max(part, 0), 1))]);
          context.fillRect(SPACE[0] + at * wide - offset, rowY(layer), wide > 5 ? wide - 1 : wide, tall - 1);
        }
      }
      const [low, high] = get("scaled_by") === "all" ? limits[0].map((each) => each.toFixed(1)) : ["shortest of the layer", "longest"];
      [ends[0].textContent, ends[1].textContent] = [low, `${high}${n > 1 ? " · position 0 is left out of the scale" : ""}`];
    }
    const [first, last] = range();
    context.strokeStyle = ink;
    context.lineWidth = 2;
    context.strokeRect(SPACE[0] + first * wide - offset - 1, SPACE[1] - 1, (last - first + 1) * wide + 1, info.layers * tall + 1);
    context.strokeStyle = accent;
    context.strokeRect(SPACE[0] + position() * wide - offset - 1, rowY(get("layer")) - 1, wide + 1, tall + 1);
    context.restore();
    context.textAlign = "right";
    const skip = Math.ceil(12 / tall);
    for (let layer = 0; layer < info.layers; layer += skip) {
      context.fillStyle = layer === get("layer") ? accent : faint;
      context.fillText(layer, SPACE[0] - 8, rowY(layer) + tall / 2);
    }
  }
  function drawText() {
    const at = position();
    const [first, last] = range();
    const written = [info.version, at, first, last].join();
    if (written === text.written) return;
    text.written = written;
    const [from, to] = [Math.max(0, Math.min(first, at) - NEAR), Math.min(count(), Math.max(last, at) + NEAR)];
    const spans = info.tokens.slice(from, to).map((token, index) => {
      const made = make("span", {}, token.replaceAll("\n", "↵\n") || "∅");
      made.dataset.at = from + index;
      if (from + index >= first && from + index <= last) made.className = first === last ? "irkit-here" : "irkit-here irkit-several";
      return made;
    });
    text.replaceChildren(...(from ? ["… "] : []), ...spans, ...(to < count() ? [" …"] : []));
    const chosen = text.querySelector(`[data-at="${at}"]`);
    if (chosen && document.activeElement !== text) text.scrollTop = chosen.offsetTop - text.offsetTop - text.clientHeight / 2;
  }
  function drawFacts() {
    const n = count();
    title.textContent = `KV cache · ${info.model}`;
    fill.title = `${n} tokens held, room for ${info.capacity}, context of ${info.n_ctx}`;
    fill.children[0].style.width = `${(100 * info.capacity) / info.n_ctx}%`;
    fill.children[1].style.width = `${(100 * n) / info.n_ctx}%`;
    const parts = [
      `${n.toLocaleString("en")} of ${info.n_ctx.toLocaleString("en")} tokens (${((100 * n) / info.n_ctx).toFixed(1)} %)`,
      `${info.size} of memory, room for ${info.capacity.toLocaleString("en")} tokens${info.each ? ` at ${info.each} each` : ""}`,
      `${info.layers} layers × ${info.heads} heads × ${info.d_head}, keys and values`,
      info.kind,
    ];
    facts.textContent = parts.join(" · ");
    const [first, last] = range();
    const [layer, at] = pointed ?? [get("layer"), position()];
    here.textContent = n ? `${at} “${tokenLabel(info.tokens[at], 24)}”, by layer` : "Nothing is held";
    const problem = get("problem");
    told.classList.toggle("irkit-problem", Boolean(problem));
    told.textContent =
      problem ||
      (get("busy")
        ? "Waiting for the answer that is being made …"
        : n
          ? `${first === last ? `Token ${first} is chosen` : `${last - first + 1} tokens are chosen, ${first} to ${last}`}; click or arrow keys choose, with Shift several.`
          : "Generate something, and look again.");
    for (const button of [fork, rewind, drop]) button.disabled = !n;
    rewind.disabled ||= last === n - 1;
    drop.textContent = first === last ? "Drop it" : `Drop ${last - first + 1} tokens`;
    forks.replaceChildren(
      ...(get("listed").length ? [make("h4", {}, "Forks")] : []),
      ...get("listed").map((each) =>
        make(
          "div",
          { className: "irkit-row irkit-fork" },
          make("code", {}, `view.forks[${each.number}]`),
          make("span", { className: "irkit-token" }, `…${tokenLabel(each.end, 40)}`),
          make("span", { className: "irkit-note" }, `${each.tokens.toLocaleString("en")} tokens · ${each.memory}`),
          make("button", { onclick: () => model.send({ kind: "put_back", number: each.number }), "aria-label": `Put fork ${each.number} back into the cache` }, "Put back"),
          make("button", { onclick: () => model.send({ kind: "forget", number: each.number }), "aria-label": `Forget fork ${each.number}` }, "Forget"),
        ),
      ),
    );
    drawChart(layer, at);
  }
  /** Keys and values of one position by layer, each on its own scale. */
  function drawChart(layer, at) {
    const { faint, accent, font, line } = theme(view);
    const width = Math.min(520, chart.parentElement.clientWidth);
    if (width <= 0) return;
    const context = sheet(chart, width, 150);
    const n = count();
    const parts = [["keys", lengths("keys"), accent], ["values", lengths("values"), faint]];
    context.font = `10px ${font}`;
    context.strokeStyle = line;
    context.strokeRect(0.5, 20.5, width - 2, 110);
    context.fillStyle = faint;
    context.textAlign = "center";
    const x = (each) => 10 + ((width - 20) * each) / Math.max(info.layers - 1, 1);
    const y = (part) => 126 - 100 * part;
    for (let each = 0; each < info.layers; each += 5) context.fillText(each, x(each), 141);
    const rows = Array.from({ length: info.layers }, (_, each) => [each]);
    const lines = [];
    parts.forEach(([name, values, colour], index) => {
      if (!values) return;
      const mine = Array.from({ length: info.layers }, (_, each) => values[each * n + at]);
      mine.forEach((value, each) => rows[each].push(value.toFixed(2)));
      const most = Math.max(...mine, 1e-6);
      context.strokeStyle = context.fillStyle = colour;
      context.lineWidth = 1.5;
      context.beginPath();
      mine.forEach((value, each) => context[each ? "lineTo" : "moveTo"](x(each), y(value / most)));
      context.stroke();
      context.beginPath();
      context.arc(x(layer), y(mine[layer] / most), 3, 0, 7);
      context.fill();
      context.textAlign = "left";
      context.fillText(`${name}, up to ${most.toFixed(1)}`, 2 + index * 120, 9);
      lines.push(`${name} ${mine[layer].toFixed(2)}`);
    });
    if (n) here.textContent = `${at} “${tokenLabel(info.tokens[at], 18)}” · layer ${layer}: ${lines.join(", ")}`;
    chart.setAttribute("aria-label", here.textContent);
    table.replaceChildren(
      make("tr", {}, ...["layer", "keys", "values"].map((name) => make("th", { scope: "col" }, name))),
      ...rows.map((row) => make("tr", {}, ...row.map((value) => make("td", { className: "irkit-number" }, value)))),
    );
  }
  function drawAll() {
    drawMap();
    drawText();
    drawFacts();
  }
  const redraw = oncePerFrame(drawAll);
  const redrawHere = oncePerFrame(drawFacts);

  // Pointer and keys.
  function choose(at, several = false) {
    set(several ? { until: at } : { position: at, until: at });
  }
  function under(event) {
    const box = map.getBoundingClientRect();
    const at = Math.floor((event.clientX - box.left - SPACE[0] + scroll.scrollLeft) / wide);
    const layer = info.layers - 1 - Math.floor((event.clientY - box.top - SPACE[1]) / layerTall());
    return event.clientX - box.left >= SPACE[0] && at < count() && layer >= 0 && layer < info.layers ? [layer, at] : null;
  }
  map.addEventListener("pointermove", (event) => {
    pointed = under(event);
    const values = lengths();
    if (pointed && values) {
      const [layer, at] = pointed;
      tip.show(event, make("span", { className: "irkit-token" }, `${at} ${tokenLabel(info.tokens[at], 24)}`), ` · layer ${layer} · ${values[layer * count() + at].toFixed(2)}`);
    } else tip.hide();
    redrawHere();
  });
  map.addEventListener("pointerleave", () => {
    pointed = null;
    tip.hide();
    redrawHere();
  });
  map.addEventListener("click", (event) => {
    const place = under(event);
    if (place) {
      set({ layer: place[0] });
      choose(place[1], event.shiftKey);
    }
    map.focus({ preventScroll: true });
  });
  map.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step || !count()) return;
    event.preventDefault();
    if (step[1]) return set({ layer: clamp(get("layer") - step[1], info.layers) });
    choose(clamp((event.shiftKey ? get("until") : position()) + step[0], count()), event.shiftKey);
    reveal();
    return undefined;
  });
  text.addEventListener("click", (event) => {
    const at = event.target.dataset.at;
    if (at !== undefined) {
      choose(Number(at), event.shiftKey);
      reveal();
    }
  });
  /** Scroll until the chosen position is in sight. */
  function reveal() {
    const x = get("until") * wide;
    scroll.scrollLeft = Math.min(Math.max(scroll.scrollLeft, x - (scroll.clientWidth - SPACE[0] - wide)), x);
  }
  scroll.addEventListener("scroll", redraw);

  model.on("msg:custom", received);
  model.on("change:info", () => {
    info = get("info");
    pointed = null;
    kept.clear();
    asked.clear();
    redraw();
  });
  for (const trait of ["position", "until", "layer", "shown", "head", "scaled_by", "colours", "listed", "busy", "problem"]) model.on(`change:${trait}`, redraw);
  drawAll();
  return whenSeen(view, redraw);
}

export default { render };
