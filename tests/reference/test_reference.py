"""Exact precision against Hugging Face transformers, float32 and eager, with the same dequantized weights.

The frozen arrays (`make_reference.py` makes them) need no torch. The live comparison looks at every logit:

    pip install -e '.[dev,reference]' && pytest -m reference
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import irkit
from irkit.transformer import cache as kv
from irkit.transformer import decoder

FROZEN = Path(__file__).parent / "smollm2.npz"
STRIDE = 192
TOLERANCE = 1e-3
CAPACITY = 64


@pytest.fixture(scope="module")
def exact(model_path: Path) -> Iterator[irkit.Session]:
    with irkit.Session(model_path, precision="exact") as session:
        yield session


@pytest.fixture(scope="module")
def forward(exact: irkit.Session) -> Any:
    """Logits `[pos, vocab]` of some ids, float32, all positions at once."""
    runtime = exact.model.load().result()
    config = exact.model.config
    program = jax.jit(partial(decoder.forward, config=config))

    def logits(ids: np.ndarray) -> np.ndarray:
        padded = np.zeros((1, CAPACITY), np.int32)
        padded[0, : len(ids)] = ids
        cache = kv.empty(config, 1, CAPACITY, jnp.dtype(jnp.float32))
        positions = np.arange(CAPACITY, dtype=np.int32)[None]
        return np.asarray(program(runtime.params, padded, positions, cache)[0])[0, : len(ids)]

    return logits


def prompts() -> list[dict[str, np.ndarray]]:
    with np.load(FROZEN) as arrays:
        found = dict(arrays)
    count = len({name.split(".")[0] for name in found})
    return [
        {name.partition(".")[2]: value for name, value in found.items() if name.startswith(f"{number}.")}
        for number in range(count)
    ]


PROMPTS = prompts()


def test_there_are_ten_prompts_of_24_tokens_each() -> None:
    assert len(PROMPTS) == 10
    assert all(len(prompt["ids"]) == prompt["prompt_length"] + 24 for prompt in PROMPTS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits(forward: Any, prompt: dict[str, np.ndarray]) -> None:
    logits = forward(prompt["ids"])
    np.testing.assert_allclose(logits[:, ::STRIDE], prompt["logits"], rtol=0, atol=TOLERANCE)
    logsumexp = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    np.testing.assert_allclose(logsumexp, prompt["logsumexp"], rtol=0, atol=TOLERANCE)
    top = np.sort(logits, axis=-1)
    np.testing.assert_allclose(top[:, -1] - top[:, -2], prompt["margin"], rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text(exact: irkit.Session, prompt: dict[str, np.ndarray]) -> None:
    length = int(prompt["prompt_length"])
    expected, margins = prompt["ids"][length:], prompt["margin"][length - 1 : -1]
    made = [token.id for token in exact.generate(prompt["ids"][:length].tolist(), temperature=0, num_predict=24)]
    for index, (token, margin) in enumerate(zip(expected.tolist(), margins, strict=True)):
        if index >= len(made):
            assert made[-1] in exact.model.tokenizer.eog_ids  # the reference does not stop there
            break
        if made[index] != token:
            assert margin <= TOLERANCE, f"token {index}: {made[index]}, not {token}"
            break


@pytest.mark.reference
def test_every_logit_live(forward: Any, model_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from make_reference import hugging_face_model

    model = hugging_face_model(model_path)
    for prompt in PROMPTS:
        with torch.inference_mode():
            expected = model(torch.tensor(prompt["ids"][None].astype(np.int64))).logits[0].numpy()
        np.testing.assert_allclose(forward(prompt["ids"]), expected, rtol=0, atol=TOLERANCE)
