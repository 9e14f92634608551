// The steering panel: vectors and a grid of heads and layers on top, two answers to the same prompt below.

const LIVE = 250; // milliseconds without a change after which the answers begin anew
const LABELS = 64; // pixels left of the grid
const EPS = 1e-9;

function render({ model, el }) {
  const { layers: nLayers, heads: nHeads, model: name } = model.get("info");
  const rows = [...Array.from({ length: nHeads }, (_, head) => ["head", head]), ["attn"], ["mlp"]];
  let cell = [0, 0]; // row and layer that are chosen in the grid
  let size = 14; // pixels of a cell
  let sides = [[], []]; // tokens of both answers: [text, id, logprob, [[text, id, logprob], ...]]
  let facts = ["", ""];
  let same = true; // there are no edits: both are one answer
  let run = 0;
  let chosen = null; // the token that is compared; null for the first that differs
  let timer = 0;

  const view = root(model, el, "steering", "Steering panel");
  const get = (trait) => model.get(trait);
  function set(values, live = true) {
    for (const [trait, value] of Object.entries(values)) model.set(trait, value);
    model.save_changes();
    if (live) soon();
  }
  /** Begin the answers anew once nothing has changed for a moment, if that is wanted. */
  function soon() {
    clearTimeout(timer);
    if (get("live") && get("prompt")) timer = setTimeout(answer, LIVE);
  }
  function answer() {
    clearTimeout(timer);
    chosen = null;
    model.send({ kind: "answer" });
  }

  // The prompt.
  const prompt = make("textarea", {
    rows: 2,
    "aria-label": "Prompt",
    placeholder: "What both answers answer …",
    oninput: () => set({ prompt: prompt.value }, false),
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey) return;
      event.preventDefault();
      answer();
    },
  });
  const begin = make("button", { onclick: answer, title: "Enter in the prompt" }, "Answer");
  const stop = make("button", { onclick: () => model.send({ kind: "stop" }) }, "Stop");
  view.append(
    make(
      "div",
      { className: "irkit-bar" },
      make("span", { className: "irkit-title" }, `Steering · ${name}`),
      tick(model, "as_message", "a message, not a text to continue"),
      tick(model, "live", "answer at every change"),
    ),
    make("div", { className: "irkit-ask" }, prompt, begin, stop),
  );

  // Vectors.
  const vectors = make("div", { className: "irkit-vectors" });
  const texts = ["more", "less"].map((side) =>
    make("textarea", { rows: 2, "aria-label": `Texts with ${side} of it, a line each`, placeholder: side === "more" ? "More of: I love this" : "Less of: I hate this" }),
  );
  const called = make("input", { type: "text", size: 10, "aria-label": "Name of the vector", placeholder: "name" });
  const at = make("input", { type: "number", min: 0, max: nLayers - 1, value: Math.floor(nLayers / 2), "aria-label": "Layer of the vector" });
  const form = make(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        model.send({ kind: "make", name: called.value, more: texts[0].value, less: texts[1].value, layer: Number(at.value) });
        adding.open = false;
      },
    },
    ...texts,
    make("div", { className: "irkit-row" }, called, make("label", {}, "layer ", at), make("button", {}, "Make the vector")),
  );
  const adding = make("details", { className: "irkit-adding" }, make("summary", {}, "A vector from two kinds of text"), form);

  function changeVector(index, values) {
    set({ vectors: get("vectors").map((row, each) => (each === index ? { ...row, ...values } : row)) });
  }
  let drawn = ""; // which vectors have rows in the page
  const sliders = [];
  function drawVectors() {
    const rows = get("vectors");
    const known = get("known");
    const names = JSON.stringify(rows.map((row) => [row.name, known[row.name]]));
    if (names !== drawn) {
      drawn = names;
      sliders.length = 0;
      vectors.replaceChildren(
        ...rows.map((row, index) => {
          const { about, most } = known[row.name] ?? { about: "", most: 10 };
          const strength = slider(`Strength of ${row.name}`, { min: -most, max: most, step: most / 40 }, (value) => changeVector(index, { strength: value }));
          const layer = slider(`Layer of ${row.name}`, { min: 0, max: nLayers - 1, step: 1 }, (value) => changeVector(index, { layer: value }));
          const where = make(
            "select",
            { "aria-label": `Positions of ${row.name}`, onchange: () => changeVector(index, { positions: where.value }) },
            make("option", { value: "all" }, "every position"),
            make("option", { value: "answer" }, "the answer's"),
          );
          sliders.push({ strength, layer, where });
          return make(
            "div",
            { className: "irkit-vector" },
            make("div", { className: "irkit-name", title: about }, row.name),
            make("label", {}, make("span", {}, "strength"), strength.element),
            make("label", {}, make("span", {}, "layer"), layer.element),
            make("label", {}, make("span", {}, "at"), where),
          );
        }),
      );
      if (!rows.length) vectors.append(make("div", { className: "irkit-note" }, "No vector yet: make one below, or give some from Python."));
      adding.open ||= !rows.length;
    }
    rows.forEach((row, index) => {
      sliders[index].strength.show(row.strength);
      sliders[index].layer.show(row.layer);
      const { where } = sliders[index];
      const listed = typeof row.positions === "string" ? row.positions : "listed";
      if (listed === "listed" && !where.querySelector('[value="listed"]')) where.append(make("option", { value: "listed", disabled: true }, "some"));
      where.value = listed;
    });
  }

  // Heads and layers.
  const grid = make("canvas", { tabIndex: 0, role: "application", "aria-label": "Heads and layers; arrow keys choose one, the space bar takes it out" });
  const strip = make("div", { className: "irkit-scroll" }, grid);
  const factor = slider("Factor of what is chosen", { min: 0, max: 2, step: 0.05 }, (value) => setFactor(cell, value));
  const here = make("span", { role: "status", "aria-live": "polite" });
  const changed = make("div", { className: "irkit-note" });
  const reset = make("button", { onclick: () => set({ heads: [], layers: [] }) }, "Put all back");
  const { show: showTip, hide: hideTip } = tooltip(view);
  const partName = { attn: "attention", mlp: "MLP" };
  const cellName = ([row, layer]) => `layer ${layer}, ${rows[row][0] === "head" ? `head ${rows[row][1]}` : partName[rows[row][0]]}`;
  const isHead = ([row]) => rows[row][0] === "head";
  /** Whether an entry of the trait is of this cell. */
  const isOf = ([row, layer]) => (isHead([row]) ? (entry) => entry[0] === layer && entry[1] === rows[row][1] : (entry) => entry[0] === rows[row][0] && entry[1] === layer);
  const factorOf = (place) => get(isHead(place) ? "heads" : "layers").find(isOf(place))?.[2] ?? 1;
  function setFactor(place, value) {
    const trait = isHead(place) ? "heads" : "layers";
    const rest = get(trait).filter((entry) => !isOf(place)(entry));
    const [row, layer] = place;
    const entry = isHead(place) ? [layer, rows[row][1], value] : [rows[row][0], layer, value];
    set({ [trait]: Math.abs(value - 1) < EPS ? rest : [...rest, entry] });
  }
  const toggle = (place) => setFactor(place, factorOf(place) === 0 ? 1 : 0);
  const top = 16;
  const rowY = (row) => top + row * size + (row >= nHeads ? 6 : 0);
  function drawGrid() {
    const room = strip.clientWidth - LABELS - 4;
    if (room <= 0) return;
    size = Math.max(11, Math.min(24, Math.floor(room / nLayers)));
    const { faint, accent, font, line, ink } = theme(view);
    const context = sheet(grid, LABELS + nLayers * size + 3, rowY(rows.length - 1) + size + 3);
    context.font = `10px ${font}`;
    context.fillStyle = faint;
    context.textAlign = "center";
    const every = Math.ceil(22 / size);
    for (let layer = 0; layer < nLayers; layer += every) context.fillText(layer, LABELS + (layer + 0.5) * size, top / 2);
    context.textAlign = "right";
    rows.forEach(([kind, head], row) => {
      context.fillStyle = row === cell[0] ? accent : faint;
      context.fillText(kind === "head" ? (row ? head : `head ${head}`) : partName[kind], LABELS - 6, rowY(row) + size / 2);
    });
    context.lineWidth = 1;
    rows.forEach((_, row) => {
      for (let layer = 0; layer < nLayers; layer++) {
        const value = factorOf([row, layer]);
        const [x, y] = [LABELS + layer * size, rowY(row)];
        context.strokeStyle = line;
        context.strokeRect(x + 1.5, y + 1.5, size - 3, size - 3);
        if (value === 1) continue;
        context.globalAlpha = value < 1 ? 0.25 + 0.75 * (1 - value) : Math.min(1, 0.25 + 0.75 * (value - 1));
        context.fillStyle = value < 1 ? OUT : accent;
        context.fillRect(x + 1, y + 1, size - 2, size - 2);
        context.globalAlpha = 1;
        if (value === 0) {
          context.strokeStyle = "#fff";
          context.beginPath();
          for (const [from, to] of [[0.3, 0.7], [0.7, 0.3]]) {
            context.moveTo(x + from * size, y + 0.3 * size);
            context.lineTo(x + to * size, y + 0.7 * size);
          }
          context.stroke();
        }
      }
    });
    context.strokeStyle = ink;
    context.lineWidth = 2;
    context.strokeRect(LABELS + cell[1] * size, rowY(cell[0]), size, size);
    const value = factorOf(cell);
    factor.show(value);
    here.textContent = `${cellName(cell)}: ${value === 0 ? "out" : value === 1 ? "as it is" : `× ${value}`}`;
    const all = [...get("heads").map(([layer, head, each]) => [`L${layer}H${head}`, each]), ...get("layers").map(([part, layer, each]) => [`L${layer} ${partName[part]}`, each])];
    changed.textContent = all.length ? all.map(([what, each]) => (each === 0 ? `${what} out` : `${what} × ${each}`)).join(", ") : "Click takes one out, or puts it back.";
    reset.disabled = !all.length;
  }
  function under(event) {
    const box = grid.getBoundingClientRect();
    const layer = Math.floor((event.clientX - box.left - LABELS) / size);
    const row = rows.findIndex((_, each) => event.clientY - box.top >= rowY(each) && event.clientY - box.top < rowY(each) + size);
    return layer >= 0 && layer < nLayers && row >= 0 ? [row, layer] : null;
  }
  grid.addEventListener("pointermove", (event) => {
    const place = under(event);
    if (!place) return hideTip();
    const value = factorOf(place);
    showTip(event, `${cellName(place)}${value === 1 ? "" : value === 0 ? ": out" : `: × ${value}`}`);
  });
  grid.addEventListener("pointerleave", hideTip);
  grid.addEventListener("click", (event) => {
    const place = under(event);
    if (!place) return;
    cell = place;
    toggle(place);
    redraw();
    grid.focus({ preventScroll: true });
  });
  grid.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (event.key === " " || event.key === "Enter") toggle(cell);
    else if (step) cell = [clamp(cell[0] + step[1], rows.length), clamp(cell[1] + step[0], nLayers)];
    else return;
    event.preventDefault();
    redraw();
  });
  view.append(
    make(
      "div",
      { className: "irkit-columns" },
      make("div", { className: "irkit-side" }, make("h4", {}, "Vectors"), vectors, adding),
      make(
        "div",
        { className: "irkit-side irkit-grid" },
        make("h4", {}, "Heads and layers"),
        strip,
        make("div", { className: "irkit-row" }, here, factor.element, reset),
        changed,
      ),
    ),
  );

  // Both answers.
  const panes = ["Unedited", "Edited"].map((title, side) => {
    const text = make("div", { className: "irkit-text irkit-answer", tabIndex: 0, role: "textbox", "aria-readonly": "true", "aria-label": `${title} answer; arrow keys choose a token` });
    const about = make("span", { className: "irkit-note" });
    text.addEventListener("click", (event) => {
      const index = [...text.children].indexOf(event.target);
      if (index >= 0) choose(index);
    });
    text.addEventListener("keydown", (event) => {
      const step = ARROWS[event.key];
      if (event.key === "Escape") choose(null);
      else if (step) choose(clamp(compared() + step[0] + step[1], Math.max(1, sides[side].length)));
      else return;
      event.preventDefault();
    });
    return { text, about, element: make("div", { className: "irkit-side" }, make("div", { className: "irkit-head" }, make("h4", {}, title), about), text) };
  });
  const verdict = make("div", { className: "irkit-note", role: "status", "aria-live": "polite" });
  const table = make("table", { className: "irkit-table irkit-compared" });
  view.append(make("div", { className: "irkit-columns irkit-answers" }, ...panes.map((pane) => pane.element)), verdict, table);

  /** The first place where the two have different tokens. */
  function parted() {
    const least = Math.min(sides[0].length, sides[1].length);
    for (let index = 0; index < least; index++) if (sides[0][index][1] !== sides[1][index][1]) return index;
    return least;
  }
  const differ = () => !same && parted() < Math.max(sides[0].length, sides[1].length) && (!get("running") || parted() < Math.min(sides[0].length, sides[1].length));
  /** The token that is compared. */
  function compared() {
    const [least, most] = [sides[0].length, sides[1].length].sort((a, b) => a - b);
    return Math.min(chosen ?? (differ() ? parted() : get("running") && least ? least - 1 : most - 1), most - 1);
  }
  function choose(index) {
    chosen = index;
    redraw();
  }
  function drawAnswers() {
    const index = compared();
    const first = differ() ? parted() : Infinity;
    panes.forEach(({ text, about }, side) => {
      const tokens = sides[side];
      while (text.children.length > tokens.length) text.lastChild.remove();
      tokens.forEach((token, each) => {
        const span = text.children[each] ?? text.appendChild(make("span"));
        if (span.textContent !== token[0]) span.textContent = token[0];
        span.className = [each < first && !same && first < Infinity ? "irkit-common" : "", each === first ? "irkit-first" : "", each === index ? "irkit-here" : ""].join(" ");
      });
      about.textContent = same && side ? "the same: nothing is edited" : facts[side];
    });
    const problem = get("problem");
    verdict.classList.toggle("irkit-problem", Boolean(problem));
    if (problem) verdict.textContent = problem;
    else if (get("running") && !sides[1].length) verdict.textContent = same ? "" : "The first answer with another kind of edit compiles its program, which takes a while; those after it do not.";
    else if (first < Infinity) verdict.textContent = `They differ from token ${first + 1} on.`;
    else if (sides[0].length && !get("running")) verdict.textContent = same ? "Move a slider, or take something out." : "The edits change no token of this answer.";
    else verdict.textContent = "";
    drawTable(index, index <= first);
    begin.disabled = !get("prompt");
    stop.disabled = !get("running");
    view.setAttribute("aria-busy", String(get("running")));
  }
  /** What each side's model said of the next token, of the same tokens. */
  function drawTable(index, alike) {
    const both = sides.map((side) => side[index]);
    if ((!both[0] && !both[1]) || (get("running") && !same && !sides[1].length)) return table.replaceChildren();
    const found = new Map(); // id -> [text, unedited, edited]
    both.forEach((token, side) => {
      if (!token) return;
      for (const [text, id, logprob] of [...token[3], token]) {
        const row = found.get(id) ?? [text, null, null];
        const its = text === token[0] && id === token[1] ? token[2] : logprob;
        row[1 + side] = Math.exp(its);
        found.set(id, row);
      }
    });
    const listed = [...found.entries()].sort(([, a], [, b]) => Math.max(b[1] ?? 0, b[2] ?? 0) - Math.max(a[1] ?? 0, a[2] ?? 0)).slice(0, 8);
    const most = Math.max(...listed.map(([, row]) => Math.max(row[1] ?? 0, row[2] ?? 0)), EPS);
    const share = (value, side) => (value !== null ? `${(100 * value).toFixed(value < 0.001 ? 3 : 1)} %` : both[side] ? "less" : "–");
    const before = (sides[0].length > index ? sides[0] : sides[1]).slice(Math.max(0, index - 6), index).map((token) => token[0]).join("");
    const caption = alike ? (index ? `The next token after “…${before}”` : "The first token") : `Token ${index + 1} of each, after what it said itself`;
    table.replaceChildren(
      make("caption", {}, `${caption}`),
      make("tr", {}, ...["token", "unedited", "", "", "edited", "", "", "points"].map((head) => make("th", { scope: "col" }, head))),
      ...listed.map(([id, [text, ...shares]]) =>
        make(
          "tr",
          {},
          make("td", { className: "irkit-token" }, tokenLabel(text, 22)),
          ...shares.flatMap((value, side) => {
            const stripe = make("span");
            stripe.style.width = `${(100 * (value ?? 0)) / most}%`;
            const said = both[side]?.[1] === id;
            return [
              make("td", { className: "irkit-number" }, share(value, side)),
              make("td", { className: "irkit-mark", title: said ? "what it said" : "" }, said ? "●" : ""),
              make("td", { className: `irkit-bars irkit-bars-${side}` }, value === null ? "" : stripe),
            ];
          }),
          make("td", { className: "irkit-number" }, shares[0] !== null && shares[1] !== null ? signed(100 * (shares[1] - shares[0])) : ""),
        ),
      ),
    );
  }
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`;

  function received(message) {
    if (message.kind !== "answer" || message.run < run) return;
    if (message.run > run) [run, sides] = [message.run, [[], []]];
    message.sides.forEach((side, each) => {
      if (message.begin[each] > sides[each].length) return model.send({ kind: "state" });
      sides[each].splice(message.begin[each], Infinity, ...side.tokens);
      facts[each] = side.facts;
    });
    same = message.same;
    redraw();
  }
  function ended() {
    const answers = get("answers");
    if (answers.sides) received({ kind: "answer", begin: [0, 0], ...answers });
  }
  function drawAll() {
    if (document.activeElement !== prompt) prompt.value = get("prompt");
    drawVectors();
    drawGrid();
    drawAnswers();
  }
  const redraw = oncePerFrame(drawAll);
  model.on("msg:custom", received);
  model.on("change:answers", ended);
  for (const trait of ["prompt", "vectors", "known", "heads", "layers", "running", "problem"]) model.on(`change:${trait}`, redraw);
  model.on("change:as_message", soon);
  ended();
  drawAll();
  model.send({ kind: "state" });
  const unseen = whenSeen(view, redraw);
  return () => {
    clearTimeout(timer);
    unseen();
  };
}

export default { render };
