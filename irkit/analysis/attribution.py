"""Direct logit attribution: what each component writes towards a token, and the residual stream taken apart.

The functions named as TransformerLens's return stacks with the components first, `[component, b, pos, d_model]`. Unlike
there nothing is folded into the weights and nothing is centred: the weight of the final norm is applied where a
direction is (`logit_attrs`), not in the stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from irkit import families, gguf
from irkit.analysis.inputs import Given, one_text, places, token_id, value
from irkit.errors import OptionError
from irkit.trace import Trace

if TYPE_CHECKING:
    import pandas

    import irkit

_LISTED = 8
"""Components in the repr."""


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution:
    """How a logit, or the difference of two, is the sum of what the components wrote (float64 arrays)."""

    token: str
    other: str | None
    """The token whose logit is subtracted."""
    position: int
    """After which the next token is predicted."""
    embed: float
    """Of the token's own embedding."""
    attn: np.ndarray
    """Of each layer's attention, `[n_layers]`: its heads and `attn_bias` together."""
    heads: np.ndarray
    """Of each head, `[n_layers, n_heads]`."""
    attn_bias: np.ndarray
    """Of what attention adds beside its heads, `[n_layers]`: the bias, where the model has one, and rounding."""
    mlp: np.ndarray
    """Of each layer's MLP, its bias included, `[n_layers]`."""
    logit: float
    """What is explained: the logit, or the difference, of the stream that leaves the last layer."""

    @property
    def total(self) -> float:
        """The sum of the components: `logit`, up to rounding, unless an edit added to the stream itself."""
        return float(self.embed + self.attn.sum() + self.mlp.sum())

    @property
    def components(self) -> dict[str, float]:
        """Every term by name, in the order of the model: `embed`, `L0H0`, ..., `0_attn_bias`, `0_mlp_out`, ..."""
        return {name: amount for name, *_, amount in self._rows()}

    def _rows(self) -> Iterator[tuple[str, str, int | None, int | None, float]]:
        yield "embed", "embed", None, None, self.embed
        for layer, heads in enumerate(self.heads):
            for head, amount in enumerate(heads):
                yield f"L{layer}H{head}", "head", layer, head, float(amount)
            yield f"{layer}_attn_bias", "attn_bias", layer, None, float(self.attn_bias[layer])
            yield f"{layer}_mlp_out", "mlp", layer, None, float(self.mlp[layer])

    def plot(self, **options: Any) -> Any:
        """A matplotlib Figure: bars of the components."""
        from irkit import plots

        return plots.attribution(self, **options)

    def to_frame(self) -> pandas.DataFrame:
        """One row a component; `attribution` sums to `total`."""
        import pandas

        return pandas.DataFrame(list(self._rows()), columns=["component", "kind", "layer", "head", "attribution"])

    def __repr__(self) -> str:
        what = f"logit of {self.token!r}" + (f" minus that of {self.other!r}" if self.other is not None else "")
        found = sorted(self.components.items(), key=lambda item: -abs(item[1]))
        rest = sum(amount for _, amount in found[_LISTED:])
        rows = [*found[:_LISTED], (f"{max(len(found) - _LISTED, 0)} others", rest), ("in all", self.total)]
        lines = [f"{what}, after position {self.position}: {self.logit:.3f}"]
        return "\n".join([*lines, *(f"{amount:+9.3f}  {name}" for name, amount in rows)])


def logit_attribution(
    session: irkit.Session,
    text_or_trace: Given,
    token: str | int,
    other: str | int | None = None,
    position: int = -1,
) -> LogitAttribution:
    """Take the logit of `token` apart (minus that of `other`, if given) by the component that wrote it.

    Direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"): the stream is
    the sum of what the components wrote, and the logits are linear in it once the final norm's scale is held fixed.

    Args:
        session: Of the model.
        text_or_trace: A text, or a trace of one that holds `embed`, `result`, `attn_out` and `mlp_out` of every layer,
            `resid_post` of the last and `ln_final.scale`.
        token: Its text, which must be one token, or its id.
        other: Likewise.
        position: After which the next token is predicted.

    Raises:
        OptionError: the trace lacks what is needed, or there is no such token or position.
    """
    from irkit.engine.tapping import choose

    names = ("hook_embed", "result", "attn_out", "mlp_out", "resid_post", "ln_final.scale")
    trace = one_text(
        session, text_or_trace, names, **({} if isinstance(text_or_trace, Trace) else {"positions": position})
    )
    (at,) = choose(position, len(trace.ids[0]), "position")
    (where,) = places(trace, [at])
    ids = [token_id(session, each) for each in (token, other) if each is not None]
    direction = _directions(session, ids)
    towards = direction[0] - (direction[1] if other is not None else 0)
    towards = towards / float(value(trace, "ln_final.hook_scale")[0, where, 0])

    def of(name: str) -> Any:
        return value(trace, name)[0, where].astype(np.float64) @ towards

    layers = range(trace.n_layers)
    attn = np.array([of(f"blocks.{layer}.hook_attn_out") for layer in layers])
    heads = np.stack([of(f"blocks.{layer}.attn.hook_result") for layer in layers])
    if heads.shape[1] != session.model.config.n_heads:
        raise OptionError(f"this needs every head; the trace holds {heads.shape[1]} of {session.model.config.n_heads}")
    shown = [session.model.tokenizer.token(each) for each in ids]
    return LogitAttribution(
        token=shown[0],
        other=shown[1] if other is not None else None,
        position=at,
        embed=float(of("hook_embed")),
        attn=attn,
        heads=heads,
        attn_bias=attn - heads.sum(axis=1),
        mlp=np.array([of(f"blocks.{layer}.hook_mlp_out") for layer in layers]),
        logit=float(of(f"blocks.{layers[-1]}.hook_resid_post")),
    )


@overload
def accumulated_resid(
    trace: Trace, layer: int | None = None, *, incl_mid: bool = False, apply_ln: bool = False
) -> np.ndarray: ...
@overload
def accumulated_resid(
    trace: Trace,
    layer: int | None = None,
    *,
    incl_mid: bool = False,
    apply_ln: bool = False,
    return_labels: Literal[True],
) -> tuple[np.ndarray, list[str]]: ...
def accumulated_resid(
    trace: Trace,
    layer: int | None = None,
    *,
    incl_mid: bool = False,
    apply_ln: bool = False,
    return_labels: bool = False,
) -> np.ndarray | tuple[np.ndarray, list[str]]:
    """The stream as each layer up to `layer` finds it, `[component, b, pos, d_model]`.

    `layer` None goes to the end, the last component being what leaves the last layer; with `incl_mid`, the stream
    between attention and MLP too. The trace holds `resid_pre` (or `embed` and `resid_post`), and `resid_mid`.
    """
    last = _layer(trace, layer)
    found = []
    for index in range(last):
        found.append((f"{index}_pre", _entering(trace, index)))
        if incl_mid:
            found.append((f"{index}_mid", value(trace, f"blocks.{index}.hook_resid_mid")))
    found.append(("final_post" if last == trace.n_layers else f"{last}_pre", _entering(trace, last)))
    return _stacked(trace, found, last, False, apply_ln, return_labels)


@overload
def decompose_resid(
    trace: Trace,
    layer: int | None = None,
    *,
    mlp_input: bool = False,
    mode: Literal["all", "attn", "mlp"] = "all",
    apply_ln: bool = False,
    incl_embeds: bool = True,
) -> np.ndarray: ...
@overload
def decompose_resid(
    trace: Trace,
    layer: int | None = None,
    *,
    mlp_input: bool = False,
    mode: Literal["all", "attn", "mlp"] = "all",
    apply_ln: bool = False,
    incl_embeds: bool = True,
    return_labels: Literal[True],
) -> tuple[np.ndarray, list[str]]: ...
def decompose_resid(
    trace: Trace,
    layer: int | None = None,
    *,
    mlp_input: bool = False,
    mode: Literal["all", "attn", "mlp"] = "all",
    apply_ln: bool = False,
    incl_embeds: bool = True,
    return_labels: bool = False,
) -> np.ndarray | tuple[np.ndarray, list[str]]:
    """What the embedding, and attention and MLP of each layer before `layer`, wrote: `[component, b, pos, d_model]`.

    With mode "all" the components sum to the stream that enters `layer` (None: that leaves the last), or, with
    `mlp_input`, to what its MLP finds. The trace holds `embed`, `attn_out` and `mlp_out`.
    """
    last = _layer(trace, layer)
    if mlp_input and last == trace.n_layers:
        raise OptionError("mlp_input: a layer is needed, the stream after the last enters no MLP")
    kinds = [kind for kind in ("attn", "mlp") if mode in ("all", kind)]
    found = [("embed", _entering(trace, 0))] if incl_embeds else []
    for index in range(last):
        found += [(f"{index}_{kind}_out", value(trace, f"blocks.{index}.hook_{kind}_out")) for kind in kinds]
    if mlp_input and "attn" in kinds:
        found.append((f"{last}_attn_out", value(trace, f"blocks.{last}.hook_attn_out")))
    return _stacked(trace, found, last, mlp_input, apply_ln, return_labels)


@overload
def stack_head_results(
    trace: Trace, layer: int | None = None, *, incl_remainder: bool = False, apply_ln: bool = False
) -> np.ndarray: ...
@overload
def stack_head_results(
    trace: Trace,
    layer: int | None = None,
    *,
    incl_remainder: bool = False,
    apply_ln: bool = False,
    return_labels: Literal[True],
) -> tuple[np.ndarray, list[str]]: ...
def stack_head_results(
    trace: Trace,
    layer: int | None = None,
    *,
    incl_remainder: bool = False,
    apply_ln: bool = False,
    return_labels: bool = False,
) -> np.ndarray | tuple[np.ndarray, list[str]]:
    """What each head of the layers before `layer` wrote, `[component, b, pos, d_model]`.

    With `incl_remainder` the last component is the rest of the stream. The trace must hold `result`, which is captured
    only where it is named.
    """
    last = _layer(trace, layer)
    found = []
    for index in range(last):
        result = value(trace, f"blocks.{index}.attn.hook_result")
        numbers = trace.provenance.heads.get("attn.hook_result") or range(result.shape[2])
        found += [(f"L{index}H{head}", result[:, :, place]) for place, head in enumerate(numbers)]
    if incl_remainder:
        entering = _entering(trace, last)
        found.append(("remainder", entering - sum((part for _, part in found), np.zeros_like(entering))))
    return _stacked(trace, found, last, False, apply_ln, return_labels)


def apply_ln_to_stack(
    trace: Trace, residual_stack: np.ndarray, layer: int | None = None, *, mlp_input: bool = False
) -> np.ndarray:
    """The stack divided by the scale of the norm that `layer` begins with (None: the final one), as it was in the pass.

    With the scale held fixed the norm is linear. Its weight is not applied.
    """
    last = _layer(trace, layer)
    norm = "ln_final" if last == trace.n_layers else f"blocks.{last}.{'ln2' if mlp_input else 'ln1'}"
    return residual_stack / value(trace, f"{norm}.hook_scale")


def logit_attrs(
    session: irkit.Session,
    trace: Trace,
    residual_stack: np.ndarray,
    tokens: Any,
    incorrect_tokens: Any = None,
) -> np.ndarray:
    """What each component of a stack `[component, b, pos, d_model]` adds to a logit: `[component, b, pos]`.

    `tokens` is a token's text or id, or ids that broadcast to `[b, pos]`; with `incorrect_tokens` it is the difference
    of the logits. The stack is as written, without `apply_ln`: the final norm is applied here, its scale held fixed.
    """
    direction = _directions(session, _ids(session, tokens))
    if incorrect_tokens is not None:
        direction = direction - _directions(session, _ids(session, incorrect_tokens))
    found = np.einsum("cbpd,bpd->cbp", residual_stack, np.broadcast_to(direction, residual_stack.shape[1:]))
    return found / value(trace, "ln_final.hook_scale")[..., 0]


def _ids(session: irkit.Session, tokens: Any) -> np.ndarray:
    if isinstance(tokens, str):
        return np.array(token_id(session, tokens))
    ids = np.asarray(tokens)
    for each in np.unique(ids):
        token_id(session, int(each))
    return ids


def _directions(session: irkit.Session, ids: Any) -> np.ndarray:
    """The direction in which the normed, scaled stream raises each token's logit, `[..., d_model]`, in float64.

    Read from the file, as dequantized, whatever form the weights have in memory.
    """
    file, ids = session.model.file, np.asarray(ids)
    parameters = families.weights(file, session.model.config)
    unembed = parameters["unembed"]
    weight = unembed if unembed is not None and unembed.is_in(file) else parameters["embed"]
    info = families.tensor(file, weight)
    unique, inverse = np.unique(ids, return_inverse=True)
    rows = file.raw(weight.name).reshape(info.shape[0], -1)[unique]
    matrix = gguf.dequantize(rows.reshape(-1), info.format, (len(unique), info.shape[1])).astype(np.float64)
    norm = families.read_weight(file, parameters["ln_final"])
    assert norm is not None
    return (matrix * norm)[inverse.reshape(ids.shape)]


def _layer(trace: Trace, layer: int | None) -> int:
    if layer is None or layer == -1:  # as in TransformerLens, where -1 is the end
        return trace.n_layers
    if not 0 <= layer <= trace.n_layers:
        raise OptionError(f"layer: there is no {layer}; there are {trace.n_layers}")
    return layer


def _entering(trace: Trace, layer: int) -> np.ndarray:
    """The stream that enters `layer`; behind the last, the one that leaves it."""
    name = f"blocks.{layer}.hook_resid_pre"
    if name in trace:
        return value(trace, name)
    return value(trace, f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed")


def _stacked(
    trace: Trace,
    found: Sequence[tuple[str, np.ndarray]],
    layer: int,
    mlp_input: bool,
    apply_ln: bool,
    return_labels: bool,
) -> np.ndarray | tuple[np.ndarray, list[str]]:
    if not found:
        raise OptionError("nothing is left to stack")
    stack = np.stack([part for _, part in found])
    if apply_ln:
        stack = apply_ln_to_stack(trace, stack, layer, mlp_input=mlp_input)
    return (stack, [name for name, _ in found]) if return_labels else stack
