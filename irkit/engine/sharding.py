"""One model over several devices: which axis of each array is divided among them, for jax to do the rest.

The forward pass is the same program. Its arguments are laid out as in Megatron-LM (Shoeybi et al. 2019,
arXiv:1909.08053): a device has some of the heads with their keys and values, some of the MLP's columns and some of
the vocabulary. XLA finds from these where results must be summed or gathered, and adds that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from irkit.errors import BackendError
from irkit.transformer.cache import KVCache

if TYPE_CHECKING:
    from irkit.engine.backends import Selected
    from irkit.transformer.config import Config

# The axis that is divided, of matrices `[out, in]` and of their biases `[out]`.
_BY_HEADS = {"q": 0, "k": 0, "v": 0, "q_bias": 0, "k_bias": 0, "v_bias": 0, "o": 1}
_BY_COLUMNS = {"gate": 0, "up": 0, "gate_bias": 0, "up_bias": 0, "down": 1}
_BY_TOKENS = {"embed": 0, "unembed": 0}


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a model lie that several devices share."""

    mesh: Mesh
    config: Config

    def __repr__(self) -> str:
        return f"Layout({self.size} devices, process {jax.process_index()} of {jax.process_count()})"

    @property
    def size(self) -> int:
        """How many devices there are."""
        return self.mesh.size

    @property
    def here(self) -> bool:
        """Whether all of them belong to this process."""
        return self.whole.is_fully_addressable

    @cached_property
    def whole(self) -> NamedSharding:
        """Every device holds all of an array."""
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def cache(self) -> NamedSharding:
        """Of keys and values, `[b, kv_head, position, d_head]`."""
        return self._divided(1) if self.config.n_kv_heads % self.size == 0 else self.whole

    def parameters(self, shapes: Any) -> Any:
        """The shapes of the decoder's parameters, each with its place.

        What the devices do not divide evenly, each of them holds whole.
        """
        config, divided = self.config, dict[str, int]()
        for axes, count in (
            (_BY_HEADS, config.n_kv_heads),  # whose query heads go with them
            (_BY_COLUMNS, config.d_mlp),
            (_BY_TOKENS, config.d_vocab),
        ):
            divided |= axes if count % self.size == 0 else {}

        def place(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axis = divided.get(path[-1].key)
            where = self.whole if axis is None else self._divided(axis)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

        return jax.tree_util.tree_map_with_path(place, shapes)

    def _divided(self, axis: int) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "model"))

    def agreed(self, values: Any) -> Any:
        """Numpy arrays, whole on every device: those of the first process, where there are several.

        Each process draws its own seed, and one answer needs one.
        """
        if not self.here:
            values = multihost_utils.broadcast_one_to_all(values)
        return jax.tree.map(lambda value: put(value, self.whole), values)

    def arguments(self, examples: Any) -> Any:
        """What a program is compiled for: the shapes and places of its arguments, whole where nothing else is said."""

        def place(leaf: Any) -> jax.ShapeDtypeStruct:
            own = getattr(leaf, "sharding", None)
            where = own if isinstance(own, NamedSharding) else self.whole
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(place, examples)

    def results(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which leaves caches as they were laid out, and all else whole on every device."""

        def place(node: Any) -> Any:
            if not isinstance(node, KVCache):
                return jax.lax.with_sharding_constraint(node, self.whole)
            keys, values = jax.lax.with_sharding_constraint((node.keys, node.values), self.cache)
            return KVCache(keys, values, jax.lax.with_sharding_constraint(node.tokens, self.whole))

        @wraps(function)
        def placed(*arguments: Any) -> Any:
            return jax.tree.map(place, function(*arguments), is_leaf=lambda node: isinstance(node, KVCache))

        return placed


def layout(devices: int | None, config: Config, selected: Selected) -> Layout | None:
    """How a model lies on the first so many of a backend's devices, of all processes; None for one device.

    Raises:
        BackendError: there are not as many.
    """
    if devices is None:
        return None
    found = jax.devices(selected.device.platform)
    if len(found) < devices:
        hint = "; XLA_FLAGS=--xla_force_host_platform_device_count=N divides a CPU" if selected.name == "cpu" else ""
        raise BackendError(f"mesh {devices}: {selected.name} has {len(found)} device{'s' * (len(found) > 1)}{hint}")
    return Layout(Mesh(np.array(found[:devices]), ("model",)), config)


def put(value: np.ndarray, where: Any) -> jax.Array:
    """`value` on a device, or divided among several, of which each process fills its own."""
    if isinstance(where, NamedSharding):
        return jax.make_array_from_callback(value.shape, where, value.__getitem__)
    return jax.device_put(value, where)
