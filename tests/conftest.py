"""Fixtures every test can use: the real default model, fetched by irkit's own code, and small ones written here."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import hypothesis
import numpy as np
import pytest

import irkit
from irkit import hub

os.environ["IRKIT_STORES"] = "0"  # what else is on the machine that tests is not looked at
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a shell it is ignored, also by the processes that tests start, and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing: a collection of all garbage may fall into it.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# GPT-2 writes these bytes as themselves and the others, in order, as U+0100 and on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
TOKENS = [chr(b) for b in PRINTABLE] + [chr(0x100 + i) for i in range(256 - len(PRINTABLE))] + ["he", "<|end|>"]


def write_model(
    path: Path,
    format_name: str = "F32",
    *,
    d_model: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    d_head: int = 16,
    d_mlp: int = 96,
    biases: bool = False,
    more: Mapping[str, int] = MappingProxyType({}),
    keys: Mapping[str, str] = MappingProxyType({}),
    raw: Mapping[str, tuple[str, np.ndarray]] | None = None,
) -> Path:
    """Two layers of random weights, the matrices in this format, over 258 tokens: a number that 16 does not divide.

    `more` are further tokens with their types, `keys` further metadata. `raw` holds tensors that are not random: a
    format, and the bytes of each row.
    """
    tokens = [*TOKENS, *more]
    q, kv = n_heads * d_head, n_kv_heads * d_head
    layer = {
        "attn_q": (q, d_model), "attn_k": (kv, d_model), "attn_v": (kv, d_model), "attn_output": (d_model, q),
        "ffn_gate": (d_mlp, d_model), "ffn_up": (d_mlp, d_model), "ffn_down": (d_model, d_mlp),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {name: (len(tokens), d_model) for name in ("token_embd", "output")}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(0, 2 * shape[1] ** -0.5, shape) for name, shape in shapes.items()}
    norms = ["output_norm", *(f"blk.{i}.{name}" for i in range(2) for name in ("attn_norm", "ffn_norm"))]
    tensors |= {f"{name}.weight": rng.uniform(0.5, 1.5, d_model) for name in norms}
    if biases:
        tensors |= {f"blk.1.{name}.bias": rng.normal(size=shape[0]) for name, shape in layer.items()}

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_mlp)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3, *more.values()])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    for key, value in keys.items():
        writer.add_string(key, value)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType[format_name if values.ndim == 2 else "F32"]
        data = gguf.quantize(values.astype(np.float32), kind)
        if raw and name in raw:
            kind, data = gguf.GGMLQuantizationType[raw[name][0]], raw[name][1]
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sayings(path: Path, sayings: Mapping[str, Sequence[str]], control: Sequence[str] = ()) -> Path:
    """A model that says, after the control token `start`, the pieces of `sayings[start]`, and ends.

    Each piece is a token; those in `control`, and all starts, are control tokens. No layer adds anything: a token's own
    embedding alone decides which one is next, so a piece can stand in one place only.
    """
    pieces = [piece for said in sayings.values() for piece in said]
    tokens = [*TOKENS, *sayings, *pieces]
    size = 64
    assert len(sayings) + len(pieces) <= size
    embedding, output = (np.zeros((len(tokens), size), np.float32) for _ in range(2))
    for dimension, token in enumerate([*sayings, *pieces]):
        embedding[tokens.index(token), dimension] = 1
    end = TOKENS[-1]
    for start, said in sayings.items():
        for token, following in zip([start, *said], [*said, end], strict=True):
            output[tokens.index(following)] += 20 * embedding[tokens.index(token)]
    raw: dict[str, tuple[str, np.ndarray]]
    raw = {"token_embd.weight": ("F32", embedding), "output.weight": ("F32", output)}
    for layer in range(2):
        raw[f"blk.{layer}.attn_output.weight"] = ("F32", np.zeros((size, 64), np.float32))
        raw[f"blk.{layer}.ffn_down.weight"] = ("F32", np.zeros((size, 96), np.float32))
    raw["output_norm.weight"] = ("F32", np.ones(size, np.float32))
    more = dict.fromkeys(sayings, 3) | {piece: 3 if piece in control else 4 for piece in pieces}
    return write_model(path, more=more, raw=raw)


@pytest.fixture(scope="session", name="write_sayings")
def _write_sayings() -> Callable[..., Path]:
    """`write_sayings`."""
    return write_sayings


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model's file (98 MB), fetched on first use as a user's would be."""
    return hub.ensure("smollm2")


@pytest.fixture(scope="session")
def shared_session(model_path: Path) -> Iterator["irkit.Session"]:
    """One session of the default model for the whole run."""
    with irkit.Session(model_path) as session:
        yield session


@pytest.fixture(scope="session")
def exact_session(model_path: Path) -> Iterator["irkit.Session"]:
    """The same in exact precision: what it computes does not depend on how a text is divided into calls."""
    with irkit.Session(model_path, precision="exact") as session:
        yield session


@pytest.fixture
def session(shared_session: "irkit.Session") -> "irkit.Session":
    """The shared session with nothing in its cache."""
    shared_session.reset()
    shared_session.model.submit(lambda: None).result()  # it was queued
    return shared_session


@pytest.fixture(scope="session", name="write_model")
def _write_model() -> Callable[..., Path]:
    """`write_model`."""
    return write_model


@pytest.fixture
def small_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small model: see `write_model`."""

    def write(*arguments: Any, **options: Any) -> Path:
        return write_model(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", *arguments, **options)

    return write


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers of random weights, width 64, over 258 tokens."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
