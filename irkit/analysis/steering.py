"""Steering vectors: a direction in the residual stream, as what tells two kinds of text apart there.

The difference of the streams of two contrasting prompts, added while an answer is made, moves the answer towards the
first: Turner et al., "Activation Addition" (2023), arXiv:2308.10248; of the means over several prompts, Panickssery et
al., "Steering Llama 2 via Contrastive Activation Addition" (2023), arXiv:2312.06681.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from irkit.edits import Chosen, Edit, steer
from irkit.errors import OptionError

if TYPE_CHECKING:
    from irkit.session import Session


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the stream that leaves a layer."""

    vector: np.ndarray
    """float32 `[d_model]`: what the first texts have there and the second have not."""
    layer: int
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    scale: float
    """The length of the stream that the vector was found in: the mean over the texts' positions."""

    def edit(self, strength: float = 1.0, layers: Chosen = None, positions: Chosen = None) -> Edit:
        """`strength` times the vector, added to the stream that leaves its layer, or those of `layers`."""
        return steer(self.vector, self.layer if layers is None else layers, strength, positions)

    def __str__(self) -> str:
        part = np.linalg.norm(self.vector) / self.scale
        return (
            f"{' / '.join(self.positive)} − {' / '.join(self.negative)}, layer {self.layer}: {part:.0%} of the stream"
        )


def steering_vector(
    session: Session,
    positive: str | Sequence[str],
    negative: str | Sequence[str],
    layer: int,
    pooling: Literal["mean", "last"] = "mean",
) -> SteeringVector:
    """The difference between the mean streams of two kinds of text, where they leave `layer`.

    A text stands for itself by the mean over its positions but the first, on which attention rests and whose stream is
    many times as long as any other; or by its last.

    Raises:
        ContextFullError: a text does not fit the context.
        OptionError: there is no such layer, or a side has no text.
    """
    if pooling not in ("mean", "last"):
        raise OptionError(f"pooling: {pooling!r} is neither 'mean' nor 'last'")
    sides = [[side] if isinstance(side, str) else list(side) for side in (positive, negative)]
    for name, side in zip(("positive", "negative"), sides, strict=True):
        if not side:
            raise OptionError(f"{name}: there is no text")
    texts = [text for side in sides for text in side]
    trace = session.trace(texts, names="resid_post", layers=layer, logits="none")
    (held,) = trace.layers("resid_post")
    streams = [trace.row(row)["resid_post", held][0] for row in range(len(texts))]
    kept = [stream[-1:] if pooling == "last" else stream[1:] if len(stream) > 1 else stream for stream in streams]
    means = np.stack([stream.mean(axis=0) for stream in kept])
    many = len(sides[0])
    vector = means[:many].mean(axis=0) - means[many:].mean(axis=0)
    length = float(np.linalg.norm(np.concatenate(kept), axis=1).mean())
    return SteeringVector(vector, held, tuple(sides[0]), tuple(sides[1]), length)
