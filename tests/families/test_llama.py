"""The llama family on small files made for the purpose: what is read from them, and what is refused."""

import tracemalloc
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from irkit import families, gguf
from irkit.errors import ModelFileError, UnsupportedModelError

D, HEADS, KV_HEADS, D_HEAD, MLP, VOCAB = 32, 4, 2, 8, 48, 20
KEYS: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": D,
    "feed_forward_length": MLP,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
LAYER = {
    "attn_norm.weight": (D,), "ffn_norm.weight": (D,), "attn_q.weight": (HEADS * D_HEAD, D),
    "attn_k.weight": (KV_HEADS * D_HEAD, D), "attn_v.weight": (KV_HEADS * D_HEAD, D),
    "attn_output.weight": (D, HEADS * D_HEAD), "ffn_gate.weight": (MLP, D), "ffn_up.weight": (MLP, D),
    "ffn_down.weight": (D, MLP),
}  # fmt: skip
TENSORS = {
    "token_embd.weight": (VOCAB, D),
    "output_norm.weight": (D,),
    **{f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()},
}


def write(path: Path, tensors: dict[str, tuple[int, ...]] = TENSORS, arch: str = "llama", **keys: Any) -> gguf.File:
    """A file with these keys (None leaves one out) and random tensors of these shapes."""
    writer = reference.GGUFWriter(path, arch)
    for key, value in (KEYS | keys).items():
        name = f"{arch}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    rng = np.random.default_rng(0)
    for name, shape in tensors.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.open(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def read(file: gguf.File) -> Any:
    """Every weight of the model, by the decoder's names."""
    config = families.read_config(file)
    tree = families.weights(file, config)
    blocks = [{name: families.read_weight(file, w) for name, w in block.items()} for block in tree.pop("blocks")]
    return {name: families.read_weight(file, weight) for name, weight in tree.items()} | {"blocks": blocks}


def test_config(path: Path) -> None:
    config = families.read_config(write(path))
    assert vars(config) == {
        "n_layers": 2, "d_model": D, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "d_head": D_HEAD, "d_mlp": MLP,
        "d_vocab": VOCAB, "n_ctx": 64, "eps": pytest.approx(1e-5), "rotary_dim": D_HEAD,
        "attention_scale": pytest.approx(D_HEAD**-0.5),
    }  # fmt: skip
    path.unlink()
    without_groups = families.read_config(write(path, **{"attention.head_count_kv": None, "attention.scale": 0.25}))
    assert (without_groups.n_kv_heads, without_groups.attention_scale) == (HEADS, 0.25)


def test_query_and_key_rows_come_in_hugging_faces_order(path: Path) -> None:
    file = write(path)
    block = read(file)["blocks"][1]
    for name, tensor, heads in (("q", "attn_q", HEADS), ("k", "attn_k", KV_HEADS)):
        # What llama.cpp's converter does, from which the file's rows must come out again.
        theirs = block[name].reshape(heads, 2, D_HEAD // 2, D).swapaxes(1, 2).reshape(heads * D_HEAD, D)
        np.testing.assert_array_equal(theirs, file.dequantize(f"blk.1.{tensor}.weight"))
    np.testing.assert_array_equal(block["v"], file.dequantize("blk.1.attn_v.weight"))


def test_optional_parts(path: Path) -> None:
    plain = read(write(path))
    assert plain["unembed"] is None
    assert plain["blocks"][0]["q_bias"] is None
    frequencies = 10000.0 ** -(np.arange(0, D_HEAD, 2) / D_HEAD)
    np.testing.assert_allclose(plain["inv_freq"], frequencies, rtol=1e-6)
    path.unlink()
    more = {
        "output.weight": (VOCAB, D), "rope_freqs.weight": (D_HEAD // 2,),
        "blk.0.attn_q.bias": (HEADS * D_HEAD,), "blk.0.attn_output.bias": (D,),
    }  # fmt: skip
    keys: dict[str, Any] = {"rope.freq_base": 5e5}
    file = write(path, TENSORS | more, **keys)
    full = read(file)
    np.testing.assert_array_equal(full["unembed"], file.dequantize("output.weight"))
    np.testing.assert_array_equal(full["blocks"][0]["o_bias"], file.dequantize("blk.0.attn_output.bias"))
    bias = full["blocks"][0]["q_bias"].reshape(HEADS, 2, D_HEAD // 2).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(bias, file.dequantize("blk.0.attn_q.bias"))
    scaled = 5e5 ** -(np.arange(0, D_HEAD, 2) / D_HEAD) / file.dequantize("rope_freqs.weight")
    np.testing.assert_allclose(full["inv_freq"], scaled, rtol=1e-5)


def test_linear_rope_scaling(path: Path) -> None:
    file = write(path, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    frequencies = 10000.0 ** -(np.arange(0, D_HEAD, 2) / D_HEAD) / 4
    np.testing.assert_allclose(read(file)["inv_freq"], frequencies, rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"expert_count": 8}, "llama.expert_count"),
        ({"rope.scaling.type": "yarn"}, "'yarn'"),
        ({"attention.value_length": 16}, "llama.attention.value_length"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count"),
    ],
)
def test_what_is_not_supported_is_named(path: Path, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        families.read_config(write(path, **keys))


def test_another_architecture_is_named(path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*supported are llama"):
        families.read_config(write(path, arch="mamba"))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"block_count": None}, "llama.block_count"),
        ({"block_count": 0}, "block_count is 0"),
        ({"block_count": 2**32 - 1}, "block_count is 4294967295"),
        ({"block_count": 3}, "blk.2.attn_norm.weight"),
        ({"context_length": 0}, "n_ctx is 0"),
        ({"embedding_length": 2**31}, "attn_q.weight"),
        ({"attention.key_length": 2**31}, "attn_q.weight"),
        ({"feed_forward_length": 2**31}, "ffn_gate.weight"),
        ({"attention.head_count": 0}, "n_heads is 0"),
        ({"attention.head_count_kv": 3}, "not a multiple"),
        ({"attention.head_count": 3}, "attn_q.weight"),
        ({"attention.head_count_kv": 0}, "n_kv_heads is 0"),
        ({"attention.head_count": [4, 4]}, "attention.head_count"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "eps is nan"),
        ({"attention.key_length": 7}, "attn_q.weight"),
        ({"rope.freq_base": 0.0}, "rope.freq_base"),
        ({"rope.freq_base": float("nan")}, "rope.freq_base"),
        ({"embedding_length": "32"}, "embedding_length"),
    ],
)
def test_a_file_that_lies_is_refused_before_memory_is_taken(path: Path, keys: dict[str, Any], named: str) -> None:
    file = write(path, **keys)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=named):
            read(file)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"])
def test_a_missing_or_misshapen_tensor_is_named(path: Path, name: str) -> None:
    with pytest.raises(ModelFileError, match=name):
        read(write(path, {n: s for n, s in TENSORS.items() if n != name}))
    path.unlink()
    with pytest.raises(ModelFileError, match=name):
        read(
            write(
                path,
                TENSORS | {name: (7, *TENSORS[name][1:])} if name != "token_embd.weight" else TENSORS | {name: (7,)},
            )
        )
