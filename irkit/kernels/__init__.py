"""The few operations that take the time, each behind one name.

`xla` holds the portable versions in plain `jax.numpy`: they run on every backend, have gradients, and are
what the faster ones in `cpu`, for packed weights, are tested against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax import Array

from irkit.kernels import cpu, xla

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["linear", "take"]


def take(matrix: Array | cpu.Packed, ids: Int[Array, "b t"]) -> Float[Array, "b t i"]:
    """The rows `ids` of a matrix, in float32; ids outside it are clipped to it."""
    return cpu.take(matrix, ids) if isinstance(matrix, cpu.Packed) else xla.take(matrix, ids)


def linear(x: Float[Array, "b t i"], weight: Array | cpu.Packed) -> Float[Array, "b t o"]:
    """`x` times the transposed `weight`, in float32."""
    return cpu.linear(x, weight) if isinstance(weight, cpu.Packed) else xla.linear(x, weight)
