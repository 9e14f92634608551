"""What a small change would do, everywhere at once: attribution patching and saliency, by one backward pass.

The derivatives go through the weights as float32 numbers. A session of packed weights has the same file opened in
exact precision for them, which takes four bytes a weight for as long as the session lives, and four more where the
CPU's kernels compute: they have no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from irkit.analysis.patching import named_or_likeliest, prompts, token_id
from irkit.engine import Model, open_model
from irkit.errors import ContextFullError, OptionError

if TYPE_CHECKING:
    from irkit.session import Session

_exact: WeakKeyDictionary[Session, Model] = WeakKeyDictionary()
_POINTS = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "head": "attn.hook_z",
}


@dataclass(frozen=True)
class AttributionPatching:
    """How much patching each value alone would change the metric, to first order."""

    values: dict[str, np.ndarray]
    """Of `resid_pre`, `attn_out` and `mlp_out`, `[layer, position]`; of `head`, `[layer, head]`, over all positions."""
    clean: float
    """The metric of the clean run: the logit of `token` less that of `other`."""
    corrupt: float
    """The metric of the corrupt run, at which the gradient is taken."""
    clean_tokens: tuple[str, ...]
    corrupt_tokens: tuple[str, ...]
    token: str
    other: str

    def top(self, n: int = 5) -> list[tuple[str, int, int, float]]:
        """The `n` largest effects: hook point, layer, position or head, value."""
        every = [
            (name, int(row), int(column), float(values[row, column]))
            for name, values in self.values.items()
            for row, column in np.ndindex(values.shape)
        ]
        return sorted(every, key=lambda each: -abs(each[3]))[:n]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {layer}.{column}: {value:+.3g}" for name, layer, column, value in self.top(3))
        return (
            f"<AttributionPatching of {self.token!r} over {self.other!r}: {len(self.values['head'])} layers, "
            f"{len(self.corrupt_tokens)} tokens, clean {self.clean:.3g}, corrupt {self.corrupt:.3g}; largest {shown}>"
        )

    def plot(self, **options: Any) -> Any:
        """Heat maps, a matplotlib Figure."""
        from irkit import plots

        return plots.attribution(self, **options)

    def to_frame(self) -> Any:
        """A pandas DataFrame, a row for each hook point, layer, and position or head."""
        import pandas as pd

        return pd.DataFrame(
            self.top(sum(map(np.size, self.values.values()))), columns=["name", "layer", "at", "effect"]
        )


def attribution_patching(
    session: Session,
    clean: str | Sequence[int],
    corrupt: str | Sequence[int],
    *,
    token: str | int | None = None,
    other: str | int | None = None,
) -> AttributionPatching:
    """Estimate every patch of the clean run into the corrupt one by one backward pass (arXiv:2310.10348).

    The effect of a patch is, to first order, the gradient of the metric on the corrupt run times the difference of the
    values, clean less corrupt (Nanda 2023, "Attribution patching"). It is near where the values are, and often far off
    for `resid_pre` of early layers and for position 0; `patching_sweep` gives the true effect.

    Args:
        session: What runs the model. Its hooks are not in effect here.
        clean: A prompt.
        corrupt: One of as many tokens.
        token: A token's id or its text; if not given, the clean run's likeliest.
        other: What it is compared with; if not given, the corrupt run's likeliest.

    Raises:
        ContextFullError, OptionError: as `patching_sweep`.
    """
    from irkit.engine import gradients, sweep

    ids = prompts(session, clean, corrupt)
    model = _exact_model(session)
    loading = model.load()

    def job() -> tuple[dict[str, np.ndarray], tuple[int, int], np.ndarray]:
        runtime = loading.result()
        common = sweep.read(runtime, *ids)
        pair = named_or_likeliest(session, token, other, lambda: sweep.logits(runtime, common.last()))
        ends = sweep.difference(runtime, common.last(), *pair)
        _, found = gradients.gradients(runtime, ids[1], tuple(_POINTS.values()), *pair)
        effects = {}
        for name, point in _POINTS.items():
            rows = []
            for layer, gradient in enumerate(found[point]):
                values = np.asarray(common.value(point, layer))[:, : common.length]
                effect = np.sum(gradient * (values[0] - values[1]), axis=-1)
                rows.append(effect.sum(0) if name == "head" else effect)
            effects[name] = np.stack(rows)
        return effects, pair, ends

    effects, pair, ends = model.submit(job).result()
    show = model.tokenizer.token
    clean_tokens, corrupt_tokens = (tuple(map(show, row)) for row in ids)
    token, other = map(show, pair)
    return AttributionPatching(effects, float(ends[0]), float(ends[1]), clean_tokens, corrupt_tokens, token, other)


@dataclass(frozen=True)
class Saliency:
    """How much each token's embedding bears on a logit of the next token."""

    tokens: tuple[str, ...]
    token: str
    """Whose logit it is."""
    logit: float
    gradient: np.ndarray
    """`[pos, d_model]`, of the logit with regard to the token's embedding."""
    norm: np.ndarray
    """`[pos]`, the gradient's length (Simonyan et al. 2013, arXiv:1312.6034)."""
    times_input: np.ndarray
    """`[pos]`, gradient times embedding, summed (Shrikumar et al. 2016, arXiv:1605.01713)."""

    def __repr__(self) -> str:
        rows = [
            f"{norm:10.4g} {times:+10.4g}  {text!r}"
            for text, norm, times in zip(self.tokens, self.norm, self.times_input, strict=True)
        ]
        return "\n".join(
            [f"Saliency of the logit {self.logit:.4g} of {self.token!r}: |gradient|, gradient x input", *rows]
        )

    def plot(self, **options: Any) -> Any:
        """Bars, a matplotlib Figure."""
        from irkit import plots

        return plots.saliency(self, **options)

    def to_frame(self) -> Any:
        """A pandas DataFrame, a row for each token."""
        import pandas as pd

        return pd.DataFrame({"token": self.tokens, "norm": self.norm, "times_input": self.times_input})


def saliency(session: Session, text: str | Sequence[int], token: str | int | None = None) -> Saliency:
    """The gradient of the logit of `token`, or of the likeliest next token, with regard to the text's embeddings.

    Raises:
        ContextFullError: the text does not fit the context.
        OptionError: `token` is not one token, or the text is empty.
    """
    from irkit.engine import gradients, sweep

    [ids] = session._rows([text])
    if not ids:
        raise OptionError("text: it is empty")
    if len(ids) > session._cache.n_ctx:
        raise ContextFullError(f"the text has {len(ids)} tokens; the context holds {session._cache.n_ctx}")
    chosen = None if token is None else token_id(session, token, "token")
    model = _exact_model(session)
    loading = model.load()

    def job() -> tuple[int, float, np.ndarray, np.ndarray]:
        runtime = loading.result()
        common = sweep.read(runtime, ids, ids)
        its = int(sweep.logits(runtime, common.last())[0].argmax()) if chosen is None else chosen
        logit, found = gradients.gradients(runtime, ids, ("hook_embed",), its, None)
        return its, logit, found["hook_embed"], np.asarray(common.streams[0])[0, : len(ids)]

    its, logit, gradient, embedded = model.submit(job).result()
    show = model.tokenizer.token
    norm, times = np.linalg.norm(gradient, axis=-1), np.sum(gradient * embedded, axis=-1)
    return Saliency(tuple(map(show, ids)), show(its), logit, gradient, norm, times)


def _exact_model(session: Session) -> Model:
    """The session's model in exact precision, held as long as the session."""
    if session.model.precision == "exact":
        return session.model
    if session not in _exact:
        options = session.options.model_copy(update={"precision": "exact", "cache_type": None})
        _exact[session] = open_model(session.model.path, options)
    return _exact[session]
