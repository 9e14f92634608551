"""Activation patching: which values carry what makes one prompt answered otherwise than another.

A value of the clean run is put into the corrupt one, at one place after the other, and a metric says how much of the
clean answer comes back (Meng et al. 2022, arXiv:2202.05262; Wang et al. 2022, arXiv:2211.00593; Heimersheim and Nanda
2024, arXiv:2404.15255).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from irkit.edits import Chosen
from irkit.errors import ContextFullError, OptionError

if TYPE_CHECKING:
    from irkit.session import Session

Metric = Literal["logit_diff", "normalized"] | Callable[[np.ndarray], np.ndarray]
"""What is measured of a run's last token: the logit of `token` less that of `other`; the same where 0 is the corrupt
run's and 1 the clean one's; or a function of logits `[run, d_vocab]` that gives a number for each run."""


@dataclass(frozen=True)
class PatchingSweep:
    """The metric of every patched run."""

    values: np.ndarray
    """`[layer, position]` or `[layer, head]`."""
    over: str
    """What the columns are: `position` or `head`."""
    layers: tuple[int, ...]
    columns: tuple[int, ...]
    """The positions, or the heads."""
    name: str
    """The hook point that was patched."""
    metric: str
    clean: float
    """The metric of the clean run, nothing patched."""
    corrupt: float
    """The metric of the corrupt run, nothing patched."""
    clean_tokens: tuple[str, ...]
    corrupt_tokens: tuple[str, ...]
    token: str
    other: str
    computed: int
    """The runs that were computed; the others are the corrupt run, as the values are the same."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each column: the corrupt run's token, or the head's number."""
        tokens = self.corrupt_tokens
        return tuple(tokens[column] if self.over == "position" else str(column) for column in self.columns)

    def top(self, n: int = 5) -> list[tuple[int, int, float]]:
        """The `n` places where patching changes the metric most: layer, column, value."""
        order = np.argsort(-np.abs(self.values - self.corrupt), axis=None, kind="stable")[:n]
        places = zip(*np.unravel_index(order, self.values.shape), strict=True)
        return [(self.layers[row], self.columns[column], float(self.values[row, column])) for row, column in places]

    def __repr__(self) -> str:
        shown = ", ".join(f"layer {layer} {self.over} {column}: {value:.3g}" for layer, column, value in self.top(3))
        return (
            f"<PatchingSweep of {self.name}: {len(self.layers)} layers x {len(self.columns)} {self.over}s, "
            f"{self.metric} clean {self.clean:.3g}, corrupt {self.corrupt:.3g}; most changed {shown}>"
        )

    def plot(self, **options: Any) -> Any:
        """A heat map, a matplotlib Figure."""
        from irkit import plots

        return plots.patching(self, **options)

    def to_frame(self) -> Any:
        """A pandas DataFrame, a row for each layer."""
        import pandas as pd

        pairs = zip(self.columns, self.labels, strict=True)
        names = list(self.columns) if self.over == "head" else [f"{column} {text}" for column, text in pairs]
        return pd.DataFrame(
            self.values, index=pd.Index(self.layers, name="layer"), columns=pd.Index(names, name=self.over)
        )


def patching_sweep(
    session: Session,
    clean: str | Sequence[int],
    corrupt: str | Sequence[int],
    metric: Metric = "logit_diff",
    *,
    name: str | None = None,
    over: Literal["position", "head"] = "position",
    layers: Chosen = None,
    positions: Chosen = None,
    heads: Chosen = None,
    token: str | int | None = None,
    other: str | int | None = None,
) -> PatchingSweep:
    """Patch one value of the clean run into the corrupt one, for each layer and position, or each layer and head.

    All runs are computed together, and of each only what the patch can change: the layers after it, the positions from
    the first patched one on, and the logits of two tokens. The result is that of `session.trace(corrupt,
    edits=[irkit.patch(...)])`, cell by cell, but for rounding.

    Args:
        session: What runs the model. Its hooks are not in effect here.
        clean: A prompt.
        corrupt: One of as many tokens, which is answered otherwise.
        metric: What is measured of the last token.
        name: The hook point: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out` or `z`; if not given,
            `resid_pre` over positions and `z` over heads.
        over: What is patched at a time in a layer: one position, all heads of it; or one head, at all positions.
        layers: Those to patch; all if not given.
        positions: Those to patch; all if not given.
        heads: Those to patch, over heads.
        token: A token's id or its text; if not given, the clean run's likeliest.
        other: What it is compared with; if not given, the corrupt run's likeliest.

    Raises:
        ContextFullError: the prompts do not fit the context.
        OptionError: the prompts are not of the same length; there is no such hook point, layer, position, head or
            token; or the metric does not tell the two prompts apart.
    """
    from irkit.engine import sweep
    from irkit.engine.sweep import Cell
    from irkit.engine.tapping import choose, resolve

    config = session.model.config
    ids = prompts(session, clean, corrupt)
    point, layer = resolve(name or ("z" if over == "head" else "resid_pre"), config)
    if point.name not in sweep.POINTS:
        raise OptionError(f"name: {point.name} cannot be swept; {', '.join(sweep.POINTS)} can")
    if over == "head" and point.name != "attn.hook_z":
        raise OptionError(f"name: {point.name} has no heads; over heads, attn.hook_z is patched")
    if over not in ("position", "head") or (heads is not None and over != "head"):
        raise OptionError(f"over: position or head (with heads= only the latter), got {over!r}")
    chosen = tuple(choose(layers, config.n_layers, "layers")) if layer is None else (layer,)
    where = tuple(choose(positions, len(ids[0]), "positions"))
    columns = where if over == "position" else tuple(choose(heads, config.n_heads, "heads"))
    patched = tuple(sorted(set(where)))
    cells = [
        Cell(each, (column,)) if over == "position" else Cell(each, patched, column)
        for each in chosen
        for column in columns
    ]
    # All heads' z at one position are what attention adds there.
    at = "hook_attn_out" if over == "position" and point.name == "attn.hook_z" else point.name
    loading = session.model.load()

    def job() -> tuple[np.ndarray, np.ndarray, tuple[int, int], int]:
        runtime = loading.result()
        common = sweep.read(runtime, *ids)
        pair = named_or_likeliest(session, token, other, lambda: sweep.logits(runtime, common.last()))

        def measure(resid: Any) -> np.ndarray:
            if callable(metric):
                return np.asarray(metric(sweep.logits(runtime, resid)), np.float32)
            return sweep.difference(runtime, resid, *pair)

        ends = measure(common.last())
        same = next((i for i, two in enumerate(zip(*ids, strict=True)) if two[0] != two[1]), len(ids[0]))
        differing = [i for i, cell in enumerate(cells) if not sweep.is_corrupt(common, at, cell, same)]
        runs = [cells[i]._replace(positions=tuple(p for p in cells[i].positions if p >= same)) for i in differing]
        found = np.full(len(cells), ends[1], np.float32)
        found[differing] = sweep.sweep(runtime, common, at, runs, measure)
        return found, ends, pair, len(runs)

    found, ends, pair, computed = session.model.submit(job).result()
    values, (first, second) = found.reshape(len(chosen), len(columns)), map(float, ends)
    if metric == "normalized":
        if abs(first - second) < 1e-6:
            raise OptionError(
                "metric: the clean and the corrupt run have the same logit difference; nothing to normalize"
            )
        values, first, second = (values - second) / (first - second), 1.0, 0.0
    show = session.model.tokenizer.token
    return PatchingSweep(
        values=values,
        over=over,
        layers=chosen,
        columns=columns,
        name=point.name,
        metric=getattr(metric, "__name__", "a function") if callable(metric) else metric,
        clean=first,
        corrupt=second,
        clean_tokens=tuple(map(show, ids[0])),
        corrupt_tokens=tuple(map(show, ids[1])),
        token=show(pair[0]),
        other=show(pair[1]),
        computed=computed,
    )


def prompts(session: Session, clean: str | Sequence[int], corrupt: str | Sequence[int]) -> tuple[list[int], list[int]]:
    """The ids of both, which must be as many.

    Raises:
        ContextFullError, OptionError: they do not fit the context, or each other.
    """
    first, second = (list(row) for row in session._rows([clean, corrupt]))
    if len(first) != len(second) or not first:
        raise OptionError(f"clean and corrupt need as many tokens, and have {len(first)} and {len(second)}")
    if len(first) > session._cache.n_ctx:
        raise ContextFullError(f"the prompts have {len(first)} tokens; the context holds {session._cache.n_ctx}")
    return first, second


def token_id(session: Session, token: str | int, what: str) -> int:
    """The id of a token given by its id or its text.

    Raises:
        OptionError: it is not one token.
    """
    ids = session.tokenize(token, add_special=False) if isinstance(token, str) else [int(token)]
    if len(ids) != 1:
        raise OptionError(f"{what}: {token!r} is {len(ids)} tokens, not one")
    if not 0 <= ids[0] < session.model.config.d_vocab:
        raise OptionError(f"{what}: token id {ids[0]} is outside the vocabulary of {session.model.config.d_vocab}")
    return ids[0]


def named_or_likeliest(
    session: Session, token: str | int | None, other: str | int | None, logits: Callable[[], np.ndarray]
) -> tuple[int, int]:
    """The ids of `token` and `other`; where one is not given, the likeliest of `logits`, clean and corrupt.

    Raises:
        OptionError: both runs have the same likeliest token.
    """
    given = [
        None if each is None else token_id(session, each, what) for each, what in ((token, "token"), (other, "other"))
    ]
    if None in given:
        likeliest = logits().argmax(-1)
        given = [int(most) if each is None else each for each, most in zip(given, likeliest, strict=True)]
    first, second = given
    assert first is not None
    assert second is not None
    if first == second and (token is None or other is None):
        likely = session.model.tokenizer.token(first)
        raise OptionError(f"token and other are both {likely!r}, the likeliest: give the two tokens to compare")
    return first, second
