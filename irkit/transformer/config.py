"""What the forward pass needs to know of a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """The shape of a decoder-only transformer; the field names are TransformerLens's where it has them.

    Hashable, so that a compiled program can be keyed on it.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    """The context the model was trained for."""
    eps: float
    """Added to the mean square in every RMSNorm."""
    rotary_dim: int
    """How many of the `d_head` dimensions are rotated."""
    attention_scale: float
    """Multiplies the attention scores; 1/sqrt(d_head) unless the file says otherwise."""
