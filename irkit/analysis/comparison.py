"""The quantization lens: what a format or a precision changes inside a model, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from irkit.errors import OptionError
from irkit.transformer.config import Config

if TYPE_CHECKING:
    import pandas

    import irkit

_ROWS, _NUMBERS = 128, 1 << 23
"""Streams, and logits of them, that one call reads at most of each model, unless one stream alone has more."""
_SHOWN = 5
"""Disagreements in the text that is the repr."""
_SHAPE = tuple(field.name for field in fields(Config) if field.name not in ("n_ctx", "eps", "attention_scale"))
"""What two files of one model have in common, whoever wrote them."""


@dataclass(frozen=True)
class Disagreement:
    """The first place in a prompt after which the two models say different tokens."""

    prompt: int
    """Its index among the prompts."""
    position: int
    token: str
    """The prompt's own token there."""
    a: str
    """The token that is likeliest for the first model."""
    a_probability: float
    """Its probability, in the first model."""
    b: str
    b_probability: float
    layer: int
    """The first layer at this position whose lenses have different likeliest tokens."""

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt}, after position {self.position} {self.token!r}: {self.a!r} {self.a_probability:.2f} "
            f"| {self.b!r} {self.b_probability:.2f}; their lenses differ from layer {self.layer}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """How far model `b` is from model `a`, over all positions of all prompts."""

    a: str
    """The first model: its name, main format and precision."""
    b: str
    prompts: int
    positions: int
    """Of all prompts together; each counts the same."""
    kl: np.ndarray
    """Kullback-Leibler divergence from a's lens to b's, `[layer]`, in nats: the mean of the sum of p ln(p/q)."""
    cosine: np.ndarray
    """Cosine of the angle between the residual streams that leave the layer, `[layer]`, the mean."""
    drift: np.ndarray
    """Total variation distance of the attention patterns, `[layer, head]`: the mean over queries of half the sum of
    |pattern of a - pattern of b|; 0 where they are the same, 1 where they have no key in common. The query at position
    0, which has itself alone to look at, counts with 0."""
    agreement: float
    """The share of positions after which both have the same likeliest token."""
    disagreements: tuple[Disagreement, ...]
    """The first one of each prompt that has any."""

    @property
    def final_kl(self) -> float:
        """The divergence from what a says to what b says, in nats: that of the last layer."""
        return float(self.kl[-1])

    def plot(self, **options: Any) -> Any:
        """A matplotlib Figure: divergence, cosine and drift against the layer."""
        from irkit import plots

        return plots.compare(self, **options)

    def to_frame(self) -> pandas.DataFrame:
        """One row for each layer; of the drift, the mean over heads, and the largest with its head."""
        import pandas

        columns = {
            "kl": self.kl,
            "cosine": self.cosine,
            "drift": self.drift.mean(axis=1),
            "largest_drift": self.drift.max(axis=1),
            "head": self.drift.argmax(axis=1),
        }
        return pandas.DataFrame(columns, index=pandas.RangeIndex(len(self.kl), name="layer"))

    def __repr__(self) -> str:
        """What is said differently, and a table with a row for each layer."""
        lines = [
            f"{self.a} | {self.b}: {self.prompts} prompts, {self.positions} positions",
            f"final KL {self.final_kl:.3g} nats; the likeliest token is the same after {self.agreement:.1%}",
            *map(str, self.disagreements[:_SHOWN]),
            *([f"and {len(self.disagreements) - _SHOWN} prompts more"] if len(self.disagreements) > _SHOWN else []),
            f"{'layer':>5} {'KL':>9} {'1-cosine':>9} {'drift':>9} {'largest':>9} {'head':>4}",
        ]
        for layer, (kl, cosine, heads) in enumerate(zip(self.kl, self.cosine, self.drift, strict=True)):
            numbers = " ".join(f"{number:9.3g}" for number in (kl, 1 - cosine, heads.mean(), heads.max()))
            lines.append(f"{layer:5} {numbers} {heads.argmax():4}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Read:
    """What one prompt shows of every layer."""

    kl: np.ndarray
    """`[layer, pos]`"""
    cosine: np.ndarray
    """`[layer, pos]`"""
    drift: np.ndarray
    """`[layer, head]`, summed over queries."""
    ids: np.ndarray
    """`[layer, pos, 2]`, the likeliest token of each model's lens."""
    logprobs: np.ndarray
    """Of it, `[layer, pos, 2]`."""


def compare(
    a: irkit.Session | str | Path,
    b: irkit.Session | str | Path,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    *,
    limit: int = 1 << 28,
    **options: Any,
) -> Comparison:
    """Run two files, or two precisions, of one model on the same prompts, and compare what is inside.

    The lens (nostalgebraist 2020) of each model is its own: through its final norm and its unembedding.

    Args:
        a: A session, whose edits, if any, are in force; or a name or path, which is opened and closed again.
        b: The other.
        prompts: Texts, or their token ids, or one of them; they are read one by one.
        limit: The bytes that streams and patterns of both models may take at a time, or one layer's, if those are more;
            of a long prompt, some layers are compared at a time, and each time costs a pass of both.
        options: Of `irkit.Session`, for what is opened here.

    Raises:
        BudgetError, ContextFullError: a layer takes more than half of the memory, or a prompt does not fit a context.
        OptionError: the models differ in shape, vocabulary or in how they divide a prompt into tokens.
    """
    import irkit

    if options and isinstance(a, irkit.Session) and isinstance(b, irkit.Session):
        raise OptionError(f"{', '.join(options)}: both sessions are open already, with options of their own")
    with ExitStack() as opened:
        first, second = (
            each if isinstance(each, irkit.Session) else opened.enter_context(irkit.Session(each, **options))
            for each in (a, b)
        )
        names = [_described(each) for each in (first, second)]
        _check_same_model(first, second)
        rows = _same_tokens(first, second, prompts)
        reads = [_read(first, second, ids, limit) for ids in rows]
        found = [_first_disagreement(first, index, ids, reads[index]) for index, ids in enumerate(rows)]
    agree = np.concatenate([read.ids[-1, :, 0] == read.ids[-1, :, 1] for read in reads])
    return Comparison(
        a=names[0],
        b=names[1],
        prompts=len(rows),
        positions=len(agree),
        kl=np.concatenate([read.kl for read in reads], axis=1).mean(axis=1),
        cosine=np.concatenate([read.cosine for read in reads], axis=1).mean(axis=1),
        drift=np.sum([read.drift for read in reads], axis=0) / len(agree),
        agreement=float(agree.mean()),
        disagreements=tuple(each for each in found if each is not None),
    )


def _described(session: irkit.Session) -> str:
    info = session.info()
    return f"{Path(session.name).name} ({info.quantization}, {info.precision})"


def _check_same_model(a: irkit.Session, b: irkit.Session) -> None:
    """Raises OptionError where the shapes or the vocabularies differ."""
    for name in _SHAPE:
        its, other = (getattr(session.model.config, name) for session in (a, b))
        if its != other:
            raise OptionError(f"not the same model: {name} is {its} in {a.name}, {other} in {b.name}")
    first, second = (session.model.tokenizer for session in (a, b))
    for token in range(first.vocab_size if first is not second else 0):
        if first.token_bytes(token) != second.token_bytes(token):
            shown = f"{first.token(token)!r} in {a.name}, {second.token(token)!r} in {b.name}"
            raise OptionError(f"not the same vocabulary: token {token} is {shown}")


def _same_tokens(a: irkit.Session, b: irkit.Session, prompts: Any) -> list[Sequence[int]]:
    """The token ids of each prompt.

    Raises:
        OptionError: there is none, or the two tokenizers divide one differently.
    """
    rows, others = a._rows(prompts), b._rows(prompts)
    if not rows:
        raise OptionError("prompts: there is none")
    for index, (its, other) in enumerate(zip(rows, others, strict=True)):
        if list(its) != list(other):
            raise OptionError(
                f"not the same tokens: prompt {index} is {len(its)} in {a.name}, {len(other)} in {b.name}"
            )
    return rows


def _read(a: irkit.Session, b: irkit.Session, ids: Sequence[int], limit: int) -> _Read:
    """Compare all layers over one prompt, so many at a time as `limit` allows."""
    config, length = a.model.config, len(ids)
    n_layers = config.n_layers
    capacity = 1 << (max(length, 8) - 1).bit_length()
    fitting = limit // (2 * 4 * capacity * (config.d_model + config.n_heads * capacity))
    # A trace compiles one program for as many layers as a power of two; the last group overlaps to have as many.
    group = n_layers if fitting >= n_layers else 1 << (max(fitting, 1).bit_length() - 1)
    cosine, kl = np.zeros((2, n_layers, length))
    drift = np.zeros((n_layers, config.n_heads))
    likeliest, logprobs = np.zeros((n_layers, length, 2), np.int32), np.zeros((n_layers, length, 2))
    for start in range(0, n_layers, group):
        first = min(start, n_layers - group)
        part, layers = slice(first, first + group), range(first, first + group)
        names: Any = {"names": ("resid_post", "pattern"), "layers": tuple(layers), "logits": "none"}
        traces = [session.trace([ids], **names) for session in (a, b)]
        for layer in layers:
            one, other = (trace["pattern", layer][0] for trace in traces)
            drift[layer] = np.abs(one - other).sum(axis=-1, dtype=np.float64).sum(axis=-1) / 2
        streams = [np.stack([trace["resid_post", layer][0] for layer in layers]) for trace in traces]
        cosine[part] = _cosine(*streams)
        found = _divergence(a, b, *(each.reshape(group * length, -1) for each in streams))
        kl[part], likeliest[part], logprobs[part] = (each.reshape(group, length, *each.shape[1:]) for each in found)
    return _Read(kl, cosine, drift, likeliest, logprobs)


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def _divergence(a: irkit.Session, b: irkit.Session, first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    """`readings.divergence` of the lenses of streams `[n, d_model]`, some at a time."""
    at_once = max(min(_ROWS, _NUMBERS // a.model.config.d_vocab), 1)
    # Both are queued before the job that waits for them, on the one thread there is.
    loading = [session.model.load() for session in (a, b)]

    def job() -> list[Any]:
        import jax

        runtimes, parts = [each.result() for each in loading], []
        for start in range(0, len(first), at_once):
            chunks = [each[start : start + at_once] for each in (first, second)]
            count = len(chunks[0])
            padded = [np.pad(chunk, [(0, at_once - count), (0, 0)]) for chunk in chunks]
            logprobs = [runtime.lens_logprobs(chunk) for runtime, chunk in zip(runtimes, padded, strict=True)]
            found = jax.device_get(runtimes[0].divergence(*logprobs))
            parts.append([each[:count] for each in found])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    return a.model.submit(job).result()


def _first_disagreement(session: irkit.Session, prompt: int, ids: Sequence[int], read: _Read) -> Disagreement | None:
    differs = read.ids[..., 0] != read.ids[..., 1]
    if not differs[-1].any():
        return None
    position = int(differs[-1].argmax())
    show = session.model.tokenizer.token
    one, other = (show(int(token)) for token in read.ids[-1, position])
    probability, its = map(float, np.exp(read.logprobs[-1, position]))
    layer = int(differs[:, position].argmax())
    return Disagreement(prompt, position, show(ids[position]), one, probability, other, its, layer)
