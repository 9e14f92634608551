"""Makes tests/reference/smollm2.npz: what Hugging Face transformers says of the default model.

    pip install -e '.[dev,reference]' && python tests/reference/make_reference.py

`LlamaForCausalLM` in float32 with eager attention, its weights dequantized from the same GGUF file by the
`gguf` package: nothing of irkit's own arithmetic takes part. Logits are kept for every 192nd token of the
vocabulary, with the logsumexp over all of it; `test_reference.py` compares all of them, live, under the
`reference` marker.
"""

from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "Q: What is the largest planet in the solar system?\nA:",
    "1, 2, 3, 5, 8, 13,",
    "Die Katze sitzt auf dem",
    "import numpy as np\n\nx = np.",
    "To be, or not to be, that is the",
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the",
)
NEW_TOKENS = 24
STRIDE = 192
HERE = Path(__file__).parent


def hugging_face_model(path: Path) -> Any:
    """`LlamaForCausalLM` with the weights of the GGUF file, float32, eager."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)

    def key(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv")
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=key("vocab_size"),
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": key("rope.freq_base")},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(torch.float32).eval()

    def unpaired(weight: np.ndarray, count: int) -> np.ndarray:
        half = weight.shape[0] // count // 2
        return weight.reshape(count, half, 2, -1).transpose(0, 2, 1, 3).reshape(weight.shape)

    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    names = {
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        state |= {f"{theirs}.{there}.weight": tensors[f"{ours}.{here}.weight"] for there, here in names.items()}
        state[f"{theirs}.self_attn.q_proj.weight"] = unpaired(tensors[f"{ours}.attn_q.weight"], heads)
        state[f"{theirs}.self_attn.k_proj.weight"] = unpaired(tensors[f"{ours}.attn_k.weight"], kv_heads)
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in state.items()})
    return model


def main() -> None:
    import torch

    from irkit import hub, tokenizer

    path = hub.ensure("smollm2")
    model, encode = hugging_face_model(path), tokenizer.from_gguf(path).encode
    kept: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for number, prompt in enumerate(PROMPTS):
            ids = encode(prompt)
            prompt_length = len(ids)
            for _ in range(NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            logits = model(torch.tensor([ids])).logits[0]
            top = logits.topk(2).values
            kept |= {
                f"{number}.ids": np.array(ids, np.int32),
                f"{number}.prompt_length": np.array(prompt_length),
                f"{number}.margin": (top[:, 0] - top[:, 1]).numpy(),
                f"{number}.logsumexp": torch.logsumexp(logits, -1).numpy(),
                f"{number}.logits": logits[:, ::STRIDE].numpy(),
            }
    np.savez_compressed(HERE / "smollm2.npz", allow_pickle=False, **kept)


if __name__ == "__main__":
    main()
