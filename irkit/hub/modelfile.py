"""Ollama's Modelfile: from what a model is made, and with what.

The format is described in Ollama's docs/modelfile.md.
"""

import re
from dataclasses import dataclass
from typing import Any

from irkit.errors import OptionError

_BETWEEN = re.compile(r"(?:\s|#[^\n]*)*")
_WORD = re.compile(r"(\S+)[ \t]*")
_VALUE = re.compile(r'(?:"""(.*?)"""|"([^"\n]*)"|([^\n]*?))[ \t\r]*(?:\n|\Z)', re.DOTALL)
_REFUSED = {
    "ADAPTER": "adapters are not supported",
    "MESSAGE": "messages that begin every conversation are not supported",
}
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says; `source` is a path or a model's name, `options` holds words, as they stand there."""

    source: str
    template: str | None
    system: str | None
    options: dict[str, str | list[str]]
    license: str | None


def read_modelfile(text: str) -> Modelfile:
    """Reads a Modelfile's text.

    Raises:
        OptionError: it has no FROM, or an instruction that is unknown, incomplete or not supported; the message names
            the line.
    """
    if len(text) > _LONGEST:
        raise OptionError(f"the Modelfile has {len(text)} characters, more than the {_LONGEST} allowed")
    found: dict[str, str] = {}
    options: dict[str, str | list[str]] = {}
    position = _after(_BETWEEN, text, 0)
    while position < len(text):
        where = f"line {text.count(chr(10), 0, position) + 1} of the Modelfile"
        word = _matched(_WORD, text, position)
        instruction, position = word[1].upper(), word.end()
        if instruction in _REFUSED:
            raise OptionError(f"{where}: {_REFUSED[instruction]}")
        if instruction not in ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "LICENSE", "REQUIRES"):
            raise OptionError(f"{where}: there is no instruction {word[1][:40]!r}")
        name = ""
        if instruction == "PARAMETER":
            word = _matched(_WORD, text, position)
            name, position = word[1].lower(), word.end()
        value = _matched(_VALUE, text, position)
        content: str = next(part for part in value.groups() if part is not None)
        if value[3] is not None and (not content or content.startswith('"""')):
            raise OptionError(f"{where}: {instruction} {'is not ended' if content else 'has no value'}")
        position = _after(_BETWEEN, text, value.end())
        if name == "stop":
            options["stop"] = [*options.get("stop", []), content]
        elif name:
            options[name] = content
        elif instruction == "LICENSE" and "LICENSE" in found:
            found["LICENSE"] += f"\n\n{content}"
        else:
            found[instruction] = content
    if "FROM" not in found:
        raise OptionError("the Modelfile has no FROM, which names a model or a file")
    return Modelfile(found["FROM"], found.get("TEMPLATE"), found.get("SYSTEM"), options, found.get("LICENSE"))


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    return _matched(pattern, text, position).end()


def _matched(pattern: re.Pattern[str], text: str, position: int) -> Any:
    """The match of a pattern; one that cannot match is an instruction without its words, at the end."""
    found = pattern.match(text, position)
    if found is None:
        raise OptionError("the last line of the Modelfile is not complete")
    return found
