"""Patching sweeps, on the device's thread: which runs are packed together, and their way through the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from irkit.kernels.cpu import library
from irkit.transformer import sweep as programs
from irkit.transformer.sweep import Packing

if TYPE_CHECKING:
    from irkit.engine.runtime import Runtime

TOKENS = 384
"""Packed tokens that one call computes; of long texts, as many as two of them have."""
_LENGTHS = 8
"""Lengths of texts are rounded up to a multiple, so that near ones share their programs."""
POINTS = {
    "hook_resid_pre": "pre",
    "attn.hook_z": "mid",
    "hook_attn_out": "mid",
    "hook_resid_mid": "mid",
    "hook_mlp_out": "post",
    "hook_resid_post": "post",
}
"""The hook points that can be patched, and where in its layer the stream then begins to differ."""


class Cell(NamedTuple):
    """One patched run."""

    layer: int
    positions: tuple[int, ...]
    """Those patched, in order."""
    head: int | None = None


@dataclass(frozen=True)
class Common:
    """The clean and the corrupt run: arrays `[2, position, ...]`, clean first, the positions rounded up."""

    length: int
    streams: list[jax.Array]
    """What enters each layer, and at last what leaves the last."""
    held: list[Sequence[jax.Array]]
    """Of each layer, the corrupt run's rotated keys, and values, `[position, kv_head, d_head]`."""
    kept: list[Mapping[str, jax.Array]]
    """Of each layer, by hook point."""

    @property
    def size(self) -> int:
        """The positions there is room for."""
        return self.streams[0].shape[1]

    def last(self) -> jax.Array:
        """What the two runs say after their last token, `[1, 2, d_model]`."""
        return self.streams[-1][None, :, self.length - 1]

    def value(self, point: str, layer: int) -> jax.Array:
        """What stands at a hook point."""
        if point in ("hook_resid_pre", "hook_resid_post"):
            return self.streams[layer + (point == "hook_resid_post")]
        if point == "hook_resid_mid":
            return self.streams[layer] + self.kept[layer]["hook_attn_out"]
        return self.kept[layer][point]


def read(runtime: Runtime, clean: Sequence[int], corrupt: Sequence[int]) -> Common:
    """Both runs, in one batch."""
    tokens = np.zeros((2, -(-len(clean) // _LENGTHS) * _LENGTHS), np.int32)
    tokens[:, : len(clean)] = clean, corrupt
    common = Common(len(clean), [run(runtime, programs.embed, runtime.params["embed"], tokens)], [], [])
    for layer in range(runtime.config.n_layers):
        arguments = runtime.block(layer), common.streams[-1], runtime.params["inv_freq"]
        found = run(runtime, programs.common_layer, *arguments, config=runtime.config)
        for values, value in zip((common.streams, common.held, common.kept), found, strict=True):
            values.append(value)
    return common


def is_corrupt(common: Common, point: str, cell: Cell, same: int) -> bool:
    """Whether the patched run is the corrupt one, since both have the same values there.

    Runs whose first `same` tokens are the same have so before them; and after the last layer's attention, only the
    last token matters.
    """
    beside = POINTS[point] != "pre" and cell.layer == len(common.kept) - 1
    at = [p for p in cell.positions if p >= same and not (beside and p < common.length - 1)]
    values = np.asarray(common.value(point, cell.layer))[:, at]
    clean, corrupt = values if cell.head is None else values[:, :, cell.head]
    return np.array_equal(clean, corrupt)


def sweep(
    runtime: Runtime, common: Common, point: str, cells: Sequence[Cell], measure: Callable[[Any], np.ndarray]
) -> np.ndarray:
    """What `measure` makes of the last token's stream `[1, run, d_model]` of each cell's run, `[cell]`."""
    n_layers, result = runtime.config.n_layers, np.zeros(len(cells), np.float32)
    # A run begins to differ inside this layer, or at the start of the one after it.
    entries = [cell.layer + (POINTS[point] == "post") for cell in cells]
    blocks = [runtime.block(layer) for layer in range(n_layers)]
    tables: dict[int, Any] = {}
    for group in _groups(cells, entries, common):
        first, beyond = entries[group[0]], entries[group[-1]] + 1
        tables = {i: tables.get(i) for i in range(first, beyond)}
        tables = {i: _table(runtime, common, point, i) if held is None else held for i, held in tables.items()}
        packing = jax.device_put(_pack([cells[i] for i in group], [entries[i] for i in group], common), runtime.at)
        resid: Any = np.zeros((1, len(packing.position), runtime.config.d_model), np.float32)
        for layer in range(first, n_layers):
            resid = run(
                runtime,
                programs.patched_layer,
                blocks[layer],
                resid,
                common.held[layer],
                tables[min(layer, beyond - 1)],
                np.array(layer, np.int32),
                packing,
                runtime.params["inv_freq"],
                config=runtime.config,
                enter="mid" if POINTS[point] == "mid" else "pre",
                last=layer == n_layers - 1,
            )
        if first == n_layers:
            resid = np.asarray(tables[first])[np.asarray(packing.source)[packing.last]][None]
        result[group] = measure(resid)[: len(group)]
    return result


def _groups(cells: Sequence[Cell], entries: Sequence[int], common: Common) -> Iterator[list[int]]:
    """The cells that are computed together, in the order of the layers; what differs behind the last for itself."""
    tokens, runs = _sizes(common)
    group: list[int] = []
    filled = 0
    for i in sorted(range(len(cells)), key=lambda i: entries[i]):
        count = common.length - cells[i].positions[0]
        beyond = group and entries[i] == len(common.kept) != entries[group[0]]
        if group and (filled + count > tokens or len(group) == runs or beyond):
            yield group
            group, filled = [], 0
        group.append(i)
        filled += count
    if group:
        yield group


def _sizes(common: Common) -> tuple[int, int]:
    """How many tokens, and how many runs, are packed together at most."""
    tokens = max(TOKENS, 2 * common.size)
    # Runs of short texts are often a few tokens long, where the texts differ only near their end.
    return tokens, (6 if common.size <= 64 else 2) * tokens // common.size


def _pack(cells: Sequence[Cell], entries: Sequence[int], common: Common) -> Packing:
    """Each run's tokens from the first patched position on, one run behind the other."""
    tokens, most = _sizes(common)
    runs = min(most, max(8, 1 << (len(cells) - 1).bit_length()))
    size, length = common.size, common.length
    position, entry, source, place = (np.zeros(tokens, np.int32) for _ in range(4))
    entry[:] = -1
    seen = np.tile(np.arange(size, dtype=np.int32), (runs, 1))
    query, last = np.zeros((runs, size), np.int32), np.zeros(runs, np.int32)
    first = np.ones(runs, np.int32)
    start = 0
    for row, (cell, layer) in enumerate(zip(cells, entries, strict=True)):
        own = np.arange(cell.positions[0], length)
        here = start + np.arange(len(own))
        alternative = 1 if cell.head is None else 1 + cell.head
        position[here], entry[here], place[here] = own, layer, row * size + own
        source[here] = own
        source[start + np.subtract(cell.positions, own[0])] += alternative * size
        seen[row, own], query[row, own], first[row], last[row] = size + here, here, here[0], here[-1]
        start += len(own)
    return Packing(position, entry, source, seen, query, place, first, last)  # pyright: ignore[reportArgumentType]


def _table(runtime: Runtime, common: Common, point: str, entry: int) -> Any:
    """The streams with which runs begin at layer `entry`: the corrupt one's, and those of each alternative."""
    layer = entry - (POINTS[point] == "post")
    pre, kept = np.asarray(common.streams[layer]), common.kept[layer]
    if point.startswith("hook_resid"):
        clean, corrupt = np.asarray(common.value(point, layer))
        alternatives = [corrupt, clean]
    elif point == "attn.hook_z":
        z = kept["attn.hook_z"]
        block = runtime.block(layer)
        changed = run(runtime, programs.with_heads, block["o"], block["o_bias"], pre[1], z[1], z[0])
        alternatives = [_mid(common, layer), *np.asarray(changed)]
    elif point == "hook_attn_out":
        alternatives = [_mid(common, layer), pre[1] + np.asarray(kept["hook_attn_out"][0])]
    else:
        corrupt = np.asarray(common.streams[layer + 1][1])
        alternatives = [corrupt, _mid(common, layer) + np.asarray(kept["hook_mlp_out"][0])]
    return jax.device_put(np.concatenate(alternatives), runtime.at)


def _mid(common: Common, layer: int) -> np.ndarray:
    """The corrupt run's stream between attention and MLP."""
    return np.asarray(common.streams[layer][1]) + np.asarray(common.kept[layer]["hook_attn_out"][1])


def difference(runtime: Runtime, resid: Any, token: int, other: int) -> np.ndarray:
    """The logit of `token` less that of `other`, of each run."""
    ids = np.array([[token, other]], np.int32)
    return np.asarray(run(runtime, programs.difference, *_final(runtime), resid, ids, config=runtime.config))


def logits(runtime: Runtime, resid: Any) -> np.ndarray:
    """The logits of each run, `[run, d_vocab]`."""
    return np.asarray(run(runtime, programs.logits, *_final(runtime), resid, config=runtime.config))


def _final(runtime: Runtime) -> tuple[Any, Any]:
    params = runtime.params
    return params["ln_final"], params["embed"] if params["unembed"] is None else params["unembed"]


def run(runtime: Runtime, function: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
    """`function`, compiled once for arguments of these shapes."""
    leaves, tree = jax.tree.flatten(arguments)
    sizes = tree, *((leaf.shape, leaf.dtype) for leaf in leaves)
    program = runtime._program(function, sizes, partial(tuple, arguments), **static)
    if runtime.packed:
        library.set_threads(runtime.threads)
    return program(*arguments)
