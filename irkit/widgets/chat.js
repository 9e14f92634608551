// The chat's page. What is said is the model's trait `turns`; an answer in the making comes in messages of what is new.

const PATIENCE = 1500; // milliseconds after which a kernel that does not answer is said to be busy
const PING = 2000; // milliseconds between two questions whether it hears, while it answers
const POLL = 100; // milliseconds between two questions where the kernel's threads do not reach the page
const STAY = "The kernel is at work in a cell, and this front end delivers nothing to it meanwhile";

function render({ model, el }) {
  const { model: name, n_ctx: context, alternatives: most } = model.get("info");
  const view = root(model, el, "chat", `Chat with ${name}`);
  const get = (trait) => model.get(trait);
  const bodies = new Map(); // id of a turn -> { article, body, drawn, extra }
  let seq = 0; // of the last message of the running answer
  let editing = null; // id of the turn that is written anew
  let pinned = null; // { turn, position }
  let awaited = 0; // since when an answer to a ping, or to what was sent, is waited for
  let threads = false; // whether anything has come from a thread since the answer was asked for
  let askedAt = 0;
  let noted = "";

  // The page.
  const meter = make("span", { className: "irkit-meter", role: "meter", "aria-label": "Context in use", "aria-valuemin": 0, "aria-valuemax": context }, make("i"));
  const used = make("span", { className: "irkit-used" });
  const legend = make("span", { className: "irkit-legend", hidden: true });
  const system = make("textarea", { rows: 2, placeholder: "What the model is told before the conversation", "aria-label": "System prompt" });
  const systemBox = make("details", { className: "irkit-system" }, make("summary", {}, "System prompt"), system);
  const exporting = make("select", { "aria-label": "Export", title: "Save the conversation", onchange: () => { if (exporting.value) model.send({ kind: "export", format: exporting.value }); exporting.value = ""; } });
  for (const [value, text] of [["", "Export"], ["markdown", "Markdown"], ["json", "JSON"]]) exporting.append(make("option", { value, hidden: !value }, text));
  const fresh = make("button", { onclick: () => (model.send({ kind: "new" }), input.focus()), title: "Begin a new conversation; this one is kept" }, "New");
  const others = make("select", { className: "irkit-others", "aria-label": "Conversation", onchange: () => model.send({ kind: "switch", conversation: Number(others.value) }) });
  const bar = make(
    "div",
    { className: "irkit-bar" },
    make("span", { className: "irkit-title" }, name),
    make("span", { className: "irkit-context" }, meter, used),
    choice(model, "colour", "Tokens", { none: "as text", probability: "by probability", entropy: "by entropy" }),
    exporting,
    others,
    fresh,
  );
  const empty = make("div", { className: "irkit-hello" }, make("b", {}, `Talk to ${name}.`), " Enter sends, Shift+Enter begins a new line, Escape stops an answer.");
  const log = make("div", { className: "irkit-log", role: "log", "aria-live": "off", "aria-label": "Conversation", tabIndex: 0 }, empty);
  const spoken = make("div", { className: "irkit-spoken", "aria-live": "polite" });
  const input = make("textarea", { rows: 1, placeholder: "Message", "aria-label": "Message", spellcheck: true });
  const send = make("button", { className: "irkit-send", onclick: submit }, "Send");
  const stop = make("button", { className: "irkit-stop", hidden: true, onclick: halt, title: "Stop the answer (Escape). The notebook's own interrupt does not reach it." }, "Stop");
  const note = make("div", { className: "irkit-note irkit-state", role: "status" });
  const composer = make("div", { className: "irkit-composer" }, input, send, stop);
  view.append(bar, make("div", { className: "irkit-second" }, systemBox, legend), log, spoken, composer, note);
  const tip = tooltip(view);

  // Telling the kernel.
  function tell(message) {
    model.send(message);
    awaited ||= performance.now();
  }
  const say = (text) => (note.textContent = noted = text);
  function submit() {
    const text = input.value;
    if (!text.trim() || get("busy")) return;
    tell({ kind: "send", text });
    begin();
    input.value = "";
    grow();
    stick = true;
  }
  function begin() {
    [threads, askedAt] = [false, performance.now()];
    say("");
  }
  function halt() {
    tell({ kind: "stop" });
    say("stopping …");
  }
  /** Looks, while something is waited for, whether the kernel hears, and whether its threads are heard. */
  let poll = 0;
  let pinged = 0;
  const timer = setInterval(() => {
    const now = performance.now();
    const busy = get("busy");
    if (awaited && now - awaited > PATIENCE) {
      if (!busy) say(`${STAY}: your message is taken up when the cell ends.`);
      else say(`${STAY}: Stop takes effect when the cell ends. The notebook's own interrupt does not reach this answer.`);
    } else if (noted.startsWith(STAY)) say("");
    if (busy && now - pinged > PING) {
      pinged = now;
      tell({ kind: "ping" });
    }
    if (!threads && askedAt && now - askedAt > PATIENCE) poll ||= setInterval(() => model.send({ kind: "poll", seq }), POLL);
    if (poll && (threads || !(busy || awaited))) poll = clearInterval(poll) ?? 0;
  }, 500);

  // What was said.
  let stick = true; // whether the end is kept in sight
  log.addEventListener("scroll", () => (stick = log.scrollHeight - log.scrollTop - log.clientHeight < 40));
  const toEnd = () => stick && (log.scrollTop = log.scrollHeight);

  function action(text, title, act, more = {}) {
    return make("button", { className: "irkit-act", title, "aria-label": title, onclick: act, ...more }, text);
  }
  /** A message's elements; an answer that was drawn before keeps its body, with as many elements as it has tokens. */
  function draw(turn, before = null) {
    const mine = turn.role !== "assistant";
    const body = mine ? null : (before ?? answerBody());
    const extra = make("div", { className: "irkit-pinned", hidden: true });
    const facts = make("span", { className: "irkit-facts" }, turn.facts);
    const actions = make("div", { className: "irkit-actions" });
    const at = turn.versions.indexOf(turn.id);
    if (turn.versions.length > 1) {
      const go = (by) => () => model.send({ kind: "version", turn: turn.versions[at + by] });
      actions.append(
        action("‹", "Version before", go(-1), { disabled: at === 0 }),
        make("span", { className: "irkit-facts" }, `${at + 1}/${turn.versions.length}`),
        action("›", "Version after", go(1), { disabled: at === turn.versions.length - 1 }),
      );
    }
    if (mine) actions.append(action("Edit", "Write this message anew", () => edit(turn)));
    else actions.append(action("Again", "Answer once more; this answer is kept", () => (begin(), tell({ kind: "regenerate", turn: turn.id }))));
    actions.append(action("Copy", "Copy the text", () => navigator.clipboard?.writeText(turn.text)));
    const article = make("article", { className: `irkit-turn irkit-${mine ? "mine" : "its"}`, "aria-label": mine ? "You" : name });
    if (mine) article.append(make("div", { className: "irkit-bubble" }, turn.text), actions);
    else {
      body.whole(turn.html);
      article.append(body.element, body.list, extra, make("div", { className: "irkit-foot" }, facts, actions));
      if (turn.problem) article.insertBefore(make("div", { className: "irkit-problem" }, turn.problem), extra);
      if (!before) listen(turn.id, body);
      body.asked = "";
    }
    return { article, body, extra, facts, actions };
  }
  /** Brings the page in line with `turns`: only what differs is made anew. */
  function sync() {
    const turns = get("turns");
    const focused = log.contains(document.activeElement) ? document.activeElement : null;
    const ids = new Set(turns.map((turn) => turn.id));
    for (const [id, { article }] of bodies) if (!ids.has(id)) (article.remove(), bodies.delete(id));
    empty.hidden = turns.length > 0;
    let before = empty;
    for (const turn of turns) {
      const drawn = JSON.stringify(turn);
      let held = bodies.get(turn.id);
      if (held?.drawn !== drawn) {
        const made = { ...draw(turn, held?.body), drawn };
        held?.article.replaceWith(made.article);
        bodies.set(turn.id, (held = made));
      }
      if (before.nextSibling !== held.article) before.after(held.article);
      before = held.article;
      held.article.classList.toggle("irkit-running", turn.id === get("busy"));
      if (held.body) colour(turn.id, held.body);
    }
    if (pinned && !ids.has(pinned.turn)) pinned = null;
    else if (pinned) pin(pinned.turn, pinned.position, false);
    // Whose button was made anew goes on with the new one: the keyboard must not fall out of the chat.
    if (focused && !focused.isConnected) {
      const same = [...log.querySelectorAll("button:enabled")].findLast((each) => each.title === focused.title);
      (same ?? input).focus({ preventScroll: true });
    }
    toEnd();
  }
  function state() {
    const busy = get("busy");
    stop.hidden = !busy;
    send.hidden = Boolean(busy);
    fresh.disabled = others.disabled = Boolean(busy);
    const titles = get("titles");
    others.hidden = titles.length < 2;
    others.replaceChildren(...titles.map((title, value) => make("option", { value }, `${value + 1} · ${title || "new"}`)));
    others.value = get("current");
    if (!busy) {
      seq = 0;
      if (noted === "stopping …") say("");
    }
    fill(get("used"));
  }
  function fill(count) {
    meter.firstChild.style.width = `${Math.min(100, (100 * count) / context)}%`;
    meter.setAttribute("aria-valuenow", count);
    meter.classList.toggle("irkit-full", count > 0.9 * context);
    used.textContent = `${count.toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
  }

  // Tokens.
  function colour(id, body) {
    const how = get("colour");
    const asks = how !== "none" && id !== get("busy") && (!body.tokens.length || (how === "entropy" && !body.entropies));
    if (asks && body.asked !== how) {
      body.asked = how;
      model.send({ kind: "tokens", turn: id, entropy: how === "entropy" });
    }
    body.show(how);
  }
  function explain() {
    const rgb = HEAT[get("colour")]?.[1];
    legend.hidden = !rgb;
    const scale = make("i");
    scale.style.background = `linear-gradient(to right, rgba(${rgb},0), rgba(${rgb},${FULL}))`;
    legend.replaceChildren(...(get("colour") === "probability" ? ["expected", scale, "a surprise"] : ["decided", scale, "undecided"]));
  }
  function listen(id, body) {
    const at = (event) => {
      const span = event.target.closest?.("span.irkit-t");
      return span ? Number(span.dataset.at) : -1;
    };
    body.list.addEventListener("pointermove", (event) => {
      const index = at(event);
      if (index < 0) return tip.hide();
      const token = body.tokens[index];
      tip.show(event, make("b", { className: "irkit-token" }, tokenLabel(token.name, 28)), ...alternatives(token, body.entropies?.[index]));
    });
    body.list.addEventListener("pointerleave", tip.hide);
    body.list.addEventListener("focusin", (event) => at(event) !== body.here && body.mark(at(event)));
    body.list.addEventListener("click", (event) => at(event) >= 0 && pin(id, at(event)));
    body.list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
      if (step) {
        event.preventDefault();
        body.mark(Math.min(Math.max(at(event) + step, 0), body.tokens.length - 1), true);
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        if (at(event) >= 0) pin(id, at(event));
      }
    });
  }
  /** Opens a token: its alternatives here, and what the kernel computes of its step below the chat. */
  function pin(turn, position, asks = true) {
    const held = bodies.get(turn);
    if (pinned && pinned.turn !== turn) unpin(false);
    const token = held?.body?.tokens[position];
    if (!token) return;
    pinned = { turn, position };
    held.body.mark(position, asks);
    held.extra.hidden = false;
    held.extra.replaceChildren(
      make("div", { className: "irkit-pinbar" }, make("b", {}, "In place of ", make("span", { className: "irkit-token" }, `“${tokenLabel(token.name, 28)}”`)), action("✕", "Close (Escape)", () => unpin())),
      ...alternatives(token, held.body.entropies?.[position], (other) => {
        begin();
        tell({ kind: "continue", turn, position, token: other.id });
        unpin();
      }),
      make("div", { className: "irkit-note" }, "Click one to go on from it: this answer is kept as a version. Attention, logit lens and cache of the step are shown below the chat."),
    );
    if (asks) {
      // Into sight, but no further than the token stays there.
      const [box, token] = [held.extra, held.body.spans[position]].map((each) => each.getBoundingClientRect());
      const frame = log.getBoundingClientRect();
      log.scrollTop += Math.max(0, Math.min(box.bottom - frame.bottom + 8, token.top - frame.top - 8));
      say("computing the step …");
      model.send({ kind: "open", turn, position });
    }
  }
  function unpin(tells = true) {
    const held = bodies.get(pinned?.turn);
    if (held) {
      if (held.extra.contains(document.activeElement)) input.focus({ preventScroll: true });
      held.extra.hidden = true;
      held.extra.replaceChildren();
      held.body.mark(-1);
    }
    pinned = null;
    if (tells) model.send({ kind: "shut" });
  }

  // Writing anew.
  function edit(turn) {
    const held = bodies.get(turn.id);
    editing = turn.id;
    const box = make("textarea", { value: turn.text, rows: Math.min(12, turn.text.split("\n").length + 1), "aria-label": "The message, written anew" });
    const done = () => {
      editing = null;
      held.drawn = "";
      sync();
      input.focus();
    };
    const go = () => {
      if (!box.value.trim() || get("busy")) return;
      begin();
      tell({ kind: "edit", turn: turn.id, text: box.value });
      done();
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") (event.stopPropagation(), done());
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), go());
    });
    held.article.replaceChildren(box, make("div", { className: "irkit-actions irkit-now" }, action("Send", "Send it anew", go), action("Cancel", "Leave it as it was", done)));
    box.focus();
  }

  // What the kernel says.
  function received(message, buffers) {
    awaited = 0;
    const held = bodies.get(message.turn);
    if (message.kind === "begun") threads = true;
    else if (message.kind === "delta") {
      if (!held) return;
      if (message.seq !== seq + 1) return message.seq > seq && model.send({ kind: "state" });
      seq = message.seq;
      held.body.grow(message.html, message.open);
      if (message.tokens && held.body.take(message.tokens.first, unpack(message.tokens, buffers, most))) held.body.show(get("colour"));
      progress(held, message);
    } else if (message.kind === "whole") {
      if (!held) return;
      seq = message.seq;
      held.body.whole(message.html, message.open);
      progress(held, message);
    } else if (message.kind === "turns") {
      for (const trait of ["turns", "used", "busy"]) model.set(trait, message[trait]);
    } else if (message.kind === "tokens") {
      if (!held) return;
      const entropies = buffers[4]?.byteLength ? typed(buffers[4], Float32Array) : null;
      held.body.take(message.first, unpack(message, buffers, most), entropies);
      held.body.show(get("colour"));
      if (pinned?.turn === message.turn) pin(pinned.turn, pinned.position, false);
    } else if (message.kind === "opened") say("");
    else if (message.kind === "problem") {
      say(message.text);
      if (message.of.kind === "send" && !input.value) input.value = message.of.text;
    } else if (message.kind === "file") {
      const types = { json: ["application/json", "json"], markdown: ["text/markdown", "md"] };
      const [type, ending] = types[message.format];
      const link = make("a", { href: URL.createObjectURL(new Blob([message.text], { type })), download: `chat.${ending}` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }
  }
  function progress(held, message) {
    held.facts.textContent = message.facts;
    if (message.used) fill(message.used);
    if (message.said) spoken.textContent = message.said;
    toEnd();
  }

  // Keys.
  function grow() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight + 2, 200)}px`;
  }
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  view.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (get("busy")) halt();
    else if (pinned) {
      unpin();
      input.focus();
    }
  });
  system.value = get("system");
  systemBox.open = Boolean(system.value);
  system.addEventListener("change", () => {
    model.set("system", system.value);
    model.save_changes();
  });

  model.on("msg:custom", received);
  model.on("change:turns", sync);
  model.on("change:busy", () => (state(), sync()));
  for (const trait of ["titles", "current"]) model.on(`change:${trait}`, state);
  model.on("change:used", () => fill(get("used")));
  model.on("change:colour", () => (explain(), sync()));
  model.on("change:system", () => (system.value = get("system")));
  state();
  explain();
  sync();
  model.send({ kind: "state" });
  return () => {
    clearInterval(timer);
    clearInterval(poll);
  };
}

export default { render };
