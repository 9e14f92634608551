"""The few operations that take the time, each behind one name.

`xla` holds the portable versions in plain `jax.numpy`: they run on every backend, have gradients, and are
what any faster version is tested against.
"""

from irkit.kernels.xla import attention, linear

__all__ = ["attention", "linear"]
