"""What an answer is made of: thinking, content and calls of tools, told apart while its text comes.

Models write these in the forms that their chat templates show them:

- thinking before the answer: `<think>...</think>` (Qwen, DeepSeek), `[THINK]...[/THINK]` (Mistral);
- calls in tags: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen), or a list of them;
- calls behind a token: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, `[TOOL_CALLS]name[ARGS]{...}` (Mistral);
- calls that are the whole answer: `{"name": ..., "parameters": {...}}`, also behind `<|python_tag|>` (Llama 3).
"""

import itertools
import json
import re
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# What opens calls, and what closes them, if anything does. A brace opens them at the beginning of an answer only.
_CALLS = {"<tool_call>": "</tool_call>", "[TOOL_CALLS]": None, "<|python_tag|>": None, "{": None}
MARKERS = frozenset({"[ARGS]", "[CALL_ID]", *_CALLS, *_CALLS.values(), *itertools.chain(*_THINKING)} - {"{", None})
"""The texts that set the parts of an answer off. Where one is a control token, its name is a part of the text."""

_NAME = re.compile(r"\s*([\w.-]{1,128})(?:\[CALL_ID\][\w-]{1,64})?(?:\[ARGS\])?\s*(?=\{)")
_LONGEST_NAME = 256
_JSON_PARTS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)


@dataclass(frozen=True)
class Content:
    """A piece of what is said to the user."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """A piece of what is thought before it."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, whole; `arguments` are JSON values by name."""

    name: str
    arguments: dict[str, Any]


Part: TypeAlias = Content | Thinking | ToolCall
_Waiting: TypeAlias = Generator[None, None, Any]


@dataclass(frozen=True)
class Forms:
    """The forms of a template's answers: the texts around thinking, if its models think, and those that open calls."""

    thinking: tuple[str, str] | None = None
    calls: tuple[str, ...] = ()


def forms_of(source: str) -> Forms:
    """The forms in which a chat template writes earlier answers, and so those of the answers it leads to."""
    thinking = next((tags for tags in _THINKING if tags[1] in source), None)
    calls = tuple(opening for opening in _CALLS if opening != "{" and opening in source)
    if calls in ((), ("<|python_tag|>",)) and re.search(r"""["']parameters\\?["']""", source):
        calls = (*calls, "{")
    return Forms(thinking, calls)


class AnswerReader:
    """Tells the parts of one answer apart: `push` its text as it comes, `flush` at the end.

    However the text is divided, the parts are the same, but for how content and thinking are cut up. What turns out to
    be no call is content, as it stands. White space around thinking, and around calls, is no part of anything.
    """

    def __init__(self, forms: Forms, tools: Collection[str] = (), *, thinking: bool = False) -> None:
        """Begins to read an answer.

        Args:
            forms: Those of its template.
            tools: The names of the tools that were offered; without any, calls are content.
            thinking: Whether the prompt has opened the thinking already.
        """
        self._tags = forms.thinking
        self._begun = thinking and forms.thinking is not None
        self._tools = tools
        self._openings = forms.calls if tools else ()
        self._text = ""
        self._ended = False
        self._parts: list[Part] = []
        self._reading = self._answer()

    def push(self, text: str) -> list[Part]:
        """The parts that are known with this text."""
        self._text += text
        return self._read()

    def flush(self) -> list[Part]:
        """The parts that were held back, when no more text will come."""
        self._ended = True
        return self._read()

    def _read(self) -> list[Part]:
        next(self._reading, None)
        parts, self._parts = self._parts, []
        return parts

    # Below, a bare `yield` waits for more text; once the text has ended, nothing does.

    def _answer(self) -> _Waiting:
        if self._tags and (self._begun or (yield from self._next(self._tags[0]))):
            yield from self._think(*self._tags)
        while self._text or not self._ended:
            opening = yield from self._next(*self._openings)
            if not (opening and (yield from self._call(opening))):
                yield from self._say()

    def _think(self, opening: str, closing: str) -> _Waiting:
        if not self._begun:
            self._text = self._text.lstrip()[len(opening) :]
        yield from self._skip_space()
        while (place := self._text.find(closing)) < 0 and not self._ended:
            self._emit(Thinking, len(self._text[: len(self._text) - overlap(self._text, closing)].rstrip()))
            yield
        thought, _, self._text = self._text.partition(closing) if place >= 0 else (self._text, "", "")
        if thought := thought.rstrip():
            self._parts.append(Thinking(thought))
        yield from self._skip_space()

    def _say(self) -> _Waiting:
        """Content, up to the next text that opens calls."""
        openings = [opening for opening in self._openings if opening != "{"]
        while True:
            places = [place for opening in openings if (place := self._text.find(opening)) >= 0]
            held = 0 if self._ended else max((overlap(self._text, opening) for opening in openings), default=0)
            self._emit(Content, min(places, default=len(self._text) - held))
            if places or self._ended:
                return
            yield

    def _call(self, opening: str) -> Generator[None, None, bool]:
        """Calls behind `opening`, which the text goes on with; False, and it is content, if there are none."""
        closing = _CALLS[opening]
        start = self._text.index(opening) + (len(opening) if opening != "{" else 0)
        between = [text for text in (closing, *self._openings, "{", "[", ";", ",") if text]
        called = False
        while found := (yield from self._value(opening, start)):
            calls, end = found
            self._parts += calls
            self._text, called = self._text[end:], True
            follows = yield from self._next(*between)
            start = self._text.index(follows) if follows else 0
            if follows and follows == closing:
                self._text = self._text[start + len(follows) :]
            if follows not in ("{", "[", ";", ","):
                break
            start += follows in (";", ",")
        if called:
            yield from self._skip_space()
        else:
            self._emit(Content, max(start, self._text.index(opening) + 1))
        return called

    def _value(self, opening: str, start: int) -> Generator[None, None, tuple[list[ToolCall], int] | None]:
        """The calls that the JSON at `start` makes, and its end; None if it makes none."""
        while not (begins := self._text[start:].lstrip()) and not self._ended:
            yield
        name = None
        if opening == "[TOOL_CALLS]" and begins[:1] not in ("[", "{"):
            while not (named := _NAME.match(self._text, start)):
                if self._ended or "{" in self._text[start:] or len(self._text) - start > _LONGEST_NAME:
                    return None
                yield
            name, start = named[1], named.end()
        elif begins[:1] not in ("[", "{"):
            return None
        end = yield from self._end_of_json(start)
        value = _json(self._text[start:end]) if end else None
        calls = _calls_in({"name": name, "arguments": value} if name else value)
        # An answer in JSON may have a name in it, too.
        known = opening != "{" or all(call.name in self._tools for call in calls)
        return (calls, end) if end and calls and known else None

    def _end_of_json(self, place: int) -> Generator[None, None, int | None]:
        """Where the JSON list or object at `place` ends; None if it does not."""
        depth, quoted = 0, False
        while True:
            for part in _JSON_PARTS.finditer(self._text, place):
                place = part.end()
                if part[0] == '"':
                    quoted = not quoted
                elif not quoted and len(part[0]) == 1:
                    depth += 1 if part[0] in "{[" else -1
                    if not depth:
                        return place
            if self._ended:
                return None
            place = max(place, len(self._text) - self._text.endswith("\\"))  # what it escapes is still to come
            yield

    def _next(self, *texts: str) -> Generator[None, None, str | None]:
        """Which of `texts` comes next, behind white space, once that is sure: the longest of them."""
        while True:
            rest = self._text.lstrip()
            if self._ended or not any(len(text) > len(rest) and text.startswith(rest) for text in texts):
                return max((text for text in texts if rest.startswith(text)), key=len, default=None)
            yield

    def _skip_space(self) -> _Waiting:
        while not (text := self._text.lstrip()) and not self._ended:
            yield
        self._text = text

    def _emit(self, kind: type[Content] | type[Thinking], end: int) -> None:
        if end > 0:
            self._parts.append(kind(self._text[:end]))
            self._text = self._text[end:]


def overlap(text: str, wanted: str) -> int:
    """The length of the longest ending of `text` that is a beginning of `wanted`, but not all of it."""
    longest = min(len(text), len(wanted) - 1)
    return next((n for n in range(longest, 0, -1) if wanted.startswith(text[-n:])), 0)


def _calls_in(value: Any) -> list[ToolCall]:
    """The calls that a JSON value stands for; none if any part of it is something else."""
    calls = []
    for item in value if isinstance(value, list) else [value]:
        made = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(made, Mapping) or not isinstance(name := made.get("name"), str) or not name:
            return []
        arguments = made.get("arguments", made.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(name, arguments))
    return calls


def _json(text: str) -> Any:
    """The JSON value in `text`, whose strings may hold line ends; None if it is none that could be sent on."""
    try:
        value = json.loads(text, strict=False, parse_constant=float)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return value
