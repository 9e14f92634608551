"""Model families: how a file's metadata becomes a `Config`, and its tensors the decoder's parameters.

A family is a module with two functions, `config(file) -> Config` and `weights(config) -> tree of Weight`.
It refuses settings that it does not understand, rather than run a model wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from irkit.errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    from irkit.gguf import File
    from irkit.gguf.reader import TensorInfo
    from irkit.transformer.config import Config


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a parameter of the decoder comes from."""

    name: str
    """Of the tensor in the file; of the parameter itself, where it is derived."""
    shape: tuple[int, ...]
    """In numpy's order: `[out, in]` for a matrix."""
    paired_heads: int = 0
    """Not 0 for the query and key matrices of files that lay out rotary pairs next to each other: the
    number of heads. Their rows are brought back to Hugging Face's order, in which i pairs with i + d/2."""
    optional: bool = False
    derive: Callable[[File], np.ndarray] | None = None
    """How to work it out, where it is not simply a tensor of the file."""

    def is_in(self, file: File) -> bool:
        """Whether the model has this parameter."""
        return not self.optional or self.name in file.tensors


def family(file: File) -> ModuleType:
    """The module for the file's `general.architecture`.

    Raises:
        UnsupportedModelError: there is none; the message names those that there are.
    """
    from irkit.families import llama

    families = {"llama": llama}
    architecture = file.metadata.value("general.architecture", str)
    if architecture not in families:
        raise UnsupportedModelError(
            f"{file.path}: architecture {architecture!r} is not supported; supported are {', '.join(sorted(families))}"
        )
    return families[architecture]


def read_config(file: File) -> Config:
    """The model's shape, from the file's metadata.

    Raises:
        UnsupportedModelError: the family or one of its settings is not supported.
        ModelFileError: a key is missing or makes no sense.
    """
    return family(file).config(file)


def weights(file: File, config: Config) -> dict[str, Any]:
    """The tree of the decoder's parameters, each a `Weight`."""
    return family(file).weights(config)


def tensor(file: File, weight: Weight) -> TensorInfo:
    """The tensor that a parameter is read from.

    Raises:
        ModelFileError: it is missing or has another shape.
    """
    info = file.tensor(weight.name)
    if info.shape != weight.shape:
        raise ModelFileError(
            f"{file.path}: tensor {weight.name!r} has shape {list(info.shape)}, not {list(weight.shape)}"
        )
    return info


def read_weight(file: File, weight: Weight, out: np.ndarray | None = None) -> np.ndarray | None:
    """The parameter as float32 numpy array, in `out` if given; None where it is optional and not in the file.

    Raises:
        ModelFileError: the tensor is missing or has another shape.
        UnsupportedModelError: its format is not supported.
    """
    if weight.derive is not None:
        return weight.derive(file)
    if not weight.is_in(file):
        return None
    info = tensor(file, weight)
    if not weight.paired_heads:
        return file.dequantize(weight.name, out)
    from irkit import gguf

    # Blocks run along a row, so whole packed rows can change places.
    rows = file.raw(weight.name).reshape(weight.shape[0], -1)
    return gguf.dequantize(rows[unpaired_rows(weight)].reshape(-1), info.format, weight.shape, out)


def unpaired_rows(weight: Weight) -> np.ndarray:
    """For each row of a query or key matrix in Hugging Face's order, its row in the file."""
    return np.arange(weight.shape[0]).reshape(weight.paired_heads, -1, 2).swapaxes(1, 2).reshape(-1)
