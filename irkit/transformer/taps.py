"""The table of hook points, and `tap`, by which the forward pass shows a value there.

Names and shapes follow TransformerLens. Letters: b batch, pos and query token positions of the call, key
positions of the cache, H query heads, K key/value heads.
"""

from collections.abc import Collection
from dataclasses import dataclass

from jax import Array


@dataclass(frozen=True)
class HookPoint:
    """A place in the forward pass: its name (in every layer behind `blocks.{i}.`), shape and meaning."""

    name: str
    shape: str
    doc: str
    per_layer: bool = True


HOOK_POINTS = (
    HookPoint("hook_embed", "[b, pos, d_model]", "The token embeddings.", per_layer=False),
    HookPoint("hook_resid_pre", "[b, pos, d_model]", "The residual stream as the layer finds it."),
    HookPoint("ln1.hook_scale", "[b, pos, 1]", "What the norm before attention divides by."),
    HookPoint("ln1.hook_normalized", "[b, pos, d_model]", "The normed stream, before the norm's weight."),
    HookPoint("attn.hook_q", "[b, pos, H, d_head]", "Queries, before rotation."),
    HookPoint("attn.hook_k", "[b, pos, K, d_head]", "Keys, before rotation."),
    HookPoint("attn.hook_v", "[b, pos, K, d_head]", "Values."),
    HookPoint("attn.hook_rot_q", "[b, pos, H, d_head]", "Queries, rotated by their position."),
    HookPoint("attn.hook_rot_k", "[b, pos, K, d_head]", "Keys, rotated by their position: what the cache holds."),
    HookPoint("attn.hook_attn_scores", "[b, H, query, key]", "Attention scores, scaled; -inf where masked."),
    HookPoint("attn.hook_pattern", "[b, H, query, key]", "Attention probabilities; each row sums to 1."),
    HookPoint("attn.hook_z", "[b, pos, H, d_head]", "Values mixed by the pattern, head by head."),
    HookPoint("attn.hook_result", "[b, pos, H, d_model]", "What each head adds to the stream (without bias)."),
    HookPoint("hook_attn_out", "[b, pos, d_model]", "What attention adds to the stream."),
    HookPoint("hook_resid_mid", "[b, pos, d_model]", "The stream between attention and MLP."),
    HookPoint("ln2.hook_scale", "[b, pos, 1]", "What the norm before the MLP divides by."),
    HookPoint("ln2.hook_normalized", "[b, pos, d_model]", "The normed stream, before the norm's weight."),
    HookPoint("mlp.hook_pre", "[b, pos, d_mlp]", "The gate, before its activation function."),
    HookPoint("mlp.hook_pre_linear", "[b, pos, d_mlp]", "The up projection, which the gate multiplies."),
    HookPoint("mlp.hook_post", "[b, pos, d_mlp]", "Activated gate times up projection."),
    HookPoint("hook_mlp_out", "[b, pos, d_model]", "What the MLP adds to the stream."),
    HookPoint("hook_resid_post", "[b, pos, d_model]", "The residual stream as the layer leaves it."),
    HookPoint("ln_final.hook_scale", "[b, pos, 1]", "What the final norm divides by.", per_layer=False),
    HookPoint(
        "ln_final.hook_normalized",
        "[b, pos, d_model]",
        "The normed stream before its weight.",
        per_layer=False,
    ),
)


def hook_names(n_layers: int) -> tuple[str, ...]:
    """The full name of every hook point of a model, `blocks.{i}.` included."""
    return tuple(
        name
        for point in HOOK_POINTS
        for name in ([f"blocks.{i}.{point.name}" for i in range(n_layers)] if point.per_layer else [point.name])
    )


class Taps:
    """Collects the values at the hook points that `spec` names, while one forward pass is traced.

    A hook point that is not named costs nothing: its value passes through and the compiled program is the
    one without it.
    """

    def __init__(self, spec: Collection[str], prefix: str = "", captures: dict[str, Array] | None = None) -> None:
        self.spec = spec
        self.prefix = prefix
        self.captures: dict[str, Array] = {} if captures is None else captures

    def layer(self, index: int) -> "Taps":
        """The same, for the hook points of one layer."""
        return Taps(self.spec, f"blocks.{index}.", self.captures)

    def wants(self, name: str) -> bool:
        """Whether a value is asked for; for values that would not be computed otherwise."""
        return self.prefix + name in self.spec

    def wants_inside(self) -> bool:
        """Of one layer's: whether any value is asked for other than the stream as it enters and leaves."""
        outside = (self.prefix + "hook_resid_pre", self.prefix + "hook_resid_post")
        return any(name.startswith(self.prefix) and name not in outside for name in self.spec)

    def __call__(self, name: str, value: Array) -> Array:
        """`value`, which stands at the hook point `name`."""
        if self.wants(name):
            self.captures[self.prefix + name] = value
        return value
