"""One process that measures the peers of `inside.py`: `PYTHON peers.py GGUF THREADS`, lines of JSON in and out.

Its Python needs PyTorch, transformers and gguf, and TransformerLens for the engines named after it: version 3 has
both, version 4 the bridge alone. Every weight comes from the GGUF file; nothing is fetched.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
sys.path.insert(0, str(Path(__file__).parent.parent / "reference"))

import torch
from make_reference import hugging_face_model  # pyright: ignore[reportMissingImports]

PATH = Path(sys.argv[1])


@cache
def transformers() -> Any:
    """`LlamaForCausalLM`, eager, float32."""
    return hugging_face_model(PATH)


@cache
def hooked() -> Any:
    """TransformerLens's `HookedTransformer`, its weights as they are: nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    given = transformers().config
    d_head = given.hidden_size // given.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=given.num_hidden_layers,
        d_model=given.hidden_size,
        d_head=d_head,
        n_heads=given.num_attention_heads,
        n_key_value_heads=given.num_key_value_heads,
        d_mlp=given.intermediate_size,
        d_vocab=given.vocab_size,
        n_ctx=2048,
        eps=given.rms_norm_eps,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=given.rope_parameters["rope_theta"],
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_llama_weights(transformers(), config), strict=False)
    return model.eval()


@cache
def bridge() -> Any:
    """TransformerLens's `TransformerBridge`, around a model of its own, since it changes it."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    inner = hugging_face_model(PATH)
    inner.config.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory() as folder:  # it wants a tokenizer, and reads it once more; ids are given here
        words = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<s>")
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers("smollm2", hf_model=inner, device="cpu", tokenizer=tokenizer)


def trace(engine: str, ids: list[int]) -> tuple[float, list[float]]:
    """The seconds that one pass with everything kept takes, and the last token's logits."""
    model, given = MODELS[engine](), torch.tensor([ids])
    began = time.perf_counter()
    if engine == "transformers":
        logits = model(given, output_attentions=True, output_hidden_states=True, use_cache=False).logits
    else:
        logits, _ = model.run_with_cache(given)
    took = time.perf_counter() - began
    return took, logits[0, -1].tolist()


def decode(engine: str, ids: list[int], count: int, attentions: bool) -> tuple[float, list[float]]:
    """The seconds that `count` tokens take, one by one, behind `ids`; every token's attentions are kept."""
    model = MODELS[engine]()
    found = model(torch.tensor([ids]), use_cache=True)
    kept = []
    began = time.perf_counter()
    for _ in range(count):
        token = found.logits[:, -1:].argmax(-1)
        found = model(token, past_key_values=found.past_key_values, use_cache=True, output_attentions=attentions)
        kept.append(found.attentions)
    return time.perf_counter() - began, found.logits[0, -1].tolist()


MODELS: dict[str, Callable[[], Any]] = {"transformers": transformers, "hooked": hooked, "bridge": bridge}
MEASURES: dict[str, Callable[..., tuple[float, list[float]]]] = {"trace": trace, "decode": decode}


def main() -> None:
    """Serves requests until standard input ends."""
    # Only replies go to what was standard output: libraries that print shall not break a line.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[2]))
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                print(json.dumps(MEASURES[request.pop("what")](**request)), file=replies)
            except ImportError as error:  # TransformerLens is not there, or a version without this engine
                print(json.dumps([None, str(error)]), file=replies)


if __name__ == "__main__":
    main()
