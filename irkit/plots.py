"""matplotlib Figures of what irkit finds out.

They belong to nobody's pyplot: nothing is open, nothing needs a display, and a notebook shows them as they are. They
bring a light ground of their own, so that they can be read in a dark notebook as well.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from irkit.errors import OptionError

try:
    import matplotlib.figure
    from matplotlib import font_manager
except ImportError as error:
    raise OptionError("plots need matplotlib: pip install 'irkit[notebook]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from irkit.results import Generation, Score, Token
    from irkit.trace import Trace

GROUND, INK, FAINT, BLUE, RED = "#ffffff", "#24292f", "#8c959f", "#2166ac", "#b2182b"
LABEL = 12
"""Characters of a token that a label shows."""
NAMED = 64
"""Rows or columns up to which each one is named."""


class Figure(matplotlib.figure.Figure):
    """A matplotlib Figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight", dpi=96)
        return buffer.getvalue()


def attention(trace: Trace, layer: int | None = None, head: int | None = None, text: int = 0) -> Figure:
    """A layer's attention patterns, queries down and keys across: of one head, or of all that are held.

    `layer` is by default the last that the trace holds; `text` is which one of a batch.

    Raises:
        KeyError: the trace does not hold the layer's pattern.
        OptionError: it holds it reduced, or not this head.
    """
    point = "attn.hook_pattern"
    if trace.provenance.reduce.get(point, "none") != "none":
        raise OptionError(f"the trace holds the pattern's {trace.provenance.reduce[point]}, not the pattern")
    trace = trace.row(text) if len(trace.ids) > 1 else trace
    layer = trace.layers("pattern")[-1] if layer is None else layer
    layer += trace.n_layers * (layer < 0)
    found = trace["pattern", layer][0]
    held = list(trace.provenance.heads.get(point, range(len(found))))
    if head is not None and head not in held:
        raise OptionError(f"head: there is no {head} in the trace; it holds {', '.join(map(str, held))}")
    chosen = held if head is None else [head]
    kept = trace.provenance.positions
    queries = np.arange(found.shape[1]) if kept is None else np.array(kept)
    whole = len(trace.tokens) == found.shape[2]  # one token of an answer does not know those before it
    keys = trace.tokens if whole else range(found.shape[2])
    rows = [trace.tokens[at] for at in queries] if whole else trace.tokens
    unseen = np.arange(found.shape[2]) > queries[:, None]
    maps: dict[str, np.ndarray] = {
        f"head {number}": np.ma.array(found[held.index(number)], mask=unseen) for number in chosen
    }
    if head is None:
        return _grid(f"Attention, layer {layer}", maps, rows, keys, low=0, high=1)
    title = f"Attention, layer {layer}, head {head}"
    return _heat_map(title, maps[f"head {head}"], rows, keys, ("query", "key"), low=0, high=1)


def heads(thumbnails: np.ndarray, layers: Sequence[int], heads: Sequence[int]) -> Figure:
    """All heads at a glance, layers across and heads down: `thumbnails` is `[layer, head, row, column]`, 0 where
    nothing is, each on a scale of its own."""
    n_layers, n_heads, tall, wide = thumbnails.shape
    scaled = thumbnails / np.maximum(thumbnails.max(axis=(2, 3), keepdims=True), 1)
    framed = np.pad(np.where(thumbnails, scaled, np.nan), [(0, 0), (0, 0), (0, 2), (0, 2)], constant_values=np.nan)
    sheet = framed.transpose(1, 2, 0, 3).reshape(n_heads * (tall + 2), n_layers * (wide + 2))
    width = _between(3, 0.36 * n_layers, 11)
    figure = Figure(figsize=(width, 0.8 + width * n_heads / n_layers), layout="constrained", facecolor=GROUND)
    plane = figure.subplots()
    plane.imshow(sheet, cmap="viridis", vmin=0, vmax=1, aspect=wide / tall, interpolation="nearest")
    plane.set_xticks(np.arange(n_layers) * (wide + 2) + wide / 2, list(map(str, layers)), fontsize=7)
    plane.set_yticks(np.arange(n_heads) * (tall + 2) + tall / 2, list(map(str, heads)), fontsize=7)
    _dress(plane, "Attention: layers across, heads down")
    plane.tick_params(length=0)
    plane.spines[:].set_visible(False)
    return figure


def logit_lens(result: Any, show: str = "probability") -> Figure:
    """The likeliest next token by layer and position; the ground is its probability, or (`show="kl"`) the KL
    divergence from the last layer, in nats."""
    if show not in ("probability", "kl"):
        raise OptionError(f"show: {show!r} is neither 'probability' nor 'kl'")
    best = result.logprobs[..., 0]
    values = np.exp(best) if show == "probability" else result.kl
    cells = [[_label(tokens[0]) for tokens in row] for row in result.strings]
    what, high = ("probability", 1) if show == "probability" else ("KL from the last layer, nats", None)
    axes = ("layer", "token")
    return _heat_map(f"Logit lens: {what}", values, result.layers, result.tokens, axes, cells=cells, low=0, high=high)


def attribution(result: Any, top: int = 30) -> Figure:
    """What the `top` components that matter most add to the logit, or logit difference, in the model's order."""
    names, values = list(result.components), np.array(list(result.components.values()))
    kept = sorted(np.argsort(-np.abs(values), kind="stable")[:top])
    versus = f" - {_label(result.other)}" if result.other is not None else ""
    title = f"Attribution of the logit {_label(result.token)}{versus}"
    return _bars(title, [names[i] for i in kept], values[kept], "logit")


def head_scores(result: Any) -> Figure:
    """Three tables of layers and heads: induction, previous-token and duplicate-token scores."""
    kinds = ("induction", "previous_token", "duplicate_token")
    maps = {kind.replace("_", " "): getattr(result, kind) for kind in kinds}
    n_layers, n_heads = result.induction.shape
    return _grid("Head scores", maps, range(n_layers), range(n_heads), across=3, low=0, high=1, axes=("layer", "head"))


def patching(result: Any) -> Figure:
    """The metric when one place of the run is patched, layers down; white is the unpatched run."""
    reach = np.nanmax(np.abs(result.values - result.corrupt), initial=1e-12)
    limits = {"low": result.corrupt - reach, "high": result.corrupt + reach, "colours": "RdBu_r"}
    title = f"Patching {result.name}: {result.metric}"
    return _heat_map(title, result.values, result.layers, result.labels, ("layer", result.over), **limits)


def saliency(result: Any) -> Figure:
    """How much each token of the text matters."""
    return _bars("Saliency", list(result.strings), np.asarray(result.values), "saliency")


def compare(result: Any) -> Figure:
    """How far two models are from each other, layer by layer: KL divergence of the lens, cosine of the residual
    streams, drift of attention, the mean over heads."""
    panels = {
        "KL divergence, nats": result.kl,
        "cosine of the residual streams": result.cosine,
        "drift of attention": np.reshape(result.drift, (len(result.kl), -1)).mean(axis=1),
    }
    figure = Figure(figsize=(7, 6), layout="constrained", facecolor=GROUND)
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(every, panels.items(), strict=True):
        axes.plot(np.arange(len(values)), values, color=BLUE, marker="o", markersize=3)
        axes.grid(color=FAINT, alpha=0.3)
        _dress(axes, name)
    every[-1].set_xlabel("layer", color=INK)
    return figure


def probabilities(what: Score | Generation | Token) -> Figure:
    """The model's own probability of each token of a scored text or an answer; of one token, those of the likeliest
    in its place.

    Raises:
        OptionError: the token has no alternatives; ask with `top_logprobs`.
    """
    tokens: Any = getattr(what, "tokens", None)
    if tokens is None:
        tokens = getattr(what, "top", ())
        if not tokens:
            raise OptionError("the token has no alternatives; ask for them with top_logprobs")
    known = [token for token in tokens if token.logprob is not None]
    return _bars("Probability", [token.text for token in known], np.exp([token.logprob for token in known]), "", high=1)


def cache(view: Any) -> Figure:
    """The lengths of the keys and of the values in a KV cache, layers down and tokens across, the mean over heads."""
    return lengths(view.lengths().mean(axis=2), view.strings)


def lengths(means: np.ndarray, strings: Sequence[str]) -> Figure:
    """The lengths of keys and values, `[2, layer, position]`."""
    kinds = {f"mean length of the {name}": each for name, each in zip(("keys", "values"), means, strict=True)}
    layers = range(means.shape[1])
    return _grid(f"KV cache, {len(strings)} tokens", kinds, layers, strings, across=1, axes=("layer", ""))


def _heat_map(
    title: str,
    values: np.ndarray,
    rows: Sequence[Any],
    columns: Sequence[Any],
    axes: tuple[str, str],
    *,
    cells: Sequence[Sequence[str]] | None = None,
    **limits: Any,
) -> Figure:
    """One map, with a bar of its colours, and with texts in its cells if given."""
    width = 0.28 if cells is None else 0.12 + 0.075 * max((len(text) for row in cells for text in row), default=1)
    size = (_between(4, 2 + width * len(columns), 18), _between(3, 1.5 + 0.25 * len(rows), 14))
    figure = Figure(figsize=size, layout="constrained", facecolor=GROUND)
    plane = figure.subplots()
    image = _map(plane, values, rows, columns, **limits)
    _dress(plane, title)
    plane.set_ylabel(axes[0], color=INK)
    plane.set_xlabel(axes[1], color=INK)
    _dress(figure.colorbar(image, ax=plane, shrink=0.8).ax, "")
    if cells is not None and len(rows) <= NAMED and len(columns) <= NAMED:
        shades = image.cmap(image.norm(np.asarray(values)))[..., :3] @ np.array([0.299, 0.587, 0.114])
        for row, texts in enumerate(cells):
            for column, text in enumerate(texts):
                colour = INK if shades[row, column] > 0.55 else GROUND
                plane.text(column, row, text, ha="center", va="center", fontsize=7, color=colour, parse_math=False)
    return figure


def _grid(
    title: str,
    maps: dict[str, np.ndarray],
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    across: int | None = None,
    axes: tuple[str, str] = ("", ""),
    **limits: Any,
) -> Figure:
    """Several maps of the same rows and columns, on one scale unless each has its own."""
    across = across or math.ceil(math.sqrt(len(maps)))
    down = math.ceil(len(maps) / across)
    cell = _between(1.8, 0.17 * len(columns), 10 / across + 1), _between(1.8, 0.17 * len(rows), 12 / down + 1)
    figure = Figure(figsize=(1 + cell[0] * across, 1 + cell[1] * down), layout="constrained", facecolor=GROUND)
    planes = figure.subplots(down, across, squeeze=False)
    figure.suptitle(title, color=INK)
    image = None
    for index, (name, values) in enumerate(maps.items()):
        plane = planes.flat[index]
        first, last = index % across == 0, index + across >= len(maps)
        image = _map(plane, values, rows if first else (), columns if last else (), **limits)
        _dress(plane, name)
        plane.set_ylabel(axes[0] if first else "", color=INK)
        plane.set_xlabel(axes[1] if last else "", color=INK)
        if not limits:
            _dress(figure.colorbar(image, ax=plane).ax, "")
    for plane in planes.flat[len(maps) :]:
        plane.set_axis_off()
    if limits and image:
        _dress(figure.colorbar(image, ax=planes, shrink=0.6).ax, "")
    return figure


def _map(
    plane: Axes,
    values: np.ndarray,
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    low: float | None = None,
    high: float | None = None,
    colours: str = "Blues",
) -> Any:
    image = plane.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    for axis, names in ((plane.yaxis, rows), (plane.xaxis, columns)):
        step = math.ceil(len(names) / NAMED) or 1
        shown = range(0, len(names), step)
        axis.set_ticks(shown, [_label(names[at]) for at in shown], parse_math=False, fontsize=7)
    plane.xaxis.set_tick_params(rotation=90 if any(isinstance(name, str) for name in columns) else 0)
    return image


def _bars(title: str, names: Sequence[str], values: np.ndarray, unit: str, *, high: float | None = None) -> Figure:
    """Horizontal bars from the top down, those below zero in another colour."""
    height = _between(2, 1 + 0.2 * len(names), 40)
    figure = Figure(figsize=(6, height), layout="constrained", facecolor=GROUND)
    plane = figure.subplots()
    places = np.arange(len(names))
    plane.barh(places, values, color=[RED if value < 0 else BLUE for value in values])
    plane.set_yticks(places, [_label(name) for name in names], parse_math=False, fontsize=8)
    plane.invert_yaxis()
    plane.axvline(0, color=FAINT, linewidth=0.8)
    if high is not None:
        plane.set_xlim(0, high)
    plane.set_xlabel(unit, color=INK)
    _dress(plane, title)
    return figure


def _dress(plane: Axes, title: str) -> None:
    """The colours are said, not taken from a style that somebody may have set."""
    plane.set_facecolor(GROUND)
    plane.set_title(title, color=INK, fontsize=9, parse_math=False)
    plane.tick_params(colors=INK)
    for spine in plane.spines.values():
        spine.set_color(FAINT)


def _label(name: Any) -> str:
    """A token as a label: spaces and line breaks to be seen, what the font lacks by its number, and not too long."""
    if not isinstance(name, str):
        return str(name)
    marks = {" ": "·", "\n": "↵", "\t": "→"}
    glyphs = _glyphs(font_manager.findfont(font_manager.FontProperties()))
    shown = "".join(
        marks.get(c) or (c if ord(c) in glyphs and unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}")
        for c in name[: LABEL + 1]
    )
    return shown if len(shown) <= LABEL else f"{shown[: LABEL - 1]}…"


@lru_cache(maxsize=4)
def _glyphs(font: str) -> frozenset[int]:
    """The characters that a font file has."""
    return frozenset(font_manager.get_font(font).get_charmap())


def _between(low: float, value: float, high: float) -> float:
    return min(max(low, value), high)
