"""Makes tests/reference/smollm2_hooks.npz: what Hugging Face transformers shows inside the default model.

    pip install -e '.[dev,reference]' && python tests/reference/make_hooks_reference.py

The model is that of `make_reference.py`: float32, eager attention, weights dequantized by the `gguf` package. To keep
the file small, all values are of a few positions, and wide ones of every eighth or fourth number; patterns, the KV
cache of three layers and the gradient at the embeddings are whole.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from make_reference import hugging_face_model

PROMPT = "When Mary and John went to the store, John gave a drink to"
RIGHT, WRONG = " Mary", " John"
POSITIONS = (0, 6, -1)
MLP_STRIDE, STREAM_STRIDE = 8, 4
CACHED_LAYERS = (0, 13, 29)
GRADIENT_LAYERS = (1, 12, 24)
REPEATED = 25
HERE = Path(__file__).parent


def insides(model: Any, ids: list[int]) -> dict[str, np.ndarray]:
    """Values by irkit's names, `[layer, ...]`, without the batch axis."""
    import torch

    seen: dict[str, list[Any]] = {}

    def output(name: str) -> Callable[..., None]:
        return lambda module, inputs, out: seen.setdefault(name, []).append(out[0].numpy())

    def entering(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen.setdefault(name, []).append(inputs[0][0].numpy())

    watched = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        outputs = {
            "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "attn_out": attention.o_proj,
            "pre": mlp.gate_proj, "pre_linear": mlp.up_proj, "mlp_out": mlp.down_proj,
        }  # fmt: skip
        inputs = {"z": attention.o_proj, "resid_mid": layer.post_attention_layernorm, "post": mlp.down_proj}
        inputs["resid_pre"] = layer.input_layernorm
        watched += [module.register_forward_hook(output(name)) for name, module in outputs.items()]
        watched += [module.register_forward_pre_hook(entering(name)) for name, module in inputs.items()]
    watched.append(model.model.norm.register_forward_pre_hook(entering("resid_post")))
    with torch.inference_mode():
        found = model(torch.tensor([ids]), output_attentions=True, use_cache=True)
    for each in watched:
        each.remove()
    values = {name: np.stack(parts) for name, parts in seen.items()}
    for name in ("q", "k", "v", "z"):
        values[name] = values[name].reshape(*values[name].shape[:2], -1, model.config.head_dim)
    values["pattern"] = np.stack([pattern[0].numpy() for pattern in found.attentions])
    cached = found.past_key_values.layers
    values["cached_keys"] = np.stack([cached[layer].keys[0].numpy() for layer in CACHED_LAYERS])
    values["cached_values"] = np.stack([cached[layer].values[0].numpy() for layer in CACHED_LAYERS])
    return values


def gradients(model: Any, ids: list[int], right: int, wrong: int) -> dict[str, np.ndarray]:
    """Of the last position's logit difference, with respect to the stream that enters some layers, `[pos, d_model]`."""
    import torch

    streams: dict[int, Any] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            streams[layer] = inputs[0]
            inputs[0].retain_grad()

        return hook

    layers = model.model.layers
    watched = [layers[i].register_forward_pre_hook(keep(i)) for i in (0, *GRADIENT_LAYERS)]
    logits = model(inputs_embeds=model.model.embed_tokens(torch.tensor([ids]))).logits[0, -1]
    (logits[right] - logits[wrong]).backward()
    for each in watched:
        each.remove()
    made = {f"gradient.{layer}": stream.grad[0].numpy() for layer, stream in streams.items()}
    return made | {"difference": (logits[right] - logits[wrong]).detach().numpy()}


def head_scores(pattern: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """`[layer, head]` of patterns `[layer, head, query, key]` over `length` tokens read twice.

    The mean attention to the token after the last occurrence (induction), to the token before, and to the last
    occurrence, as the diagonals of TransformerLens's exploratory analysis demo take them.
    """
    offsets = {"induction": 1 - length, "previous": -1, "duplicate": -length}
    return {name: pattern.diagonal(offset, axis1=-2, axis2=-1).mean(-1) for name, offset in offsets.items()}


def main() -> None:
    from irkit import hub, tokenizer

    path = hub.ensure("smollm2")
    model, encode = hugging_face_model(path), tokenizer.from_gguf(path).encode
    ids, right, wrong = encode(PROMPT), encode(RIGHT)[0], encode(WRONG)[0]
    values = insides(model, ids)
    for name in ("q", "k", "v", "z", "resid_pre", "resid_post"):
        values[name] = values[name][:, list(POSITIONS)]
    for name in ("pre", "pre_linear", "post"):
        values[name] = values[name][:, list(POSITIONS), ::MLP_STRIDE]
    for name in ("attn_out", "resid_mid", "mlp_out"):
        values[name] = values[name][:, list(POSITIONS), ::STREAM_STRIDE]
    once = np.random.default_rng(0).integers(100, model.config.vocab_size, REPEATED).tolist()
    values |= head_scores(insides(model, [*once, *once])["pattern"], REPEATED)
    values |= gradients(model, ids, right, wrong)
    for layer in GRADIENT_LAYERS:
        values[f"gradient.{layer}"] = values[f"gradient.{layer}"][list(POSITIONS)]
    values |= {"ids": np.array(ids, np.int32), "repeated": np.array(once, np.int32)}
    values["answers"] = np.array([right, wrong], np.int32)
    np.savez_compressed(HERE / "smollm2_hooks.npz", allow_pickle=False, **values)


if __name__ == "__main__":
    main()
