"""The bounds on what one rendering of a chat template may use up: the size of values, their number, and time."""

import re
import time
from collections.abc import ItemsView, KeysView, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

from irkit.errors import ModelFileError
from irkit.tokenizer.marked import Marks

# Characters (and list items) that one value may have whatever is given, and how that grows with what is given:
# JSON written with indents, say, takes several times the characters.
_VALUE_LIMIT = 1 << 18
_VALUE_GROWTH = 8
# All values made in one rendering, in units of the largest one.
_TOTAL_LIMIT = 64
_SECONDS = 1.0
_SECONDS_GROWTH = 2e-6
_LARGEST_INTEGER_BITS = 1024
_VIEWS = KeysView | ValuesView | ItemsView
# A width or precision in a %-format that is variable or over 999, or a name in parentheses that hides one.
_HUGE_FORMAT = re.compile(r"%(\([^()]*\))?+[#0 +-]*+(\d*\.)?(\d{4}|\*|\()")


class BoundsError(ModelFileError):
    """A chat template takes more time or space than chat templates do."""


class Rendering:
    """What one rendering may still use; every method raises `BoundsError` where it goes beyond that."""

    def __init__(self, given: dict[str, Any], marks: Marks | None) -> None:
        """Sets bounds for a template that sees `given`, JSON values in which `marks` are used."""
        self.marks = marks
        # The template cannot change what is given, so it needs to be gone through only once.
        self._known: dict[int, int] = {}
        size = self._learn(given)
        self._limit = _VALUE_LIMIT + _VALUE_GROWTH * size
        self._left = _TOTAL_LIMIT * self._limit
        self._seconds = _SECONDS + _SECONDS_GROWTH * size
        # Processor time of this thread, so that a busy machine does not fail a good template.
        self._deadline = time.thread_time() + self._seconds

    def tick(self) -> None:
        """Looks at the time."""
        if time.thread_time() > self._deadline:
            raise BoundsError(f"the chat template runs for more than {self._seconds:.1f} seconds")

    def charge(self, size: int) -> None:
        """Takes note of a value of `size` characters that is made, or about to be."""
        self.tick()
        self._left -= size
        if self._left < 0:
            raise BoundsError("the chat template makes too much text on its way")
        self.allow(size)

    def allow(self, size: int) -> None:
        """Checks that one value may have `size` characters."""
        if size > self._limit:
            raise BoundsError(f"the chat template makes more than {self._limit} characters at once")

    def weigh(self, value: Any) -> int:
        """Characters and items of a value, counting what is there twice twice, as writing it out would."""
        total = 0
        waiting = [value]
        while waiting:
            item = waiting.pop()
            total += 1
            if isinstance(item, str):
                total += len(item)
            elif (known := self._known.get(id(item))) is not None:
                total += known
            elif isinstance(item, dict):
                waiting += item.keys()
                waiting += item.values()
            elif isinstance(item, list | tuple | _VIEWS):
                waiting += item
            elif isinstance(item, Namespace):
                # What it holds may change after it was measured.
                raise BoundsError("the chat template uses a namespace as a value")
            if total + len(waiting) > self._limit:
                self.allow(total + len(waiting))
        return total

    def keep(self, value: Any) -> Any:
        """`value`, measured, and with its stand-ins recognised."""
        if isinstance(value, str):
            self.charge(len(value))
            return self.marks.adopt(value) if self.marks and type(value) is str else value
        if isinstance(value, list | tuple | dict | _VIEWS):
            self.charge(self.weigh(value))
        elif isinstance(value, int):
            self.check_integer(value.bit_length())
        self.tick()
        return value

    def check(self, value: Any) -> Any:
        """`value`, if writing it out or going through it is bounded."""
        if isinstance(value, list | tuple | dict | Namespace | _VIEWS):
            self.weigh(value)
        return value

    def check_integer(self, bits: int) -> None:
        """Checks that an integer may have so many bits."""
        if bits > _LARGEST_INTEGER_BITS:
            raise BoundsError("the chat template computes with huge numbers")

    def check_replace(self, text: str, old: str, new: str, count: int = -1) -> None:
        """Checks what `text.replace(old, new, count)` would make."""
        times = text.count(old) if count < 0 else min(count, text.count(old))
        self.charge(len(text) + times * len(new))

    def check_format(self, format: str, arguments: Any) -> None:
        """Checks what `format % arguments` would make."""
        if _HUGE_FORMAT.search(format):
            raise BoundsError("the chat template formats with a huge or variable width")
        self.check_repeated(format, "%", arguments)

    def check_repeated(self, format: str, sign: str, arguments: Any) -> None:
        """Checks what `format` would make if it wrote all the arguments wherever the sign is."""
        self.charge(len(format) + format.count(sign) * self.weigh(arguments))

    def _learn(self, value: Any) -> int:
        if isinstance(value, str):
            return 1 + len(value)
        if isinstance(value, dict):
            weight = sum(1 + len(key) + self._learn(item) for key, item in value.items())
        elif isinstance(value, list):
            weight = sum(map(self._learn, value))
        else:
            return 1
        self._known[id(value)] = weight
        return 1 + weight


rendering: ContextVar[Rendering] = ContextVar("rendering")
