"""Text that remembers which of its characters came from outside, through whatever a template does with it.

In a chat prompt the template's own `<|im_end|>` is a control token, while the same characters in a user's
message are just characters. In the finished prompt the two look alike. So before a template sees a message,
the characters that control tokens are made of are replaced by stand-ins, one for one: private-use characters
that no given text holds. Text made in any way, even by C code that knows nothing of this, then still carries
the stand-ins, and what carries them cannot be read as a control token. `_Marked` is the other half: a `str` that
answers questions (`==`, `in`, `startswith`, ...) and takes orders (`strip`, `split`, ...) as the real text would,
so that the template takes the same path as ever.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from irkit.errors import OptionError

# Left alone, as JSON and trimming treat them in their own ways.
_UNMARKED = frozenset('"\\')
_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Marks:
    """The stand-ins of one rendering."""

    def __init__(self, names: Iterable[str], texts: Iterable[str]) -> None:
        """Chooses stand-ins for the characters of `names` (of control tokens) that none of `texts` holds.

        Raises:
            OptionError: If the texts use up the private-use characters.
        """
        taken = frozenset().union(*texts)
        wanted = sorted(c for c in frozenset().union(*names) - _UNMARKED if not c.isspace())
        free = (code for code in itertools.chain(*_PRIVATE_USE) if chr(code) not in taken)
        self._mark = dict(zip(map(ord, wanted), map(chr, free), strict=False))
        if len(self._mark) < len(wanted):
            raise OptionError("the messages hold every private-use character there is, and none can be a stand-in")
        self._unmark = {ord(stand_in): chr(code) for code, stand_in in self._mark.items()}
        self._codes = np.array(sorted(self._unmark), np.uint32)

    def mark(self, text: str) -> str:
        """`text` with all of it marked as coming from outside."""
        return self.adopt(text.translate(self._mark))

    def adopt(self, text: str) -> str:
        """`text`, as `_Marked` if it holds stand-ins."""
        # Stand-ins are not ASCII, so most text is told apart without looking at it.
        if isinstance(text, _Marked) or text.isascii():
            return text
        real = self.real(text)
        return text if real == text else _Marked(text, real, self)

    def real(self, text: str) -> str:
        """`text` with the real characters in place of the stand-ins."""
        return str.translate(text, self._unmark)

    def apply(self, function: Callable[[str], Any], text: str) -> Any:
        """What `function` makes of the real text: marked as a whole if it is text, and `text` held stand-ins."""
        real = self.real(text)
        result = function(real)
        return self.mark(result) if isinstance(result, str) and str.__ne__(real, text) else result

    def marked(self, text: str) -> bytes:
        """One byte for each character of `text`: 1 for a stand-in, else 0."""
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        return np.isin(codes, self._codes).astype(np.uint8).tobytes()


class _Marked(str):
    """A string that holds stand-ins, and behaves as the `real` one.

    What is cut out of it, or written in another case, keeps its marks character by character; what is made of
    it otherwise is marked as a whole.
    """

    _real: str
    _marks: Marks

    def __new__(cls, text: str, real: str, marks: Marks) -> "_Marked":
        self = super().__new__(cls, text)
        self._real = real
        self._marks = marks
        return self

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return self._marks.mark(repr(self._real))

    def __getitem__(self, key: Any) -> str:
        return self._marks.adopt(super().__getitem__(key))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(self._real.lstrip(_real(chars))) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(self._real.rstrip(_real(chars)))]

    def strip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(self._real.lstrip(_real(chars))) : len(self._real.rstrip(_real(chars)))]

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(self) - len(self._real.removeprefix(_real(prefix))) :]

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(self._real.removesuffix(_real(suffix)))]

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return self._cut(self._real.split(_real(sep), maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return self._cut(self._real.rsplit(_real(sep), maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._cut(self._real.splitlines(keepends=True), 0)
        wanted = self._real.splitlines(keepends)
        return [line[: len(text)] for line, text in zip(lines, wanted, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, sep, after = self._cut(self._real.partition(_real(sep)), 0)
        return before, sep, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, sep, after = self._cut(self._real.rpartition(_real(sep)), 0)
        return before, sep, after

    def replace(self, old: str, new: str, count: Any = -1, /) -> str:
        if not old:
            return self._marks.mark(self._real.replace("", _real(new), count))
        return self._marks.adopt(str.join(new, self.split(old, count)))

    def _cut(self, pieces: Iterable[str], gap: int | None) -> list[str]:
        """Our own parts at the places of `pieces`: `gap` characters apart, or by any white space if None."""
        parts = []
        start = 0
        for piece in pieces:
            if gap is None:
                start = self._real.index(piece, start)
            stop = start + len(piece)
            parts.append(self[start:stop])
            start = stop + (gap or 0)
        return parts


def _real(value: Any) -> Any:
    if isinstance(value, _Marked):
        return value._real
    return tuple(map(_real, value)) if isinstance(value, tuple) else value


def _asked_of_real(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def ask(self: _Marked, *args: Any) -> Any:
        return method(self._real, *map(_real, args))

    return ask


def _changed_in_case(name: str) -> Callable[..., str]:
    method = getattr(str, name)

    def make(self: _Marked) -> str:
        made = method(self._real)
        changed = [method(character) for character in self._real]
        if "".join(changed) != made:
            # Where case depends on the neighbours, as in a title.
            changed = list(made)
        if len(changed) != len(self):
            return self._marks.mark(made)
        flags = self._marks.marked(self)
        parts = (self._marks.mark(new) if flag else new for new, flag in zip(changed, flags, strict=True))
        return self._marks.adopt("".join(parts))

    return make


for _name in (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__contains__", "startswith", "endswith",
    "find", "rfind", "index", "rindex", "count", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
    "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper",
):  # fmt: skip
    setattr(_Marked, _name, _asked_of_real(_name))
for _name in ("upper", "lower", "title", "capitalize", "casefold", "swapcase"):
    setattr(_Marked, _name, _changed_in_case(_name))
