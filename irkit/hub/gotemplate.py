"""Ollama's chat templates, which are Go's, as Jinja: those simple enough to be sure of.

The language is that of Go's text/template (https://pkg.go.dev/text/template); what the fields mean, and how a template
without `.Messages` is run once for each turn, is described in Ollama's docs/template.md.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ACTION = re.compile(r"\{\{(-(?=\s))?\s*(.*?)\s*((?<=\s)-)?\}\}", re.DOTALL)
_WORD = re.compile(r"""\s*(?:("(?:[^"\\\n]|\\["\\nrt])*")|([()])|(\$?\.[A-Za-z]*|[a-z]+))""")
_MENTION = re.compile(r"\{\{-?\s*(\.[A-Z]|\$\.|/\*|(if|range|with|else|end)\b)")
_RANGE = re.compile(r"range (?:\$[a-z]\w*, \$_ := |\$_, \$_ := )?\$?\.Messages")

_FIELDS = {".System": "system", "$.System": "system", ".Messages": "messages", "$.Messages": "messages"}
_OF_TURN = _FIELDS | {".Prompt": "prompt", ".Response": "response"}
_OF_MESSAGE = {name: value for name, value in _FIELDS.items() if name[0] == "$"} | {
    ".Role": "message.role",
    ".Content": "message.content",
}

# Each turn is a system message, a prompt and an answer, of which any may be missing; the last has no end yet.
_BY_TURNS = """{%%- macro turn(system, prompt, response, final) -%%}%s{%%- endmacro -%%}
{%%- set now = namespace(system="", prompt="", response="") -%%}
{%%- for message in messages -%%}
{%%- if message.role == "system" -%%}
{%%- if now.prompt or now.response -%%}{{ turn(now.system, now.prompt, now.response, false) }}
{%%- set now.prompt = "" -%%}{%%- set now.response = "" -%%}{%%- endif -%%}
{%%- set now.system = message.content -%%}
{%%- elif message.role == "user" -%%}
{%%- if now.response -%%}{{ turn(now.system, now.prompt, now.response, false) }}
{%%- set now.system = "" -%%}{%%- set now.response = "" -%%}{%%- endif -%%}
{%%- set now.prompt = message.content -%%}
{%%- elif message.role == "assistant" -%%}{%%- set now.response = message.content -%%}
{%%- endif -%%}
{%%- endfor -%%}
{{- turn(now.system, now.prompt, now.response, add_generation_prompt) -}}"""
_BY_MESSAGES = """{%%- set told = namespace(all="") -%%}
{%%- for message in messages if message.role == "system" -%%}
{%%- set told.all = told.all + ("\\n\\n" if told.all else "") + message.content -%%}
{%%- endfor -%%}
{%%- set system = told.all -%%}%s"""


class _BeyondError(Exception):
    """Something that this reader does not know, or whose meaning it is not sure of."""


@dataclass
class _Reader:
    """The pieces of a template (texts, and what stands in actions), read one after the other."""

    pieces: Iterator[tuple[str, bool]]
    answered: bool = False
    """Whether the field Response has been written: what follows it ends a turn, and the last one has no end."""

    def body(self, fields: dict[str, str], ends: Sequence[str]) -> tuple[str, str]:
        """The Jinja of everything up to an action that is one of `ends`, and that action."""
        out = []
        for piece, is_action in self.pieces:
            if not is_action:
                out.append(self._written(_quoted(piece)) if piece else "")
            elif piece.startswith("/*"):
                continue
            elif (word := piece.split(" ", 1)[0]) in ends:
                return "".join(out), piece
            elif word == "if":
                out.append(self._branches(piece, fields))
            elif word == "range" and _RANGE.fullmatch(piece):
                inner, _ = self.body(_OF_MESSAGE, ("end",))
                out.append(f"{{%- for message in messages -%}}{inner}{{%- endfor -%}}")
            else:
                out.append(self._written(_expression(piece, fields)))
                self.answered |= piece == ".Response"
        if ends:
            raise _BeyondError
        return "".join(out), ""

    def _branches(self, piece: str, fields: dict[str, str]) -> str:
        out, end = f"{{%- if {_expression(piece[2:], fields)} -%}}", piece
        while end != "end":
            inner, end = self.body(fields, ("else", "end"))
            out += inner
            if end.startswith("else if "):
                out += f"{{%- elif {_expression(end[7:], fields)} -%}}"
            elif end == "else":
                out += "{%- else -%}"
            elif end != "end":
                raise _BeyondError
        return out + "{%- endif -%}"

    def _written(self, value: str) -> str:
        return f"{{{{- {value} if not final else '' -}}}}" if self.answered else f"{{{{- {value} -}}}}"


def is_go(source: str) -> bool:
    """Whether a template is meant for Go, not for Jinja."""
    return "{%" not in source and _MENTION.search(source) is not None


def to_jinja(source: str) -> str | None:
    """A Go template of Ollama's as Jinja that writes the same; None if it is not simple enough to be sure of."""
    by_messages = ".Messages" in source
    if not by_messages and ".Response" not in source:
        source += "{{ .Response }}"
    reader = _Reader(_pieces(source))
    try:
        body, _ = reader.body(_FIELDS if by_messages else _OF_TURN, ())
    except _BeyondError:
        return None
    return (_BY_MESSAGES if by_messages else _BY_TURNS) % body


def _pieces(source: str) -> Iterator[tuple[str, bool]]:
    """Texts (False) and actions (True) in turn; a dash beside a brace takes the white space next to it away."""
    position, trim = 0, False
    for found in _ACTION.finditer(source):
        text = source[position : found.start()]
        text = text.lstrip() if trim else text
        yield (text.rstrip() if found[1] else text), False
        yield " ".join(found[2].split()) if '"' not in found[2] else found[2], True
        position, trim = found.end(), bool(found[3])
    yield (source[position:].lstrip() if trim else source[position:]), False


def _expression(source: str, fields: dict[str, str]) -> str:
    """A field, a string, or a function (eq, ne, and, or, not) of them, as Jinja."""
    words, position = [], 0
    source = source.strip()
    while position < len(source):
        found = _WORD.match(source, position)
        if not found:
            raise _BeyondError
        words.append(found[0].strip())
        position = found.end()
    value, rest = _call(words, fields)
    if rest:
        raise _BeyondError
    return value


def _call(words: list[str], fields: dict[str, str]) -> tuple[str, list[str]]:
    if not words or words[0] not in ("eq", "ne", "and", "or", "not"):
        return _operand(words, fields)
    name, rest, operands = words[0], words[1:], []
    while rest and rest[0] != ")":
        value, rest = _operand(rest, fields)
        operands.append(value)
    if name == "not" and len(operands) == 1:
        return f"(not {operands[0]})", rest
    if name in ("eq", "ne") and len(operands) == 2:
        return f"({operands[0]} {'==' if name == 'eq' else '!='} {operands[1]})", rest
    if name in ("and", "or") and len(operands) >= 2:
        return f"({f' {name} '.join(operands)})", rest
    raise _BeyondError


def _operand(words: list[str], fields: dict[str, str]) -> tuple[str, list[str]]:
    if not words:
        raise _BeyondError
    word, *rest = words
    if word == "(":
        value, rest = _call(rest, fields)
        if rest[:1] != [")"]:
            raise _BeyondError
        return value, rest[1:]
    if word.startswith('"'):
        return word, rest
    if word not in fields:
        raise _BeyondError
    return fields[word], rest


def _quoted(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(plain, escaped)
    return f'"{text}"'
