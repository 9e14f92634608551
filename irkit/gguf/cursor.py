"""Reading a GGUF file from front to back, where every number in it may be a lie."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from irkit.errors import ModelFileError

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")


def shown(name: str) -> str:
    """`name` in quotes for an error message: printable, and cut if it is long."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


@dataclass(slots=True)
class Cursor:
    """A position in the bytes of a file.

    Every method takes the words for what it reads, and raises `ModelFileError` with them if the file is too
    short for it. No method allocates more than the bytes it has checked to be there.
    """

    path: Path
    data: memoryview
    position: int = 0

    def error(self, where: str, at: int, problem: str) -> ModelFileError:
        """The error to raise for a `problem` with what starts at byte `at`."""
        return ModelFileError(f"{self.path}: {where} (byte {at}): {problem}")

    @property
    def left(self) -> int:
        """Bytes from the position to the end of the file."""
        return len(self.data) - self.position

    def skip(self, size: int, where: str) -> int:
        """Moves past `size` bytes, and returns where they start."""
        if size > self.left:
            raise self.error(where, self.position, f"it takes {size} bytes, but only {self.left} are left")
        start = self.position
        self.position += size
        return start

    def number(self, kind: struct.Struct, where: str) -> int:
        """Reads the one number that `kind` describes."""
        return kind.unpack_from(self.data, self.skip(kind.size, where))[0]

    def count(self, smallest: int, where: str) -> int:
        """Reads how many items follow; the file must have room for them at `smallest` bytes each."""
        start = self.position
        count = self.number(U64, where)
        if count * smallest > self.left:
            raise self.error(where, start, f"{count} items cannot fit in the {self.left} bytes that follow")
        return count

    def string(self, where: str) -> str:
        """Reads a length and that many bytes of text; bytes that are not UTF-8 become U+FFFD."""
        size = self.number(U64, where)
        start = self.skip(size, where)
        return str(self.data[start : start + size], "utf-8", "replace")

    def skip_strings(self, count: int, where: str) -> None:
        """Moves past `count` strings."""
        # Vocabularies run to 262,144 strings: this is most of the time that opening a file takes.
        done = 0
        while left := count - done:
            starts = string_starts(self.data[self.position :][:_AT_ONCE])[: left + 1]
            if len(starts) < _FEWEST:
                break
            done += len(starts) - 1
            self.position += int(starts[-1])
        data, size, position, unpack = self.data, len(self.data), self.position, U64.unpack_from
        for index in range(done, count):
            start = position
            if start + U64.size > size or (position := start + U64.size + unpack(data, start)[0]) > size:
                raise self.error(f"{where}, string {index}", start, "it reaches past the end of the file")
        self.position = position


# Bytes that `skip_strings` looks at together, and strings it must find in them for that to be quicker than one by one.
_AT_ONCE, _FEWEST = 1 << 15, 64


def string_starts(data: memoryview) -> npt.NDArray[np.intp]:
    """Where, in bytes that begin with a string, the first strings start: as many as are easily found.

    Each but the last is a whole string, and the next one starts where it ends. They are found by the seven bytes of
    zero in the length of a string that has less than 256.
    """
    zero = (raw := np.frombuffer(data, np.uint8)) == 0
    last = len(raw) - U64.size + 1
    if last <= 0:
        return np.zeros(0, np.intp)
    upper = zero[1 : last + 1].copy()
    for byte in range(2, U64.size):
        upper &= zero[byte : last + byte]
    starts = np.flatnonzero(upper)
    follows = starts[1:] == starts[:-1] + U64.size + raw[starts[:-1]]
    sound = len(follows) if follows.all() else int(follows.argmin())
    return starts[: sound + 1] if len(starts) and starts[0] == 0 else starts[:0]
