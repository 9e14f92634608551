"""The steering panel: edits chosen with sliders and a grid, and the answer with them beside the one without."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from ipywidgets import VBox, Widget

from irkit import reprs
from irkit.analysis.steering import SteeringVector, steering_vector
from irkit.edits import Edit, scale, steer
from irkit.engine import CacheView
from irkit.errors import OptionError
from irkit.observing import ASKED_BY, Asker
from irkit.options import GenerateOptions, parse
from irkit.widgets import base, controls
from irkit.widgets.choosing import choose

if TYPE_CHECKING:
    from irkit.results import Generation, Token
    from irkit.session import Session

PERIOD = 0.12
"""Seconds between two messages of what is new."""
COMPARED = 8
"""Tokens whose probabilities are compared."""
BEGIN = {"temperature": 0.0, "num_predict": 60, "seed": 0}
"""How answers are made where nothing else is said: short, and the same each time."""
PARTS = {"attn": "attn_out", "mlp": "mlp_out"}
"""What can be scaled of a layer, and the hook point where it is."""


class SteeringPanel(base.View):
    """Edits to choose, and two answers to the same prompt: without and with them.

    What is chosen are traits, to be read, set and linked; `edits` are what they mean, for any method of `Session` that
    takes edits. Nothing is computed where a slider moves: two answers are begun in a thread of their own.
    """

    _esm = base.source("common.js", "steering.js")
    _css = base.source("views.css", "steering.css")

    info = traitlets.Dict().tag(sync=True)
    known = traitlets.Dict().tag(sync=True)
    """Of each vector: what it is, in words, and the strength at which its slider ends."""
    prompt = traitlets.Unicode().tag(sync=True, choice=True)
    as_message = traitlets.Bool(True).tag(sync=True, choice=True)
    """Whether the prompt is a message to be answered, or a text to be continued."""
    live = traitlets.Bool(True).tag(sync=True, choice=True)
    """Whether every change begins the answers anew."""
    vectors = traitlets.List(traitlets.Dict()).tag(sync=True, choice=True)
    """Of each vector: its `name`, `strength`, `layer`, and `positions`: "all", "answer" (from the end of the prompt
    on), or a list of them."""
    heads = traitlets.List().tag(sync=True, choice=True)
    """Heads that are scaled: `[layer, head, factor]`; 0 takes a head out."""
    layers = traitlets.List().tag(sync=True, choice=True)
    """Parts of layers that are scaled: `["attn" or "mlp", layer, factor]`."""
    answers = traitlets.Dict().tag(sync=True)
    """Both answers, once they have ended."""
    running = traitlets.Bool(False).tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    """Why there is no answer, in words."""

    def __init__(
        self, session: Session, vectors: Mapping[str, SteeringVector | Any] | None = None, **chosen: Any
    ) -> None:
        """`vectors` are arrays `[d_model]`, or what `steering_vector` finds, by name; `chosen` are values for the
        traits, or options of `Session.generate`.

        Raises:
            OptionError: a vector does not fit the model, or there is nothing to choose like that.
        """
        config = session.model.config
        super().__init__(
            info={
                "model": session.name,
                "layers": config.n_layers,
                "heads": config.n_heads,
                "n_ctx": session.cache.n_ctx,
            }
        )
        self._session = session
        self._sides = [session.fork(_empty(session)) for _ in range(2)]
        self._vectors: dict[str, np.ndarray] = {}
        self._stop = threading.Event()
        self._run = 0
        self._lock = threading.Lock()
        self.unedited: Generation | None = None
        """The last answer without the edits."""
        self.edited: Generation | None = None
        """The last answer with them."""
        for name, vector in (vectors or {}).items():
            self.add(name, vector)
        mine = {name: chosen.pop(name) for name in self.trait_names(choice=True) if name in chosen}
        self._options = parse(GenerateOptions, {**BEGIN, **chosen})
        choose(self, mine)
        self.controls = controls.sampling(GenerateOptions, dict(self._options))
        """The sampling controls, which hold for both answers: to be read, set and observed."""
        self._answered_with = self.options
        self.controls.observe(self._moved)
        self.on_msg(self._asked)

    def add(self, name: str, vector: SteeringVector | Any, layer: int | None = None, strength: float = 0.0) -> None:
        """Add a vector, or put it in the place of the one of this name; an array steers the middle layer where none is
        given.

        Raises:
            OptionError: it is not `[d_model]`, or there is no such layer.
        """
        config = self._session.model.config
        found = vector.vector if isinstance(vector, SteeringVector) else np.asarray(vector, np.float32)
        if found.shape != (config.d_model,) or not np.isfinite(found).all():
            raise OptionError(f"{name}: a vector of {config.d_model} finite numbers is needed, got {list(found.shape)}")
        about, most = f"a vector of length {np.linalg.norm(found):.3g}", 10.0
        at = config.n_layers // 2
        if isinstance(vector, SteeringVector):
            about, at = str(vector), vector.layer
            most = _round_up(0.75 * vector.scale / max(float(np.linalg.norm(found)), 1e-9))
        at = at if layer is None else layer
        if not 0 <= at < config.n_layers:
            raise OptionError(f"layer: there is no {at}; the model has {config.n_layers}")
        row = {"name": name, "strength": float(strength), "layer": at, "positions": "all"}
        self._vectors[name] = found
        with self.hold_sync():
            self.known = {**self.known, name: {"about": about, "most": most}}
            self.vectors = [each for each in self.vectors if each["name"] != name] + [row]

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What is chosen, as edits; none where all of it changes nothing.

        Vectors are all in it as long as one has a strength, and heads and layers all as long as one has a factor, so
        that what a slider does compiles nothing.

        Raises:
            OptionError: there is no such vector, layer, head or position.
        """
        config = self._session.model.config
        factors = {"z": np.ones((config.n_layers, config.n_heads), np.float32)}
        factors |= {point: np.ones(config.n_layers, np.float32) for point in PARTS.values()}
        try:
            for layer, head, factor in self.heads:
                factors["z"][_index(layer, config.n_layers), _index(head, config.n_heads)] = factor
            for part, layer, factor in self.layers:
                factors[PARTS[part]][_index(layer, config.n_layers)] = factor
            steers = [
                steer(self._vectors[row["name"]], int(row["layer"]), row["strength"], self._positions(row))
                for row in self.vectors
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise OptionError(f"there is nothing to edit like {error}") from None
        scales = [scale(point, factor) for point, factor in factors.items()]
        if all(np.all(factor == 1) for factor in factors.values()):
            scales = []
        return (*steers, *scales) if scales or any(edit.strength for edit in steers) else ()

    def _positions(self, row: Mapping[str, Any]) -> Any:
        where = row.get("positions", "all")
        # From the prompt's last token on, which the first token of the answer is drawn from.
        return {"all": None, "answer": slice(-1, self.info["n_ctx"])}[where] if isinstance(where, str) else where

    def answer(self) -> None:
        """Begin both answers anew; they are made while this returns."""
        with self._lock:
            self.stop()
            self._run += 1
            self._stop = threading.Event()
        threading.Thread(target=self._work, args=(self._run, self._stop), name="irkit-panel", daemon=True).start()

    def stop(self) -> None:
        """End both answers before their next token."""
        self._stop.set()
        for generation in (self.unedited, self.edited):
            if generation is not None:
                generation.cancel()

    def whole(self) -> Widget:
        """The panel, and the sampling controls folded below it."""
        folded = controls.folded(self.controls, "Sampling, for both")
        folded.add_class("irkit-below")
        return VBox([self, folded])

    def close(self) -> None:
        """End the answers, and take the panel away."""
        self.stop()
        self.controls.close()
        for side in self._sides:
            side.close()
        super().close()

    def _asked(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        kind = message.get("kind")
        if kind == "answer":
            self.answer()
        elif kind == "stop":
            self.stop()
        elif kind == "state":
            if self.unedited is not None and self.edited is not None:
                told = _told((self.unedited, self.edited), (0, 0))
                self.send({"kind": "answer", "run": self._run, "begin": (0, 0), **told})
        elif kind == "make":
            threading.Thread(target=self._make, args=(message,), daemon=True).start()

    def _moved(self, changed: dict[str, Any]) -> None:
        """A sampling control was moved; those that the page puts up say so too, without another value."""
        if self.live and self.prompt and self.options != self._answered_with:
            self.answer()

    def _make(self, message: Mapping[str, Any]) -> None:
        """A vector from two kinds of text, a line each."""
        try:
            sides = [[line for line in str(message.get(side, "")).splitlines() if line] for side in ("more", "less")]
            found = steering_vector(self._session, *sides, layer=int(message.get("layer", 0)))
            self.add(str(message.get("name")) or sides[0][0][:24], found, strength=1.0)
            self.problem = ""
        except Exception as error:
            self.problem = base.problem(error)
            return
        if self.live:
            self.answer()

    @property
    def options(self) -> GenerateOptions:
        """How both answers are made; a seed of -1 is another one for each pair of them."""
        return parse(GenerateOptions, {**dict(self._options), **self.controls.read()})

    def _work(self, run: int, stop: threading.Event) -> None:
        """Make both answers, and tell of them as they are made."""
        ASKED_BY.set(Asker("steering panel"))
        self.running = True
        try:
            pair = self._begin()
            with self._lock:
                if run == self._run:
                    self.unedited, self.edited = pair
                    self.problem = ""
            self._follow(run, stop, pair)
        except Exception as error:
            self.problem = base.problem(error)
        with self._lock:
            if run == self._run:
                self.running = False

    def _begin(self) -> tuple[Generation, Generation]:
        """Both answers, begun; the same one twice where nothing is edited."""
        self._session.model  # noqa: B018 - says so if the session is closed
        self._answered_with = self.options
        options, edits = dict(self._answered_with), self.edits
        options["top_logprobs"] = max(COMPARED, options["top_logprobs"])
        options["seed"] = options["seed"] if options["seed"] >= 0 else secrets.randbits(31)
        words: Any = [{"role": "user", "content": self.prompt}] if self.as_message else self.prompt
        asks = [side.respond if self.as_message else side.generate for side in self._sides]
        unedited = asks[0](words, **options)
        return unedited, asks[1](words, edits=edits, **options) if edits else unedited

    def _follow(self, run: int, stop: threading.Event, pair: tuple[Generation, Generation]) -> None:
        """Tell of both answers until they have ended, or others are wanted."""
        seen = (0, 0)
        ended = False
        while not ended:
            if stop.wait(PERIOD):
                for each in pair:
                    each.cancel()
                for each in pair:
                    each.wait_for(PERIOD)
            if run != self._run:
                return
            ended = all(each.done for each in pair)
            told = _told(pair, seen)
            self.send({"kind": "answer", "run": run, "begin": seen, **told})
            seen = tuple(begin + len(side["tokens"]) for begin, side in zip(seen, told["sides"], strict=True))
        for each in pair:
            each.wait()  # raises what it failed with
        self.answers = {"run": run, **_told(pair, (0, 0))}
        self.refresh_twin()

    def twin(self) -> str:
        """Both answers side by side as HTML without script, the first token that differs underlined."""
        edits = "; ".join(self.words()) or "no edits"
        parts = [f"<b>Steering</b> of <b>{escape(self.info['model'])}</b>", reprs.note([edits])]
        pair = [() if each is None else each.partial_tokens for each in (self.unedited, self.edited)]
        first = _parted(*([token.id for token in side] for side in pair))
        cells = []
        for side in pair:
            texts = [escape(token.text) for token in side]
            if first < len(texts):
                texts[first] = f'<u><b title="the first token that differs">{texts[first]}</b></u>'
            cells.append(f'<td><div class="irkit-words">{"".join(texts)}</div></td>')
        parts.append(f'<div class="irkit-words">{escape(self.prompt)}</div>')
        parts.append(f"<table><tr><th>unedited</th><th>edited</th></tr><tr>{''.join(cells)}</tr></table>")
        return reprs.out(*parts)

    def words(self) -> list[str]:
        """What is chosen and changes something, in words."""
        said = [
            f"{row['strength']:+g} × {row['name']} at layer {row['layer']}" for row in self.vectors if row["strength"]
        ]
        said += [f"layer {layer} head {head} × {factor:g}" for layer, head, factor in self.heads if factor != 1]
        names = {"attn": "attention", "mlp": "MLP"}
        return said + [
            f"layer {layer} {names[part]} × {factor:g}" for part, layer, factor in self.layers if factor != 1
        ]


def _empty(session: Session) -> CacheView:
    """A cache for a session like this one; a fork of its own would wait for the answer that is being made."""
    return CacheView(session.model, session.model.new_cache(session.cache.n_ctx))


def _told(pair: tuple[Generation, Generation], seen: Sequence[int]) -> dict[str, Any]:
    """Both answers, from these tokens on."""
    sides = []
    for generation, begin in zip(pair, seen, strict=True):
        facts = " · ".join(reprs.generation_facts(generation))
        sides.append({"tokens": [_token(token) for token in generation.partial_tokens[begin:]], "facts": facts})
    return {"sides": sides, "same": pair[0] is pair[1]}


def _token(token: Token) -> list[Any]:
    """Text, id, log-probability, and the likeliest in its place: text, id, log-probability."""
    tops = [[each.text, each.id, round(each.logprob, 4)] for each in token.top[:COMPARED]]
    return [token.text, token.id, None if token.logprob is None else round(token.logprob, 4), tops]


def _parted(left: Sequence[int], right: Sequence[int]) -> int:
    """The first place where two texts have different tokens, or one has ended."""
    same = min(len(left), len(right))
    return next((at for at in range(same) if left[at] != right[at]), same)


def _index(given: Any, count: int) -> int:
    if not 0 <= int(given) < count:
        raise ValueError(given)
    return int(given)


def _round_up(value: float) -> float:
    """To one digit: a strength at which a slider may end."""
    digit = 10.0 ** np.floor(np.log10(value))
    return float(np.ceil(value / digit) * digit)
