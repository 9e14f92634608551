"""The attention view: every head as a thumbnail, one at full resolution, and the text that lights up with it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import traitlets

from irkit.errors import OptionError
from irkit.trace import Trace
from irkit.widgets import base

THUMBNAIL = 48
"""Pixels of a thumbnail's side, at most."""
CHOSEN = ("layer", "head", "token", "locked", "sort", "direction", "mask_first", "colours")
_POINT = "attn.hook_pattern"
_LISTED = 5
"""Heads that the static twin lists for each score."""


class AttentionView(base.View):
    """The attention patterns of a trace; what is chosen in it are traits, to be read, set and linked."""

    _esm = base.source("common.js", "attention.js")
    _css = base.source("views.css")

    info = traitlets.Dict().tag(sync=True)
    thumbnails = traitlets.Bytes().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    """The layer whose head is shown in full, as the model counts."""
    head = traitlets.Int().tag(sync=True)
    token = traitlets.Int().tag(sync=True)
    """The position of the token that is looked at."""
    locked = traitlets.Bool(False).tag(sync=True)
    """Whether the pointer leaves `token` as it is."""
    sort = traitlets.Enum(["model", "entropy", "previous_token", "induction"], "model").tag(sync=True)
    direction = traitlets.Enum(["reads", "read_by"], "reads").tag(sync=True)
    mask_first = traitlets.Bool(False).tag(sync=True)
    colours = traitlets.Enum(["viridis", "cividis"], "viridis").tag(sync=True)

    def __init__(self, trace: Trace, text: int = 0, **chosen: Any) -> None:
        """Of one `text` of the trace's batch; `chosen` are values for the traits.

        Raises:
            OptionError: the trace holds no patterns, or holds them reduced; there is no such text, or nothing to
                choose like that.
        """
        self._trace = trace = _one(trace, text)
        layers = trace.layers(_POINT)
        patterns = [trace[_POINT, layer][0] for layer in layers]
        n_heads, n_queries, n_keys = patterns[0].shape
        self._heads = list(trace.provenance.heads.get(_POINT, range(n_heads)))
        kept = trace.provenance.positions
        self._queries = np.arange(n_queries) if kept is None else np.array(kept)
        whole = len(trace.tokens) == n_keys  # one token of an answer does not know those before it
        tokens = trace.tokens if whole else [str(key) for key in range(n_keys - 1)] + [trace.tokens[-1]]
        scores = head_scores(patterns, self._queries, trace.ids[0] if whole else ())
        first = scores.get("induction", scores["previous_token"])
        layer, head = np.unravel_index(np.argmax(first), first.shape)
        small = np.stack([thumbnails(pattern, self._queries) for pattern in patterns])
        row = np.argmax(patterns[layer][head][:, 1:].max(axis=1, initial=0))
        chosen = {"layer": layers[layer], "head": self._heads[head], "token": int(self._queries[row])} | chosen
        _check("layer", chosen["layer"], layers)
        _check("head", chosen["head"], self._heads)
        if chosen.get("sort") == "induction" and "induction" not in scores:
            raise OptionError("sort: the text repeats no token, so there is no induction score")
        self._scores = scores
        super().__init__(
            info={
                "layers": list(layers),
                "heads": self._heads,
                "queries": self._queries.tolist(),
                "tokens": list(tokens),
                "scores": {name: np.ravel(each).round(6).tolist() for name, each in scores.items()},
                "size": small.shape[2:],
            },
            thumbnails=small.tobytes(),
        )
        for name, value in chosen.items():
            if name not in CHOSEN:
                raise OptionError(f"there is no {name!r} to choose; there are {', '.join(CHOSEN)}")
            try:
                setattr(self, name, value)
            except traitlets.TraitError as error:
                raise OptionError(f"{name}: {error}") from error
        self.on_msg(self._asked)

    def _asked(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        """One head in full: float32, each query's weights up to itself, one query after the other."""
        if message.get("kind") != "head" or message.get("head") not in self._heads:
            return
        pattern = self._trace[_POINT, message["layer"]][0][self._heads.index(message["head"])]
        seen = np.arange(pattern.shape[1]) <= self._queries[:, None]
        self.send(message, [np.ascontiguousarray(pattern[seen], np.float32).tobytes()])

    def twin(self) -> str:
        """The view as HTML without script: all heads, the chosen one, and the heads with the highest scores."""
        from irkit import plots

        info, (tall, wide) = self.info, self.info["size"]
        shape = len(info["layers"]), len(info["heads"]), tall, wide
        grid = plots.heads(np.frombuffer(self.thumbnails, np.uint8).reshape(shape), info["layers"], info["heads"])
        parts = [base.picture(grid, f"the attention patterns of {shape[0]} layers of {shape[1]} heads")]
        one = plots.attention(self._trace, self.layer, self.head)
        parts.append(base.picture(one, f"the attention pattern of layer {self.layer}, head {self.head}"))
        for name, values in self._scores.items():
            best = np.argsort(values if name == "entropy" else -values, axis=None, kind="stable")[:_LISTED]
            cells = [divmod(int(at), shape[1]) for at in best]
            heads = (f"L{info['layers'][i]}H{info['heads'][j]} {values[i, j]:.2f}" for i, j in cells)
            kind = "lowest entropy, in nats" if name == "entropy" else f"highest {name.replace('_', '-')} score"
            parts.append(f"<div>Heads with the {escape(kind)}: {escape(', '.join(heads))}</div>")
        return "".join(parts)


def head_scores(patterns: Sequence[np.ndarray], queries: np.ndarray, ids: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """How heads attend in a text as it is: `[layer, head]` each, means over the queries that have more than one key.

    `entropy` of the weights in nats; `previous_token`, the weight of the token before; and, where `ids` repeat a token,
    `induction`, the weight of the token behind the last occurrence of the present one, over the queries that have one
    (Olsson et al. 2022, arXiv:2209.11895, take both of the last on random tokens that are repeated).

    Args:
        patterns: `[head, query, key]` of each layer.
        queries: The position of each query.
        ids: The tokens at all positions.
    """
    rows = np.flatnonzero(queries > 0)
    last: dict[int, int] = {}
    behind = []
    for position, token in enumerate(ids):
        if token in last and position in queries:
            behind.append((int(np.flatnonzero(queries == position)[0]), last[token] + 1))
        last[token] = position
    found: dict[str, list[np.ndarray]] = {"entropy": [], "previous_token": [], "induction": []}
    for pattern in patterns:
        weights = pattern[:, rows]
        logs = np.log(np.where(weights > 0, weights, 1))
        count = max(len(rows), 1)
        found["entropy"].append(-np.einsum("hqk,hqk->h", weights, logs) / count)
        found["previous_token"].append(pattern[:, rows, queries[rows] - 1].sum(axis=1) / count)
        if behind:
            found["induction"].append(pattern[:, *np.transpose(behind)].mean(axis=1))
    return {name: np.stack(each) for name, each in found.items() if each}


def thumbnails(pattern: np.ndarray, queries: np.ndarray, side: int = THUMBNAIL) -> np.ndarray:
    """`[head, query, key]` as uint8 `[head, <= side, <= side]`: the largest weight w of each block as 1 + 254 sqrt(w).

    The first key has a column of its own, so that it can be hidden; 0 is where no query of the block comes after a key.
    """
    _, n_queries, n_keys = pattern.shape
    rows = _starts(n_queries, side)
    columns = np.concatenate([[0], 1 + _starts(n_keys - 1, side - 1)]) if n_keys > 1 else np.zeros(1, np.intp)
    largest = np.maximum.reduceat(np.maximum.reduceat(pattern, rows, axis=1), columns, axis=2)
    latest = np.maximum.reduceat(queries, rows)
    return np.where(columns <= latest[:, None], 1 + np.rint(254 * np.sqrt(largest)), 0).astype(np.uint8)


def _starts(count: int, most: int) -> np.ndarray:
    """Where `count` things begin that are cut into at most `most` blocks of about the same length."""
    blocks = min(count, most)
    return np.arange(blocks) * count // blocks


def _one(trace: Trace, text: int) -> Trace:
    if _POINT not in trace:
        raise OptionError("the trace holds no attention patterns; ask for them with names='pattern'")
    if trace.provenance.reduce.get(_POINT, "none") != "none":
        raise OptionError(f"the trace holds the pattern's {trace.provenance.reduce[_POINT]}, not the pattern")
    if not -len(trace.ids) <= text < len(trace.ids):
        raise OptionError(f"text: there is no {text}; the trace has {len(trace.ids)}")
    return trace.row(text % len(trace.ids)) if len(trace.ids) > 1 else trace


def _check(what: str, value: int, held: Sequence[int]) -> None:
    if value not in held:
        raise OptionError(f"{what}: there is no {value} in the trace; it holds {', '.join(map(str, held))}")
