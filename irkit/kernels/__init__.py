"""The few operations that take the time, each behind one name.

`xla` holds the portable versions in plain `jax.numpy`: they run on every backend, have gradients, and are
what the faster ones in `cpu`, for packed weights, are tested against.
"""

from types import ModuleType
from typing import Any

from irkit.kernels import cpu, xla

__all__ = ["of"]


def of(matrix: Any) -> ModuleType:
    """The module whose functions read `matrix`: `cpu` for a packed one, `xla` for an array."""
    return cpu if isinstance(matrix, cpu.Packed) else xla
