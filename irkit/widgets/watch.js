// What a session answers: a list of the last answers, the newest on top, and one of them in full.

function render({ model, el }) {
  const { model: name, alternatives: most, most: kept } = model.get("info");
  const rows = new Map(); // id -> what the list shows
  let body = answerBody();
  let shown = 0; // the id of the answer in full

  const view = root(model, el, "watch", "Answers of the session");
  const get = (trait) => model.get(trait);
  function set(values) {
    for (const [trait, value] of Object.entries(values)) model.set(trait, value);
    model.save_changes();
  }

  const going = make("span", { className: "irkit-note" });
  const list = make("div", { className: "irkit-list", role: "listbox", tabIndex: 0, "aria-label": `The last answers, ${kept} at most; arrow keys choose` });
  const head = make("div", { className: "irkit-head" });
  const said = make("div", { className: "irkit-said" });
  const holder = make("div", { className: "irkit-its" });
  const foot = make("div", { className: "irkit-row" });
  const pinned = make("div", { className: "irkit-pinned", hidden: true, role: "region", "aria-label": "The chosen token" });
  const stop = make("button", { hidden: true, onclick: () => model.send({ kind: "stop", id: shown }) }, "Stop");
  const told = make("div", { className: "irkit-note", role: "status", "aria-live": "polite" });
  const one = make("div", { className: "irkit-one" }, head, said, holder, foot, pinned);
  const empty = make("div", { className: "irkit-hello" }, "Nothing asked yet. Answers appear here as they are made, whoever asks.");
  view.append(
    make("div", { className: "irkit-bar" }, make("span", { className: "irkit-title" }, `Answers of ${name}`), going, tick(model, "follow", "show the newest")),
    make("div", { className: "irkit-columns" }, make("div", { className: "irkit-side irkit-listed" }, list, empty), make("div", { className: "irkit-side irkit-full" }, one, told)),
  );

  const items = new Map(); // id -> its element in the list
  function drawRow(row) {
    let item = items.get(row.id);
    if (!item) {
      item = make(
        "div",
        { role: "option", id: `irkit-${get("twin_id")}-${row.id}`, onclick: () => choose(row.id) },
        make("div", { className: "irkit-who" }, make("b"), make("span")),
        make("div", { className: "irkit-what" }),
        make("div", { className: "irkit-note" }),
      );
      items.set(row.id, item);
      list.prepend(item);
    }
    const [who, what, facts] = item.children;
    who.children[0].textContent = row.by;
    who.children[1].textContent = row.at;
    what.textContent = row.asked;
    facts.textContent = row.facts;
    item.classList.toggle("irkit-live", row.live);
  }
  function drawList() {
    for (const [id, item] of items) {
      const here = id === get("chosen");
      item.setAttribute("aria-selected", String(here));
      if (here) list.setAttribute("aria-activedescendant", item.id);
    }
    const live = [...rows.values()].filter((row) => row.live).length;
    going.textContent = live ? `${live} being made` : `${rows.size} seen`;
    empty.hidden = rows.size > 0;
    list.hidden = one.hidden = !rows.size;
    const problem = get("problem");
    told.classList.toggle("irkit-problem", Boolean(problem));
    told.textContent = problem;
  }
  function drawFacts() {
    const row = rows.get(shown);
    if (!row) return;
    head.replaceChildren(make("h4", {}, row.by), make("span", { className: "irkit-note" }, row.at));
    foot.replaceChildren(make("span", { className: "irkit-note" }, row.facts), stop);
    stop.hidden = !row.live;
    holder.classList.toggle("irkit-running", row.live);
  }
  function choose(id) {
    const newest = Math.max(...rows.keys());
    set({ chosen: id, ...(id === newest ? {} : { follow: false }) });
  }
  list.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    const ids = [...rows.keys()].sort((a, b) => b - a);
    const id = ids[clamp(ids.indexOf(get("chosen")) + step[0] + step[1], ids.length)];
    choose(id);
    items.get(id).scrollIntoView({ block: "nearest" });
  });

  // One answer in full.
  function whole(message, buffers) {
    const here = shown === message.id ? body.here : -1;
    const focused = holder.contains(document.activeElement);
    shown = message.id;
    rows.set(message.id, message.row);
    body = answerBody();
    body.take(0, unpack(message, buffers, most));
    body.show("probability");
    body.list.hidden = false;
    holder.replaceChildren(body.list);
    said.replaceChildren(
      ...message.messages.map(({ role, content }) => make("div", { className: `irkit-message irkit-from-${role}` }, make("span", { className: "irkit-role" }, role), make("div", {}, content))),
      ...(message.edits.length ? [make("div", { className: "irkit-note" }, `with edits: ${message.edits.join(", ")}`)] : []),
    );
    said.scrollTop = said.scrollHeight;
    pin(here, focused && here >= 0);
    drawFacts();
  }
  function more(message, buffers) {
    if (message.id !== shown) return;
    if (!body.take(message.first, unpack(message, buffers, most))) return void model.send({ kind: "state" });
    body.show("probability");
    if (holder.scrollHeight - holder.scrollTop - holder.clientHeight < 60) holder.scrollTop = holder.scrollHeight;
  }
  /** Shows what could have stood in a token's place, and offers to look into the step that made it. */
  function pin(index, focus = false) {
    body.mark(index, focus);
    const token = body.tokens[index];
    pinned.hidden = !token;
    if (!token) return;
    pinned.replaceChildren(
      make(
        "div",
        { className: "irkit-pinbar" },
        make("b", { className: "irkit-token" }, `“${tokenLabel(token.name, 28)}”`),
        make(
          "span",
          {},
          make("button", { onclick: () => model.send({ kind: "open", id: shown, position: index }), title: "Its attention, lens and cache, below" }, "Look inside"),
          " ",
          make("button", { onclick: () => shut(), "aria-label": "Close" }, "×"),
        ),
      ),
      ...alternatives(token, NaN),
    );
  }
  function shut() {
    pin(-1);
    model.send({ kind: "shut" });
    list.focus({ preventScroll: true });
  }
  holder.addEventListener("click", (event) => {
    const at = event.target.dataset.at;
    if (at !== undefined) pin(Number(at), true);
  });
  holder.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (event.key === "Escape") return shut();
    if (event.key === "Enter" && body.here >= 0) return void model.send({ kind: "open", id: shown, position: body.here });
    if (!step || !body.tokens.length) return;
    event.preventDefault();
    pin(clamp(body.here + step[0] + step[1], body.tokens.length), true);
  });
  holder.tabIndex = 0;
  holder.setAttribute("role", "group");
  holder.setAttribute("aria-label", "The answer's tokens; arrow keys choose one, Enter looks into it");

  function received(message, buffers) {
    if (message.kind === "news") {
      for (const row of message.rows) {
        rows.set(row.id, row);
        drawRow(row);
      }
      for (const id of [...rows.keys()].filter((id) => id < message.first)) {
        rows.delete(id);
        items.get(id)?.remove();
        items.delete(id);
      }
      if (message.more) more(message.more, buffers);
      drawFacts();
    } else if (message.kind === "whole") whole(message, buffers);
    drawList();
  }
  model.on("msg:custom", received);
  for (const trait of ["chosen", "problem"]) model.on(`change:${trait}`, drawList);
  drawList();
  model.send({ kind: "state" });
}

export default { render };
