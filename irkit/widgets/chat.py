"""The chat: answers that appear as they are made, and tokens that can be opened, continued from and looked into.

What the page asks is taken up here and done elsewhere: an answer is made by the engine and watched by a thread of its
own, and whatever else computes waits its turn in another. So Stop is heard at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import traitlets
from ipywidgets import VBox, Widget

from irkit import reprs
from irkit.errors import IrkitError, OptionError
from irkit.options import GenerateOptions, SamplingOptions, parse
from irkit.results import Token
from irkit.session import Session
from irkit.widgets import answer, base, controls, conversation
from irkit.widgets.answer import Live
from irkit.widgets.choosing import choose
from irkit.widgets.conversation import Turn
from irkit.widgets.inspector import Inspector

BEAT = 1 / 4
"""Seconds between two messages to the page while an answer is made, at least."""
_PATIENCE = 5.0
"""Seconds that a chat's end may take when another takes its place."""
_SHARE = 12
"""A message may take one part in so many of the time between two; where it takes longer, they come less often."""


class Chat(base.View):
    """A conversation with a model. `messages` has it in Python; `ask`, `stop` and the rest do what the page's keys do.

    Every version of a message is kept: an answer made again, a message written anew and a token replaced are branches,
    and one of them is shown.
    """

    _esm = base.source("common.js", "answer.js", "chat.js")
    _css = base.source("views.css", "chat.css")

    info = traitlets.Dict().tag(sync=True)
    turns = traitlets.List().tag(sync=True)
    """The messages that are shown, as the page draws them."""
    system = traitlets.Unicode().tag(sync=True, choice=True)
    """What the model is told before the conversation; if empty, what it was made with."""
    colour = traitlets.Enum(["none", "probability", "entropy"], "none").tag(sync=True, choice=True)
    """What the tokens of the answers are coloured by."""
    busy = traitlets.Int(0).tag(sync=True)
    """The id of the answer that is being made; 0 where none is."""
    used = traitlets.Int(0).tag(sync=True)
    """Tokens of the context that the conversation takes."""
    titles = traitlets.List().tag(sync=True)
    """How each conversation of this chat begins."""
    current = traitlets.Int(0).tag(sync=True)
    """Which of them is shown."""

    def __init__(
        self, session: Session, system: str = "", options: GenerateOptions | None = None, **chosen: Any
    ) -> None:
        """Of a session; `options` are what the controls begin with, `chosen` values for the traits.

        Raises:
            OptionError: there is nothing to choose like that, or the session is closed.
        """
        self._session = session
        self._options = options or session.defaults
        n_ctx = session._cache.n_ctx
        super().__init__(
            info={"model": session.name, "n_ctx": n_ctx, "alternatives": answer.ALTERNATIVES}, system=system
        )
        choose(self, chosen)
        self._roots = [Turn("")]
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._work = ThreadPoolExecutor(1, "irkit-chat")
        self.controls = controls.sampling(GenerateOptions, dict(self._options))
        """The sampling controls: to be read, set and observed."""
        self.controls.observe(self._changed)
        for widget in (*self.controls.widgets.values(), self.controls.preset):
            base.beside_cells(widget)
        self._inspector = Inspector(session)
        self._opening: dict[str, Any] | None = None
        self.on_msg(self._asked)

    # What it is displayed as.

    def whole(self) -> Widget:
        """The chat, what was opened in it, and the controls."""
        folded = controls.folded(self.controls, "Sampling")
        folded.add_class("irkit-below")
        return VBox([self, self._inspector.box, folded])

    def twin(self) -> str:
        """The conversation as HTML without script: what was said, and each answer's tokens by their likelihood."""
        parts = [answer.twin(list(conversation.path(self._root)))]
        if self.system:
            parts.insert(0, f"<p><b>system</b></p><div class='irkit-words'>{escape(self.system)}</div>")
        facts = [f"a conversation with {self._session.name}", *([] if self._root.after else ["nothing said yet"])]
        return reprs.out(*parts, reprs.note(facts))

    def close(self) -> None:
        """End the answer that is being made, and take the chat away; the conversation stays readable."""
        self.stop()
        self._work.shutdown(wait=False, cancel_futures=True)
        self._inspector.close()
        self.controls.close()
        super().close()

    # The conversation, from Python.

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as it is shown: what `Session.respond` takes."""
        return conversation.messages(list(conversation.path(self._root)), self.system)

    def save(self, path: str | Path) -> None:
        """Write the conversation into a file: as JSON, with every branch, or, if its name ends in .md, for reading.

        Raises:
            OptionError: it cannot be written.
        """
        kind = "markdown" if Path(path).suffix == ".md" else "json"
        try:
            Path(path).write_text(self.export(kind), "utf-8")
        except OSError as error:
            raise OptionError(f"{path}: {error.strerror}") from None

    def export(self, kind: str = "json") -> str:
        """The conversation as `json`, with every branch, or as `markdown`, for reading.

        Raises:
            OptionError: it is another kind.
        """
        made = {"json": conversation.to_json, "markdown": conversation.to_markdown}
        if kind not in made:
            raise OptionError(f"export: must be 'json' or 'markdown', got {kind!r}")
        return made[kind](self._root, self._session.name, self.system)

    def ask(self, text: str) -> None:
        """Say something; the answer is made meanwhile, and `wait` waits for it.

        Raises:
            OptionError: an answer is being made already, or there is nothing said.
        """
        if not text.strip():
            raise OptionError("there is nothing in the message")
        self._begin(lambda: self._last().add("user", text))

    def regenerate(self, turn: int | None = None) -> None:
        """Answer once more: the last message, or the one before the answer of this id. The old answer is kept.

        Raises:
            OptionError: an answer is being made already, or there is no such answer.
        """

        def asked() -> Turn:
            old = self._turn(turn) if turn is not None else self._last()
            if old.role == "assistant":
                assert old.before
                return old.before
            if old.role != "user":
                raise OptionError("there is nothing to answer yet")
            return old

        self._begin(asked)

    def edit(self, turn: int, text: str) -> None:
        """Say something else in place of the message of this id, which is kept, and have that answered.

        Raises:
            OptionError: an answer is being made already, or there is no such message.
        """

        def asked() -> Turn:
            old = self._turn(turn)
            if old.role != "user" or not text.strip():
                raise OptionError("only a message of one's own can be written anew, and not as nothing")
            assert old.before
            return old.before.add("user", text)

        self._begin(asked)

    def continue_from(self, turn: int, position: int, token: int) -> None:
        """Put another token in the place of one in an answer, and go on from there; the old answer is kept.

        Args:
            turn: The answer's id.
            position: Of the token in the answer.
            token: The id of the one to put there.

        Raises:
            OptionError: an answer is being made already, or there is no such answer or token.
        """
        with self._lock:
            old = self._turn(turn)
            if not 0 <= position < len(old.tokens):
                raise OptionError(f"there is no token {position} in that answer")
            ids = self._session._ids([token], "token")
            kept = old.tokens[:position]
            self._begin(lambda: old.before or old, prompt=old.prompt, kept=(*kept, self._token(old, kept, ids[0])))

    def show_version(self, turn: int) -> None:
        """Show the message of this id, in place of the one that is shown there now, and what came after it.

        Raises:
            OptionError: there is none.
        """
        with self._lock:
            self._turn(turn).choose()
            self._draw()

    def stop(self) -> None:
        """End the answer that is being made, if any; what was made of it stays."""
        live = self._live
        if live is not None:
            live.turn.stopped = True
            if live.turn.generation is not None:
                live.turn.generation.cancel()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until no answer is being made, no longer than `seconds`; whether that is so."""
        live = self._live
        return live is None or live.ended.wait(seconds)

    def new(self) -> None:
        """Begin another conversation; those before it are kept, and `switch` shows them.

        Raises:
            OptionError: an answer is being made.
        """
        with self._lock:
            if self._roots[-1].after:
                self._idle()
                self._roots.append(Turn(""))
            self.switch(len(self._roots) - 1)

    def switch(self, conversation: int) -> None:
        """Show this one of the chat's conversations, counted from 0.

        Raises:
            OptionError: an answer is being made, or there is no such conversation.
        """
        with self._lock:
            self._idle()
            if conversation not in range(len(self._roots)):
                raise OptionError(f"there is no conversation {conversation}; there are {len(self._roots)}")
            self.current = conversation
            self._inspector.clear()
            self._draw()
        self.refresh_twin()

    def succeed(self, old: base.View) -> None:
        """Go on with the conversations of the chat that the same cell showed of the same session."""
        if isinstance(old, Chat) and old._session is self._session and not self.turns:
            old.stop()
            old.wait(_PATIENCE)
            with self._lock:
                self._roots, self.current, self.system = old._roots, old.current, self.system or old.system
                self._draw()

    # Making an answer.

    def _begin(self, asked: Callable[[], Turn], **more: Any) -> None:
        """Have the message that `asked` gives answered, in a thread."""
        with self._lock:
            self._idle()
            turn = asked().add("assistant", **more)
            live = self._live = Live(turn)
            self._draw()
            threading.Thread(target=self._answer, args=(live,), daemon=True, name="irkit-answer").start()

    def _answer(self, live: Live) -> None:
        turn = live.turn
        try:
            self.send({"kind": "begun", "turn": turn.id})  # from this thread: the page sees if that works
            self._ask(turn)
            self._watch(live)
        except Exception as error:
            turn.problem = base.problem(error)
        with self._lock:
            self._live = None
            self._draw()
        live.ended.set()
        self.refresh_twin()
        if self.colour == "entropy":
            self._later(self._send_tokens, {"turn": turn.id, "entropy": True})

    def _ask(self, turn: Turn) -> None:
        """Begin the answer."""
        session, before = self._session, turn.before
        said: list[Turn] = []
        while before is not None and before.role:
            said.insert(0, before)
            before = before.before
        session.model.load()  # the template and the tokenizer go on beside it
        asked, ids, stop = session._laid_out(conversation.messages(said, self.system))
        turn.prompt = turn.prompt or tuple(ids)
        turn.text = "".join(token.text for token in turn.kept)
        if turn.kept and turn.kept[-1].id in session.model.tokenizer.eog_ids:
            return  # the answer ends with the token that was put into it
        options = parse(GenerateOptions, {**dict(self._options), **self.controls.read()})
        top = max(options.top_logprobs, answer.ALTERNATIVES)
        options = options.model_copy(update={"stop": (*options.stop, *stop), "top_logprobs": top})
        turn.generation = session._answer(turn.ids, options, None, None, asked)
        if turn.stopped:  # while it was being begun
            turn.generation.cancel()

    def _watch(self, live: Live) -> None:
        """Tell the page what is new, until the end."""
        made = live.turn.generation
        while made is not None:
            begun, done = time.perf_counter(), made.done
            with self._lock:
                self._tell(live)
            if done:
                if made._error is not None:
                    raise made._error
                return
            time.sleep(max(BEAT, _SHARE * (time.perf_counter() - begun)))

    def _tell(self, live: Live) -> None:
        turn, made = live.turn, live.turn.generation
        if made is None:
            return
        tokens = turn.tokens
        turn.text = "".join(token.text for token in turn.kept) + made.partial_text
        message, buffers = live.news(self.colour != "none", tokens)
        if message:
            self.send({**message, "used": len(turn.prompt) + len(tokens), "facts": answer.facts(turn)}, buffers)

    def _changed(self, changed: dict[str, Any]) -> None:
        live, sampling = self._live, changed.keys() & SamplingOptions.model_fields.keys()
        if sampling and live is not None and live.turn.generation is not None:
            live.turn.generation.change(**{name: changed[name] for name in sampling})

    # What the page asks.

    def _asked(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        kind = message.get("kind")
        try:
            match kind:
                case "ping":
                    self.send({"kind": "pong"})
                case "state" | "poll":
                    self._send_state(message)
                case "stop":
                    self.stop()
                    self.send({"kind": "pong"})
                case "send":
                    self.ask(message["text"])
                case "regenerate":
                    self.regenerate(message["turn"])
                case "edit":
                    self.edit(message["turn"], message["text"])
                case "continue":
                    self.continue_from(message["turn"], message["position"], message["token"])
                case "version":
                    self.show_version(message["turn"])
                case "new":
                    self.new()
                case "switch":
                    self.switch(message["conversation"])
                case "export":
                    text = self.export(message["format"])
                    self.send({"kind": "file", "format": message["format"], "text": text})
                case "tokens":
                    self._later(self._send_tokens, message)
                case "open":
                    self._opening = message
                    self._later(self._open, message)
                case "shut":
                    self._opening = None
                    self._inspector.clear()
        except IrkitError as error:
            self._problem(str(error), message)
        except (KeyError, TypeError):
            self._problem(f"the page asked something unknown: {kind}", message)

    def _later(self, do: Callable[[dict[str, Any]], None], message: dict[str, Any]) -> None:
        """Do what computes in a thread, one thing after another."""

        def job() -> None:
            try:
                do(message)
            except Exception as error:
                self._problem(base.problem(error), message)

        try:
            self._work.submit(job)
        except RuntimeError as error:
            raise OptionError("the chat is closed") from error

    def _problem(self, words: str, message: dict[str, Any]) -> None:
        self.send({"kind": "problem", "text": words, "of": {k: v for k, v in message.items() if k != "seq"}})

    def _send_state(self, message: dict[str, Any]) -> None:
        """The answer in the making as a whole, to a page that shows none of it, or has missed something."""
        with self._lock:
            live = self._live
            if live is not None and message.get("seq") == live.seq:
                return self._tell(live)
            if live is not None:
                whole = {"kind": "whole", **live.whole(), "facts": answer.facts(live.turn)}
                return self.send(whole)
            if message.get("kind") == "poll":  # what a thread has set does not reach this page
                self.send({"kind": "turns", "turns": self.turns, "busy": self.busy, "used": self.used})
        return None

    def _send_tokens(self, message: dict[str, Any]) -> None:
        """An answer's tokens, with what could have stood in their places."""
        turn = self._turn(message["turn"])
        tokens = turn.tokens
        if message.get("entropy") and turn.entropies is None and tokens and not self._is_live(turn):
            start = len(turn.prompt) - 1
            lens = self._session.lens(turn.ids, layers=-1, positions=range(start, start + len(tokens)), k=1)
            turn.entropies = lens.entropy[0].astype(np.float32)
        data, buffers = answer.packed(tokens)
        entropies = b"" if turn.entropies is None else turn.entropies.tobytes()
        self.send({"kind": "tokens", "turn": turn.id, "first": 0, **data}, [*buffers, entropies])

    def _open(self, message: dict[str, Any]) -> None:
        """Look into the step that made a token, unless another was chosen meanwhile."""
        if message is not self._opening:
            return
        turn, position = self._turn(message["turn"]), message["position"]
        tokens = turn.tokens
        if not 0 <= position < len(tokens):
            raise OptionError(f"there is no token {position} in that answer")
        self._inspector.show(turn.ids[: len(turn.prompt) + position], tokens[position])
        self.send({"kind": "opened", "turn": turn.id, "position": position})

    # What is shown.

    @property
    def _root(self) -> Turn:
        return self._roots[self.current]

    def _draw(self) -> None:
        """Bring the traits up to date."""
        shown = list(conversation.path(self._root))
        live = self._live.turn.id if self._live is not None else 0
        last = shown[-1] if shown else None
        with self.hold_sync():
            self.turns = [answer.drawn(turn, live) for turn in shown]
            self.titles = [root.after[root.chosen].text[:60] if root.after else "" for root in self._roots]
            self.busy = live
            self.used = len(last.prompt) + len(last.tokens) if last else 0

    def _last(self) -> Turn:
        return ([self._root, *conversation.path(self._root)])[-1]

    def _turn(self, id: Any) -> Turn:
        found = conversation.find(self._root, id)
        if found is None:
            raise OptionError(f"there is no message {id} in this conversation")
        return found

    def _is_live(self, turn: Turn) -> bool:
        return self._live is not None and self._live.turn is turn

    def _idle(self) -> None:
        if self._live is not None:
            raise OptionError("an answer is being made: stop it first")

    def _token(self, old: Turn, kept: Sequence[Token], id: int) -> Token:
        """The token that is put behind `kept`, in the place of one that `old` has there."""
        place = old.tokens[len(kept)]
        found = next((other.logprob for other in place.top if other.id == id), None)
        found = place.logprob if place.id == id else found
        written = self._session.model.tokenizer.decode([*(token.id for token in kept), id])
        text = written.removeprefix("".join(token.text for token in kept))
        return Token(id, text, found, place.top)
