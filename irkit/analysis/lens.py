"""The logit lens: what the residual stream would say if each layer were the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from irkit.analysis.inputs import Given, held_positions, one_text, places, token_id, value
from irkit.edits import Chosen
from irkit.errors import BudgetError, OptionError
from irkit.results import columns
from irkit.trace import Trace, size

if TYPE_CHECKING:
    import pandas

    import irkit
    from irkit.engine.runtime import Runtime
    from irkit.engine.worker import Steps
    from irkit.widgets.lens import LensView

_ROWS, _NUMBERS = 128, 1 << 23
"""Streams, and logits of them, that one call computes at most, unless one position alone has more."""
_SHOWN = 6
"""Positions in the table that is the repr."""

_Ranked = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
    """The likeliest next tokens at each layer and position, and how far each layer is from the last one.

    Logarithms are natural. The first axis is that of `layers`, the second that of `positions`.
    """

    layers: tuple[str, ...]
    """The number of each layer, for the stream that leaves it; `embed` for the one that enters the first."""
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    """The text's own token at each position, after which the next is predicted."""
    strings: tuple[tuple[tuple[str, ...], ...], ...]
    """The likeliest next tokens, likeliest first: `strings[layer][pos][i]`."""
    ids: np.ndarray
    """Their ids, `[layer, pos, k]`."""
    logprobs: np.ndarray
    """Their log-probabilities, `[layer, pos, k]`."""
    kl: np.ndarray
    """Kullback-Leibler divergence from the last layer's distribution p to this layer's q, `[layer, pos]`, in nats: the
    sum of p ln(p/q), as Belrose et al. (2023, arXiv:2303.08112) measure a lens."""
    entropy: np.ndarray
    """How undecided each layer's distribution is, `[layer, pos]`, in nats."""
    chosen: np.ndarray
    """The id of the token that is likeliest after the last layer, `[pos]`."""
    ranks: np.ndarray
    """How many tokens are likelier than that one, `[layer, pos]`."""
    read: InitVar[Callable[[Any], _Ranked]]

    def __post_init__(self, read: Callable[[Any], _Ranked]) -> None:
        object.__setattr__(self, "_read", read)  # not a field: it is nothing that could be written down

    def rank(self, token: str | int | Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """How many tokens are likelier than `token`, `[layer, pos]`: 0 where it comes first.

        `token` is a token's text or id, or an id for each position; if not given, the one chosen at the end.

        Raises:
            OptionError: it is not one token, or the session is closed.
        """
        return self.ranks if token is None else self._of(token)[0]

    def probability(self, token: str | int | Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """The probability of `token`, `[layer, pos]`; `token` as in `rank`."""
        return np.exp(self._of(self.chosen if token is None else token)[1])

    def _of(self, token: Any) -> _Ranked:
        return self._read(token)  # pyright: ignore[reportAttributeAccessIssue]

    def plot(self, **options: Any) -> Any:
        """A matplotlib Figure: the table of likeliest tokens."""
        from irkit import plots

        return plots.logit_lens(self, **options)

    def to_frame(self) -> pandas.DataFrame:
        """One row for each layer, position and place among the likeliest."""
        import pandas

        layer, pos, place = (axis.ravel() for axis in np.indices(self.ids.shape))
        return pandas.DataFrame(
            {
                "layer": np.array(self.layers, object)[layer],
                "position": np.array(self.positions)[pos],
                "token": np.array(self.tokens, object)[pos],
                "place": place,
                "prediction": [self.strings[i][j][n] for i, j, n in zip(layer, pos, place, strict=True)],
                "id": self.ids.ravel(),
                "logprob": self.logprobs.ravel(),
                "kl": self.kl[layer, pos],
                "entropy": self.entropy[layer, pos],
            }
        )

    def view(self, **chosen: Any) -> LensView:
        """A notebook's view of it: layers and positions with their tokens, one token followed through the layers.

        `chosen` as in `irkit.view.lens`.

        Raises:
            OptionError: there is nothing like what was chosen.
        """
        from irkit import view

        return view.lens(self, **chosen)

    def __str__(self) -> str:
        """The whole table: the likeliest token of each layer, and its probability in percent, at each position."""
        return "\n".join(" ".join(row).rstrip() for row in columns(lens_rows(self)))

    def __repr__(self) -> str:
        """A table of the likeliest token and its probability, layer by layer, at the last positions."""
        columns = range(len(self.positions))[-_SHOWN:]
        cells = [[_cell(self.strings[row][col][0]) for col in columns] for row in range(len(self.layers))]
        heads = [_cell(self.tokens[col]) for col in columns]
        widths = [max(len(head), *(len(row[i]) for row in cells)) for i, head in enumerate(heads)]
        left_out = len(self.positions) - len(columns)
        lines = [f"logit lens, {len(self.layers)} layers x {len(self.positions)} positions"]
        lines[0] += f" (the last {len(columns)} shown)" if left_out else ""
        lines.append("layer  " + "  ".join(f"{head:{width + 5}}" for head, width in zip(heads, widths, strict=True)))
        for row, (name, shown) in enumerate(zip(self.layers, cells, strict=True)):
            parts = [
                f"{cell:{width}} {np.exp(self.logprobs[row, col, 0]):.2f}"
                for cell, width, col in zip(shown, widths, columns, strict=True)
            ]
            lines.append(f"{name:>5}  " + "  ".join(parts))
        return "\n".join(line.rstrip() for line in lines)


def lens_rows(lens: LogitLens) -> list[list[str]]:
    """The cells of a lens's table: the text's tokens above, then a row for each layer, the last layer first."""
    rows = [["", *map(repr, lens.tokens)]]
    for index in reversed(range(len(lens.layers))):
        shown = zip(lens.strings[index], np.exp(lens.logprobs[index, :, 0]), strict=True)
        rows.append([lens.layers[index], *(f"{top[0]!r} {100 * p:.0f}" for top, p in shown)])
    return rows


def logit_lens(
    session: irkit.Session,
    text_or_trace: Given,
    positions: Chosen = None,
    k: int = 5,
    embed: bool = False,
    layers: Chosen = None,
    edits: Any = None,
    budget: int | None = None,
) -> LogitLens:
    """Read the stream that leaves each layer through the final norm and the unembedding (nostalgebraist 2020,
    "interpreting GPT: the logit lens").

    Args:
        session: Of the model.
        text_or_trace: A text, or a trace of one that holds `resid_post` of its layers, the last among them.
        positions: Those to read; all, if not given. The session's edits, if any, are in force.
        k: How many of the likeliest tokens to keep.
        embed: Begin with the embeddings, before the first layer; a trace must hold `embed`.
        layers: Those to read; all that there are, if not given.
        edits: In force beside the session's, where a text is given.
        budget: The most bytes that may be held meanwhile; half of the free memory, if not given.

    Raises:
        BudgetError, ContextFullError: the streams would take more memory than they may, or the text does not fit.
        OptionError: the trace lacks what is needed, there is no such layer or position, or edits are given for a trace.
    """
    from irkit.engine.tapping import choose

    if k < 1:
        raise OptionError(f"k: at least 1 token is needed, got {k}")
    n_layers, given = session.model.config.n_layers, {}
    wanted = range(n_layers) if layers is None else choose(layers, n_layers, "layers")
    if not isinstance(text_or_trace, Trace):
        count = len(session._ids(text_or_trace, "text"))
        kept = None if positions is None else choose(positions, count, "positions")
        given = {"layers": sorted({*wanted, n_layers - 1}), "positions": kept, "edits": edits, "budget": budget}
    elif edits is not None:
        raise OptionError("edits: the trace was made with its own, or without")
    trace = one_text(session, text_or_trace, ("hook_embed", "resid_post") if embed else ("resid_post",), **given)
    chosen = held_positions(trace) if positions is None else choose(positions, len(trace.ids[0]), "positions")
    held = trace.layers("hook_resid_post") if "hook_resid_post" in trace else ()
    if n_layers - 1 not in held:
        raise OptionError("a lens needs resid_post of the last layer, which the trace does not hold")
    if layers is not None and (lacking := set(wanted) - set(held)):
        raise OptionError(f"layers: the trace does not hold {min(lacking)}")
    shown = [layer for layer in held if layer in wanted]
    # The last layer is read in any case: the others' divergence is from it.
    read = [*shown, *([n_layers - 1] if n_layers - 1 not in shown else [])]
    if budget is not None and (held_bytes := 8 * k * len(read) * len(chosen)) > budget:
        raise BudgetError(
            f"{k} tokens at {len(read)} layers and {len(chosen)} positions take {size(held_bytes)}, the budget is "
            f"{size(budget)} (option budget, in bytes)"
        )
    names = [*(["hook_embed"] if embed else []), *(f"blocks.{layer}.hook_resid_post" for layer in read)]
    where = places(trace, chosen)
    streams = np.stack([value(trace, name)[0][where] for name in names], axis=1)
    tokenizer, known = session.model.tokenizer, {}

    def ranked(token: Any) -> _Ranked:
        ids = [token_id(session, token)] if isinstance(token, str) else np.ravel(token)
        ids = np.broadcast_to(np.array([token_id(session, int(each)) for each in ids], np.int32), len(chosen))
        key = ids.tobytes()
        if key not in known:
            found = _read(session, streams, ids, k)
            known[key] = found["ranks"][:count], found["of_token"][:count]
        return known[key]

    count = embed + len(shown)
    found = _read(session, streams, np.full(len(chosen), -1, np.int32), k)
    chosen_ids = found["ids"][-1, :, 0]
    found = {name: each[:count] for name, each in found.items()}
    strings = {int(each): tokenizer.token(int(each)) for each in np.unique(found["ids"])}
    return LogitLens(
        layers=tuple(["embed"] * embed + [str(layer) for layer in shown]),
        positions=tuple(chosen),
        tokens=tuple(trace.tokens[position] for position in chosen),
        strings=tuple(tuple(tuple(strings[int(i)] for i in cell) for cell in row) for row in found["ids"]),
        ids=found["ids"],
        logprobs=found["logprobs"],
        kl=found["kl"],
        entropy=found["entropy"],
        chosen=chosen_ids,
        ranks=found["ranks"],
        read=ranked,
    )


def next_token_probs(session: irkit.Session, texts: Any) -> np.ndarray:
    """The probability of every token after the end of each text, `[b, d_vocab]`."""
    logits = session.trace(texts, names=(), logits="last").logits[:, -1].astype(np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def _read(session: irkit.Session, streams: np.ndarray, tokens: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """`readings.lens` of `streams` `[pos, layer, d_model]`, some positions at a time; layers first in what it finds."""
    layers = streams.shape[1]
    at_once = max(min(_ROWS // layers, _NUMBERS // (layers * session.model.config.d_vocab)), 1)

    def steps(runtime: Runtime, stopped: Callable[[], bool]) -> Steps:
        import jax

        from irkit.engine.worker import turn

        parts = []
        for start in range(0, len(streams), at_once):
            yield from turn(stopped)
            part = slice(start, start + at_once)
            missing = max(start + at_once - len(streams), 0)
            padded = np.pad(streams[part], [(0, missing), (0, 0), (0, 0)]), np.pad(tokens[part], (0, missing))
            read = jax.device_get(runtime.lens(*padded, k))
            parts.append([each[: at_once - missing] for each in read])
        return [np.concatenate(each).swapaxes(0, 1) for each in zip(*parts, strict=True)]

    names = ("ids", "logprobs", "kl", "ranks", "of_token", "entropy")
    return dict(zip(names, session.model.in_turns(steps), strict=True))


def _cell(token: str) -> str:
    shown = repr(token)
    return shown if len(shown) <= 12 else f"{shown[:10]}…'"
