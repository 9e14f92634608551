"""A file's tensors as the kernels read them: planned from the header, packed by several threads, or refused."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import irkit
from irkit import families, gguf
from irkit.engine import weights
from irkit.errors import ModelFileError, UnsupportedModelError
from irkit.kernels import cpu
from irkit.kernels.cpu import library, packing

pytestmark = pytest.mark.skipif(library.load() is None, reason="the extension is not installed")
FORM_OF = {
    "F32": "f32", "F16": "f16", "BF16": "bf16", "Q4_0": "q4", "Q4_1": "q4m", "Q5_0": "q5", "Q5_1": "q5m", "Q8_0": "q8",
}  # fmt: skip


@pytest.fixture
def kernels() -> ctypes.CDLL:
    loaded = library.load()
    assert loaded is not None
    return loaded


def tree_of(file: gguf.File) -> Any:
    return families.weights(file, families.read_config(file))


def flat(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


def read(file: gguf.File, kernels: ctypes.CDLL | None) -> list[tuple[weights.Plan, np.ndarray]]:
    plans = weights.plan(file, tree_of(file), kernels)
    fractions: list[float] = []
    memory, values = weights.read(file, plans, kernels, 3, fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1

    def value(plan: weights.Plan) -> np.ndarray:
        if plan.form is None:
            return values[plan.weight.name]
        assert plan.start is not None
        assert plan.start + plan.nbytes <= weights.total(plans, packed=True)  # what is packed comes first
        return memory[plan.start : plan.start + plan.nbytes]

    return [(plan, value(plan)) for plan in jax.tree.leaves(plans)]


@pytest.mark.parametrize("format_name", FORM_OF)
def test_what_is_packed_is_what_the_reader_dequantizes(
    small_model: Callable[..., Path], kernels: ctypes.CDLL, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BYTES_AT_ONCE", 5000)  # matrices are packed in parts, and with others
    file = gguf.open(small_model(format_name, biases=True))
    found = read(file, kernels)
    assert {plan.form for plan, _ in found} == {None, FORM_OF[format_name]}
    for plan, value in found:
        expected = families.read_weight(file, plan.weight)  # query and key rows in Hugging Face's order
        assert expected is not None
        assert value.nbytes == plan.nbytes
        if plan.form is None:
            assert value.dtype == np.float32
            assert len(plan.weight.shape) == 1
        else:
            assert value.ctypes.data % 64 == 0
            value = packing.unpack(kernels, value, plan.form, expected.shape)
        np.testing.assert_array_equal(value, expected)


def test_plans_follow_the_tree(small_model: Callable[..., Path], kernels: ctypes.CDLL) -> None:
    file = gguf.open(small_model("Q4_1"))
    plans = weights.plan(file, tree_of(file), kernels)
    first = plans["blocks"][0]
    assert first["q_bias"] is None
    assert (first["ln1"].form, plans["inv_freq"].form) == (None, None)
    assert (first["q"].form, first["q"].nbytes) == ("q4m", 64 * 64 * 20 // 32)
    assert plans["embed"].nbytes == 17 * 16 * 64 * 20 // 32  # 258 rows fill 17 panels
    assert first["ln1"].nbytes == 64 * 4
    read = [plan for plan in flat(plans) if plan and plan.weight.derive is None]
    assert weights.total(plans) == sum(plan.nbytes for plan in read)
    assert weights.total(plans, packed=True) == sum(plan.nbytes for plan in read if plan.form)
    assert weights.total(plans) == max(plan.start + plan.nbytes for plan in read if plan.start is not None)
    unpacked = weights.plan(file, tree_of(file), None)
    assert {plan.form for plan in flat(unpacked) if plan} == {None}
    assert unpacked["embed"].nbytes == 258 * 64 * 4


def test_layers_alike_share_their_programs(small_model: Callable[..., Path], kernels: ctypes.CDLL) -> None:
    """All packed matrices are one argument of a program; a program for a single layer is told only of its own."""
    with irkit.Session(small_model("Q4_1"), backend="cpu") as session:
        runtime = session.model.load().result()
        first, second = runtime.block(0), runtime.block(1)
        assert jax.tree.structure(first) == jax.tree.structure(second)
        assert len({id(leaf) for leaf in jax.tree.leaves(runtime.params) if leaf.dtype == np.uint8}) == 1
        for name, part in second.items():
            whole = runtime.params["blocks"][1][name]
            if isinstance(part, cpu.Packed):
                taken, all_of_it = np.asarray(part.data)[part.start : part.stop], np.asarray(whole.data)
                assert taken.ctypes.data == all_of_it[whole.start : whole.stop].ctypes.data  # nothing was copied
                assert packing.unpack(kernels, taken, part.form, part.shape).any()
            else:
                assert part is whole


def test_without_kernels_everything_is_float32(small_model: Callable[..., Path]) -> None:
    file = gguf.open(small_model("Q5_1"))
    for plan, value in read(file, None):
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, families.read_weight(file, plan.weight))


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(
    small_model: Callable[..., Path], kernels: ctypes.CDLL
) -> None:
    file = gguf.open(small_model())
    tree = tree_of(file)
    for wrong, named in [
        (families.Weight("blk.7.ffn_up.weight", (96, 64)), r"blk\.7\.ffn_up"),
        (families.Weight("blk.1.ffn_up.weight", (96, 65)), r"blk\.1\.ffn_up.*\[96, 64\], not \[96, 65\]"),
    ]:
        tree["blocks"][1]["up"] = wrong
        with pytest.raises(ModelFileError, match=named):
            weights.plan(file, tree, kernels)


@pytest.mark.usefixtures("nothing_prepared")
def test_scales_too_large_are_refused_and_exact_reads_them(small_model: Callable[..., Path]) -> None:
    blocks = np.zeros((96, 144), np.uint8)
    blocks[95, :5] = [0xFF, 0x7B, 0, 0, 2]  # the last row's first scale is 65504 * 2
    path = small_model("Q8_0", d_model=256, raw={"blk.1.ffn_up.weight": ("Q4_K", blocks)})
    with irkit.Session(path, backend="cpu") as session:
        for _ in range(2):  # nor is what failed taken for loaded
            with pytest.raises(UnsupportedModelError, match=r"'blk\.1\.ffn_up\.weight'.*use precision exact"):
                session.score("ab")
    with irkit.Session(path, backend="cpu", precision="exact") as session:
        assert len(session.score("ab").tokens) == 2


def test_formats_may_be_mixed_within_a_layer(small_model: Callable[..., Path], kernels: ctypes.CDLL) -> None:
    blocks = np.random.default_rng(0).integers(0, 16, (96, 144), np.uint8)
    file = gguf.open(small_model("F16", d_model=256, raw={"blk.0.ffn_gate.weight": ("Q4_K", blocks)}))
    plans = weights.plan(file, tree_of(file), kernels)
    assert [plans["blocks"][0][name].form for name in ("gate", "up")] == ["q4m", "f16"]
