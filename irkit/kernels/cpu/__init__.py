"""Kernels in C++ for the CPU, called from the compiled program through XLA's foreign function interface."""

from irkit.kernels.cpu.calls import Joined, Packed, attention, by_head, can_fuse, layer, linear, sample, take, top_k

__all__ = ["Joined", "Packed", "attention", "by_head", "can_fuse", "layer", "linear", "sample", "take", "top_k"]
