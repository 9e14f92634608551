"""Kernels in C++ for the CPU, called from the compiled program through XLA's foreign function interface."""

from irkit.kernels.cpu.calls import (
    POINTS,
    Joined,
    Packed,
    attention,
    by_head,
    can_fuse,
    layer,
    layer_of_runs,
    linear,
    mlp,
    pattern,
    sample,
    take,
    top_k,
    unpacked,
)

__all__ = [
    "POINTS",
    "Joined",
    "Packed",
    "attention",
    "by_head",
    "can_fuse",
    "layer",
    "layer_of_runs",
    "linear",
    "mlp",
    "pattern",
    "sample",
    "take",
    "top_k",
    "unpacked",
]
