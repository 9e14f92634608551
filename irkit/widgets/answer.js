// An answer: Markdown that grows at its end, or, when its tokens are to be seen, one element a token.
// The HTML comes from irkit.widgets.markdown, which lets no HTML of the model through; all else is set as text.

/** Nats of surprise, or of entropy, from which on a token has its full colour, and that; it grows with the square root. */
const HEAT = { probability: [8, "240,140,30"], entropy: [6, "110,120,255"] };
const FULL = 0.55; // how much of it covers the ground, so that the text on it can be read in either theme

function heat(colour, value) {
  const [full, rgb] = HEAT[colour];
  return Number.isFinite(value) ? `rgba(${rgb},${(FULL * Math.sqrt(Math.min(Math.max(value / full, 0), 1))).toFixed(3)})` : "";
}

/** A probability in percent, with as many digits as say something. */
const percent = (logprob) => (Number.isFinite(logprob) ? `${Number((100 * Math.exp(logprob)).toPrecision(3))} %` : "–");

/** What irkit.widgets.answer.packed packs: tokens as an object of arrays. */
function unpack({ texts, words }, buffers, most) {
  const [ids, logprobs, topIds, topLogprobs] = [Int32Array, Float32Array, Int32Array, Float32Array].map((Type, at) => typed(buffers[at], Type));
  return texts.map((text, row) => ({
    text,
    name: words[ids[row]] ?? text,
    id: ids[row],
    logprob: logprobs[row],
    top: Array.from({ length: most }, (_, at) => ({ id: topIds[row * most + at], logprob: topLogprobs[row * most + at] }))
      .filter((other) => other.id >= 0)
      .map((other) => ({ ...other, text: words[other.id] })),
  }));
}

/** One answer's element, with the methods by which it is filled. */
function answerBody() {
  const closed = make("div", { className: "irkit-closed" });
  const open = make("div", { className: "irkit-going" });
  const element = make("div", { className: "irkit-md" }, closed, open);
  const list = make("div", { className: "irkit-tokens", hidden: true, role: "group", "aria-label": "Tokens; arrow keys move, Enter opens one" });
  const tokens = [];
  const spans = []; // their elements, a block of them a line of the text: a new one lays out the last block alone
  let colour = "none";
  let entropies = null;
  let here = -1;

  function paint(span, index) {
    const token = tokens[index];
    const value = colour === "entropy" ? entropies?.[index] : -token.logprob;
    span.style.background = colour === "none" ? "" : heat(colour, value ?? NaN);
  }
  function span(token, index) {
    const made = make("span", { className: "irkit-t" }, token.text || tokenLabel(token.name));
    made.dataset.at = index;
    if (!token.text) made.classList.add("irkit-empty");
    if (index === Math.max(here, 0)) made.tabIndex = 0; // the one that the Tab key comes to
    paint(made, index);
    return made;
  }
  return {
    element,
    list,
    tokens,
    spans,
    get entropies() {
      return entropies;
    },
    /** Everything at once. */
    whole(html, going = "") {
      closed.innerHTML = html;
      open.innerHTML = going;
    },
    /** What has come. */
    grow(html, going) {
      if (html) closed.insertAdjacentHTML("beforeend", html);
      open.innerHTML = going;
    },
    /** Tokens from `first` on; false if some before them are missing. */
    take(first, fresh, values = null) {
      if (first > tokens.length) return false;
      tokens.length = first;
      spans.splice(first).forEach((gone) => gone.remove());
      for (const block of [...list.children].reverse()) {
        if (block.childElementCount) break;
        block.remove();
      }
      entropies = values ?? (first ? entropies : null);
      fresh.forEach((token, at) => {
        tokens.push(token);
        spans.push(span(token, first + at));
        if (!list.lastChild || tokens.at(-2)?.text.endsWith("\n")) list.append(make("div"));
        list.lastChild.append(spans.at(-1));
      });
      return true;
    },
    /** Shows the text, or its tokens coloured. */
    show(how) {
      const other = how !== colour;
      colour = how;
      const seen = how !== "none" && tokens.length > 0;
      list.hidden = !seen;
      element.hidden = seen;
      if (seen && other) spans.forEach(paint);
    },
    /** Marks one token, or none, and lets the Tab key come to it, or to the first. */
    mark(index, focus = false) {
      spans[here]?.classList.remove("irkit-here");
      spans[Math.max(here, 0)]?.removeAttribute("tabindex");
      here = index;
      const span = spans[Math.max(here, 0)];
      if (!span) return;
      span.tabIndex = 0;
      span.classList.toggle("irkit-here", here >= 0);
      if (focus) span.focus();
    },
    get here() {
      return here;
    },
  };
}

/** A table of what could have stood in a token's place; `pick`, if given, is called with the one that is clicked. */
function alternatives(token, entropy, pick = null) {
  const best = Math.max(token.logprob, ...token.top.map((other) => other.logprob));
  const rows = token.top.some((other) => other.id === token.id) ? token.top : [...token.top, { ...token, text: token.name }];
  const table = make("table", { className: "irkit-table irkit-alternatives" });
  for (const other of rows) {
    const stripe = make("span");
    stripe.style.width = `${Math.max(1, 100 * Math.exp(other.logprob - best))}%`;
    const name = tokenLabel(other.text, 28);
    const chosen = other.id === token.id;
    const cell = pick && !chosen ? make("button", { className: "irkit-pick", title: "Continue from here", onclick: () => pick(other) }, name) : make("span", {}, name);
    const row = make(
      "tr",
      { className: chosen ? "irkit-chosen" : "" },
      make("td", { className: "irkit-token" }, cell),
      make("td", { className: "irkit-number" }, percent(other.logprob)),
      make("td", { className: "irkit-bars" }, stripe),
    );
    table.append(row);
  }
  const facts = [`probability ${percent(token.logprob)}`, `${Number.isFinite(token.logprob) ? (-token.logprob).toFixed(2) : "–"} nats of surprise`];
  if (Number.isFinite(entropy)) facts.push(`entropy ${entropy.toFixed(2)} nats`);
  return [make("div", { className: "irkit-note" }, facts.join(" · ")), table];
}
