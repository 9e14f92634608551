"""`llama`: Llama 1 to 3, Mistral 7B, TinyLlama, SmolLM2 and their relatives.

Keys as the GGUF specification names them, with `llama.` in front; tensor names as llama.cpp's converter
writes them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from irkit.errors import ModelFileError, UnsupportedModelError
from irkit.families import Weight, read_weight
from irkit.transformer.config import Config

if TYPE_CHECKING:
    from irkit.gguf import File


def config(file: File) -> Config:
    """The model's shape; raises `UnsupportedModelError` for experts, YaRN and the like."""
    meta = file.metadata
    if meta.value("llama.expert_count", int, 0):
        raise UnsupportedModelError(f"{file.path}: llama.expert_count: mixtures of experts are not supported")
    scaling = meta.value("llama.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedModelError(
            f"{file.path}: llama.rope.scaling.type {scaling!r} is not supported; supported are none, linear"
        )
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise ModelFileError(f"{file.path}: tensor 'token_embd.weight' is missing or no matrix")
    d_model = meta.value("llama.embedding_length", int)
    n_heads = meta.value("llama.attention.head_count", int)
    n_kv_heads = meta.value("llama.attention.head_count_kv", int, n_heads)
    d_head = meta.value("llama.attention.key_length", int, d_model // max(n_heads, 1))
    found = Config(
        n_layers=meta.value("llama.block_count", int),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=meta.value("llama.feed_forward_length", int),
        d_vocab=embed.shape[0],
        n_ctx=meta.value("llama.context_length", int),
        eps=meta.value("llama.attention.layer_norm_rms_epsilon", float),
        rotary_dim=meta.value("llama.rope.dimension_count", int, d_head),
        attention_scale=meta.value("llama.attention.scale", float, 0.0) or max(d_head, 1) ** -0.5,
    )
    _check(file, found)
    return found


def _check(file: File, found: Config) -> None:
    """Refuse numbers with which the forward pass could not mean anything."""
    last = f"blk.{found.n_layers - 1}.attn_norm.weight"
    if last not in file.tensors:
        raise ModelFileError(f"{file.path}: llama.block_count is {found.n_layers}, but there is no tensor {last!r}")
    for field, value in vars(found).items():
        if not value > 0:
            raise ModelFileError(f"{file.path}: {field} is {value}, from the keys under 'llama.'; it must be positive")
    # Bounds the head's width by what is in the file, before anything is made in its size.
    expected = found.n_heads * found.d_head, found.d_model
    if file.tensor("blk.0.attn_q.weight").shape != expected:
        raise ModelFileError(
            f"{file.path}: tensor 'blk.0.attn_q.weight' has shape {list(file.tensor('blk.0.attn_q.weight').shape)}, "
            f"not {list(expected)}, which the keys under 'llama.' say"
        )
    if found.n_heads % found.n_kv_heads:
        raise ModelFileError(
            f"{file.path}: llama.attention.head_count {found.n_heads} is not a multiple of "
            f"llama.attention.head_count_kv {found.n_kv_heads}"
        )
    if found.d_head % 2:
        raise ModelFileError(f"{file.path}: llama.attention.key_length {found.d_head} is odd")
    value_length = file.metadata.value("llama.attention.value_length", int, found.d_head)
    for key, value in (("attention.value_length", value_length), ("rope.dimension_count", found.rotary_dim)):
        if value != found.d_head:
            raise UnsupportedModelError(
                f"{file.path}: llama.{key} {value}, unlike the head's width {found.d_head}, is not supported"
            )


def weights(c: Config) -> dict[str, Any]:
    """The decoder's parameters, each as the `Weight` it is read from."""
    q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head

    def block(i: int) -> dict[str, Weight]:
        def weight(name: str, *shape: int, **more: Any) -> Weight:
            return Weight(f"blk.{i}.{name}", shape, **more)

        return {
            "ln1": weight("attn_norm.weight", c.d_model),
            "q": weight("attn_q.weight", q, c.d_model, paired_heads=c.n_heads),
            "k": weight("attn_k.weight", kv, c.d_model, paired_heads=c.n_kv_heads),
            "v": weight("attn_v.weight", kv, c.d_model),
            "o": weight("attn_output.weight", c.d_model, q),
            "q_bias": weight("attn_q.bias", q, paired_heads=c.n_heads, optional=True),
            "k_bias": weight("attn_k.bias", kv, paired_heads=c.n_kv_heads, optional=True),
            "v_bias": weight("attn_v.bias", kv, optional=True),
            "o_bias": weight("attn_output.bias", c.d_model, optional=True),
            "ln2": weight("ffn_norm.weight", c.d_model),
            "gate": weight("ffn_gate.weight", c.d_mlp, c.d_model),
            "up": weight("ffn_up.weight", c.d_mlp, c.d_model),
            "down": weight("ffn_down.weight", c.d_model, c.d_mlp),
            "gate_bias": weight("ffn_gate.bias", c.d_mlp, optional=True),
            "up_bias": weight("ffn_up.bias", c.d_mlp, optional=True),
            "down_bias": weight("ffn_down.bias", c.d_model, optional=True),
        }

    return {
        "embed": Weight("token_embd.weight", (c.d_vocab, c.d_model)),
        "unembed": Weight("output.weight", (c.d_vocab, c.d_model), optional=True),
        "ln_final": Weight("output_norm.weight", (c.d_model,)),
        "inv_freq": Weight("inv_freq", (c.rotary_dim // 2,), derive=partial(inv_freq, c=c)),
        "blocks": [block(i) for i in range(c.n_layers)],
    }


def inv_freq(file: File, c: Config) -> np.ndarray:
    """The angle each rotary pair turns by from one position to the next, float32 `[rotary_dim / 2]`.

    `rope_freqs.weight`, where the file has it, divides the angles: Llama 3's scaling, worked out when the
    file was made.
    """
    rope_freqs = read_weight(file, Weight("rope_freqs.weight", (c.rotary_dim // 2,), optional=True))
    base = np.float32(file.metadata.value("llama.rope.freq_base", float, 10000.0))
    exponents = np.arange(0, c.rotary_dim, 2, dtype=np.float32) / np.float32(c.rotary_dim)
    with np.errstate(all="ignore"):
        frequencies = 1 / base**exponents
        if file.metadata.value("llama.rope.scaling.type", str, "none") == "linear":
            frequencies = frequencies / np.float32(file.metadata.value("llama.rope.scaling.factor", float))
        if rope_freqs is not None:
            frequencies = frequencies / rope_freqs
    if not np.isfinite(frequencies).all():
        raise ModelFileError(f"{file.path}: llama.rope.freq_base and its scaling give no finite frequencies")
    return frequencies
