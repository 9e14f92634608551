"""What attention heads do: scores of known kinds of heads, and attention followed through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from irkit.analysis.inputs import value
from irkit.errors import ContextFullError, OptionError
from irkit.trace import Trace

if TYPE_CHECKING:
    import pandas

    import irkit

Kind = Literal["induction", "previous_token", "duplicate_token"]
KINDS: tuple[Kind, ...] = ("induction", "previous_token", "duplicate_token")
_LISTED = 5
"""Heads of each kind in the repr."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """How much each head attends as heads of three known kinds do: float32 `[n_layers, n_heads]`, from 0 to 1."""

    induction: np.ndarray
    """To the token behind the last occurrence of the present one (Olsson et al. 2022, arXiv:2209.11895)."""
    previous_token: np.ndarray
    """To the token before (the same)."""
    duplicate_token: np.ndarray
    """To the last occurrence of the present token (Wang et al. 2022, arXiv:2211.00593)."""
    length: int
    """Of the part that the texts repeat, in tokens."""
    batch: int
    """Number of texts."""

    def top(self, kind: Kind = "induction", count: int = _LISTED) -> list[tuple[int, int, float]]:
        """The heads with the highest scores: (layer, head, score), highest first."""
        scores = getattr(self, kind)
        order = np.argsort(-scores, axis=None, kind="stable")[:count]
        return [
            (int(i), int(j), float(scores[i, j])) for i, j in zip(*np.unravel_index(order, scores.shape), strict=True)
        ]

    def plot(self, **options: Any) -> Any:
        """A matplotlib Figure: a heat map of layers and heads for each kind."""
        from irkit import plots

        return plots.head_scores(self, **options)

    def to_frame(self) -> pandas.DataFrame:
        """One row a head."""
        import pandas

        layer, head = (axis.ravel() for axis in np.indices(self.induction.shape))
        return pandas.DataFrame({"layer": layer, "head": head, **{kind: getattr(self, kind).ravel() for kind in KINDS}})

    def __repr__(self) -> str:
        lines = [f"head scores on {self.batch} x {self.length} random tokens, repeated"]
        for kind in KINDS:
            best = ", ".join(f"L{layer}H{head} {score:.2f}" for layer, head, score in self.top(kind))
            lines.append(f"{kind.replace('_', ' '):>15}  {best}")
        return "\n".join(lines)


def head_scores(
    session: irkit.Session,
    length: int = 50,
    batch: int = 4,
    seed: int = 0,
    tokens: Sequence[Sequence[int]] | None = None,
) -> HeadScores:
    """Score every head on texts of random tokens that are repeated once.

    A score is the mean, over texts, of a diagonal of the pattern `[query, key]` of the 2 n tokens, as TransformerLens's
    demonstrations take it: of `key - query` = 1 - n for induction heads, -1 for previous-token heads, -n for
    duplicate-token heads. The first has n + 1 entries, of which the one at query n - 1 is no induction; it is counted,
    as it is there. No BOS is put in front. The session's edits, if any, are in force.

    Args:
        session: Of the model.
        length: n, at least 2.
        batch: Number of texts.
        seed: Of the random tokens, control tokens left out.
        tokens: Texts to use instead, `[b, 2 n]` ids, whose halves are equal.

    Raises:
        ContextFullError: 2 n tokens do not fit the context the model was trained for.
        OptionError: there is no text, or the halves of one differ.
    """
    config = session.model.config
    rows = _random(session, length, batch, seed) if tokens is None else np.asarray(session._rows(tokens), np.int32)
    half, odd = divmod(rows.shape[1], 2)
    if odd or half < 2 or (rows[:, :half] != rows[:, half:]).any():
        raise OptionError("tokens: each text must be 2 or more tokens and then the same again")
    if 2 * half > config.n_ctx:
        raise ContextFullError(f"the texts have {2 * half} tokens; the context holds {config.n_ctx}")
    scores = _weighed(session, rows, _diagonals(2 * half)) / len(rows)
    return HeadScores(*scores, length=half, batch=len(rows))


def pattern_scores(pattern: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of `head_scores` of patterns `[..., query, key]` over a text whose halves are equal: `[...]` each."""
    weights = _diagonals(pattern.shape[-1])
    return dict(zip(KINDS, np.einsum("...qk,wqk->w...", pattern, weights), strict=True))


def attention_rollout(trace: Trace) -> np.ndarray:
    """How much of each position has reached each other one through all layers, `[b, query, key]`; rows sum to 1.

    Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): a layer mixes by A = 0.5 W + 0.5 I, where W is its
    pattern averaged over heads and I stands for the residual connection; the layers' A are multiplied. The trace holds
    `pattern` of every layer, all heads and positions.

    Raises:
        OptionError: it does not.
    """
    rollout = None
    for layer in range(trace.n_layers):
        pattern = value(trace, f"blocks.{layer}.attn.hook_pattern")
        if pattern.shape[2] != pattern.shape[3] or "attn.hook_pattern" in trace.provenance.heads:
            raise OptionError("attention rollout needs the patterns of all heads and positions")
        mixing = 0.5 * pattern.mean(axis=1) + 0.5 * np.eye(pattern.shape[-1], dtype=np.float32)
        rollout = mixing if rollout is None else mixing @ rollout
    assert rollout is not None
    return rollout


def _random(session: irkit.Session, length: int, batch: int, seed: int) -> np.ndarray:
    if length < 2 or batch < 1:
        raise OptionError(f"length, batch: at least 2 tokens and 1 text are needed, got {length} and {batch}")
    tokenizer = session.model.tokenizer
    ordinary = [token for token in range(tokenizer.vocab_size) if not tokenizer.is_control(token)]
    once = np.random.default_rng(seed).choice(ordinary, (batch, length)).astype(np.int32)
    return np.concatenate([once, once], axis=1)


def _diagonals(size: int) -> np.ndarray:
    """What takes the mean of each kind's diagonal of a pattern: `[kind, query, key]`."""
    half = size // 2
    offsets = {"induction": 1 - half, "previous_token": -1, "duplicate_token": -half}
    diagonals = [np.eye(size, k=offsets[kind], dtype=np.float32) for kind in KINDS]
    return np.stack([diagonal / diagonal.sum() for diagonal in diagonals])


def _weighed(session: irkit.Session, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sums over the texts of each head's pattern times each of `weights` `[w, query, key]`: `[w, layer, head]`.

    The patterns themselves never leave the device, and are not held there beyond their layer.
    """
    from irkit.engine.tapping import tapping
    from irkit.engine.trace import plan

    size = rows.shape[1]
    taps = tapping(session.model.config, size, names=("attn.hook_pattern",), edits=session._edits)
    loading = session.model.load()

    def job() -> np.ndarray:
        runtime, (calls, capacity) = loading.result(), plan(size)
        room = calls[-1][0] + calls[-1][1] - size
        tokens = np.pad(rows, [(0, 0), (0, room)])
        padded = np.pad(weights, [(0, 0), (0, room), (0, capacity - size)])
        cache, total = runtime.empty(capacity, len(rows)), 0
        for start, count in calls:
            part = slice(start, start + count)
            counts = np.full(len(rows), min(count, size - start), np.int32)
            cache, sums = runtime.pattern_sums(cache, tokens[:, part], start, counts, padded[:, part], taps)
            total = total + np.asarray(sums)
        return np.asarray(total)

    return session.model.submit(job).result()
