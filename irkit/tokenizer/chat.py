"""Chat templates: a conversation as the text, or the token ids, that a model was trained to answer."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, TypeAlias

from irkit.errors import ModelFileError, OptionError
from irkit.tokenizer.answers import AnswerReader, Forms, forms_of
from irkit.tokenizer.marked import Marks
from irkit.tokenizer.tokenizer import Tokenizer

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Roles that a template may build a control token from, as in '<|' + role + '|>'. Any other role is user text.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "model", "ipython", "observation"})
_DEEPEST = 64
_PROBE = "irkitprobe"
_QUESTION: Json = [{"role": "user", "content": "."}]
_NO_PARAMETERS: Json = {"type": "object", "properties": {}, "required": []}
# By which templates are told whether to think: Qwen's, and DeepSeek's and Granite's.
_THINK_SWITCHES = ("enable_thinking", "thinking")


class ChatTemplate:
    """The chat template of a model: Jinja source, run in a sandbox that bounds its time and memory.

    What a template cannot do is done for it, as in llama.cpp: if it refuses or drops the system role, the system
    message is put before the text of the first user message, on a line of its own; and the role `developer`
    is called `system` if the template does not know it.

    Without a template, the conversation is written as `role: content` paragraphs, after a warning.

    Attributes:
        forms: The forms that thinking and calls of tools have in answers.
        stop: Texts that end an answer, besides the tokens that do: empty but for the `role: content` format, in
            which a model goes on with the user's part.
    """

    def __init__(self, source: str | None, bos_token: str = "", eos_token: str = "") -> None:
        """Reads a template.

        Args:
            source: Jinja source, as in the metadata key `tokenizer.chat_template`; None or blank if there is none.
            bos_token: What the template sees under that name: the text of the token that begins a text.
            eos_token: The same for the token that ends one.

        Raises:
            ModelFileError: If the source is not a template.
        """
        # Jinja takes longer to import than a tokenizer to build, and plain completion does without it.
        from irkit.tokenizer import bounds, sandbox

        if source is None or not source.strip():
            warnings.warn("the model has no chat template: messages are written as 'role: content'", stacklevel=2)
            source = PLAIN_TEMPLATE
        self.stop = ("\n\nuser:",) if source == PLAIN_TEMPLATE else ()
        self.forms: Forms = forms_of(source)
        self._source = source
        self._render = sandbox.render
        self._bounds_error = bounds.BoundsError
        self._template = sandbox.compile_template(source)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @property
    def source(self) -> str:
        """The Jinja source."""
        return self._source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | None = None,
    ) -> str:
        """The conversation as text.

        Args:
            messages: Mappings with `role` and `content` (text, None, or a list of `{"type": "text", "text": ...}`
                parts, which are joined), and whatever else the template makes use of, as JSON values.
            add_generation_prompt: End with what begins the assistant's answer.
            tools: Tools the model may call, as JSON schemas, if the template has a place for them.
            think: Whether the answer is to begin with thinking, if the model thinks; None leaves it to the template.

        Raises:
            OptionError: If messages or tools are not of that form (it names the place), or the template refuses
                them.
            ModelFileError: If the template fails, or takes more time or space than chat templates do.
        """
        given = self._given(messages, tools)
        return self._run(given, add_generation_prompt, datetime.now(), think)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_special: bool = True,
        think: bool | None = None,
    ) -> list[int]:
        """The conversation as token ids, in which only the template's own text makes control tokens.

        Where no text in the messages could be taken for (part of) a control token, the ids are those of the
        rendered text with `parse_special`.

        Args:
            tokenizer: The model's tokenizer.
            messages: As for `render`.
            add_generation_prompt: As for `render`.
            tools: As for `render`.
            add_special: Begin with BOS if the model expects it and the template has not written it.
            think: As for `render`.

        Raises:
            OptionError: As `render`.
            ModelFileError: As `render`.
        """
        given = self._given(messages, tools)
        now = datetime.now()
        text = self._run(given, add_generation_prompt, now, think)
        marks = Marks(tokenizer.control_texts, _texts([*given, *self._tokens.values(), self._source]))
        marked = self._run(_marked(given, marks), add_generation_prompt, now, think, marks)
        ids = tokenizer.encode_protected(marks.real(marked), marks.marked(marked))
        if marks.real(marked) != text:
            # The template looked at a text in a way that marks do not withstand. If the marks turn out to have
            # made no difference to the control tokens, none was forged, and they are not needed.
            unmarked = tokenizer.encode(text, add_special=False, parse_special=True)
            if [*filter(tokenizer.is_control, unmarked)] == [*filter(tokenizer.is_control, ids)]:
                ids = unmarked
        if add_special and tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    @cached_property
    def takes_tools(self) -> bool:
        """Whether tools get into the text."""
        tool: Json = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": _NO_PARAMETERS}}
        try:
            return _PROBE in self._run([_QUESTION, [tool]], True, datetime.now())
        except (OptionError, ModelFileError):
            return False

    @property
    def calls_tools(self) -> bool:
        """Whether, besides, calls of them can be told from the answer."""
        return bool(self.forms.calls) and self.takes_tools

    def reader(self, tools: Sequence[Mapping[str, Any]] | None = None, think: bool | None = None) -> AnswerReader:
        """What tells the parts of an answer apart, whose prompt has been made with these `tools` and `think`."""
        functions = [tool.get("function", tool) for tool in tools or ()]
        names = [function.get("name") for function in functions if isinstance(function, Mapping)]
        thinking = False
        if self.forms.thinking:
            prompt = self._run([_QUESTION, None], True, datetime.now(), think)
            thinking = prompt.rstrip().endswith(self.forms.thinking[0])
        return AnswerReader(self.forms, [name for name in names if isinstance(name, str)], thinking=thinking)

    @cached_property
    def _takes_system(self) -> bool:
        """Whether a system message gets into the text."""
        probe: list[Json] = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "."}]
        try:
            return _PROBE in self._run([probe, None], True, datetime.now())
        except (OptionError, ModelFileError):
            return False

    def _given(self, messages: Any, tools: Any) -> list[Json]:
        """Messages and tools, checked, and without what the template cannot take."""
        checked = _checked_messages(messages)
        if "developer" not in self._source:
            for message in checked:
                if message["role"] == "developer":
                    message["role"] = "system"
        if checked[0]["role"] == "system" and not self._takes_system:
            system = checked.pop(0)
            user = next((message for message in checked if message["role"] == "user"), None)
            if user is None:
                checked.insert(0, {**system, "role": "user"})
            else:
                user["content"] = f"{system['content']}\n{user['content']}"
        return [checked, None if tools is None else _checked_tools(tools)]  # pyright: ignore[reportReturnType]

    def _run(
        self,
        given: list[Json],
        add_generation_prompt: bool,
        now: datetime,
        think: bool | None = None,
        marks: Marks | None = None,
    ) -> str:
        messages, tools = given
        variables = {
            "messages": messages,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        if think is not None:
            variables |= dict.fromkeys(_THINK_SWITCHES, think)
        try:
            text = self._render(self._template, {**variables, "tools": tools}, now, marks)
        except ModelFileError as error:
            if tools is not None or isinstance(error, self._bounds_error):
                raise
            # transformers sets absent tools to None, and llama.cpp not at all; some templates only know the latter.
            text = self._render(self._template, variables, now, marks)
        return text + self._no_thought_after(text) if think is False and add_generation_prompt else text

    def _no_thought_after(self, prompt: str) -> str:
        """An empty thought, or what ends one that has been opened, where the template does not write it itself."""
        if self.forms.thinking is None:
            return ""
        opening, closing = self.forms.thinking
        written = prompt.rstrip()
        if written.endswith(opening):
            return f"\n\n{closing}\n\n"
        return "" if written.endswith(closing) else f"{opening}\n\n{closing}\n\n"


def _checked_messages(messages: Any) -> list[dict[str, Json]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise OptionError(f"messages: must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise OptionError("messages: must not be empty")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked_message(message: Any, place: str) -> dict[str, Json]:
    checked = _checked_json(message, place)
    if not isinstance(checked, dict):
        raise OptionError(f"{place}: must be a mapping with role and content, not {type(message).__name__}")
    role = checked.get("role")
    if not isinstance(role, str) or not role:
        raise OptionError(f"{place}.role: must be a string such as 'user'")
    if "content" not in checked and "tool_calls" not in checked:
        raise OptionError(f"{place}.content: is missing")
    checked["content"] = _joined_content(checked.get("content"), f"{place}.content")
    return checked


def _joined_content(content: Json, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise OptionError(f"{place}: must be a string, null or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise OptionError(f"{place}[{index}]: must be a part of the form {{'type': 'text', 'text': ...}}")
        texts.append(text)
    return "".join(texts)


def _checked_tools(tools: Any) -> list[Json] | None:
    checked = _checked_json(tools, "tools")
    if not isinstance(checked, list) or not all(isinstance(tool, dict) for tool in checked):
        raise OptionError("tools: must be a list of mappings")
    # Clients send an empty list for no tools; templates ask whether there is a list.
    return checked or None


def _checked_json(value: Any, place: str, depth: int = 0) -> Json:
    """A copy of `value` made of plain JSON types."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"{place}: character {error.start} is a lone surrogate") from None
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth == _DEEPEST:
        raise OptionError(f"{place}: is nested more than {_DEEPEST} deep")
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise OptionError(f"{place}: has a key that is not a string: {wrong[0]!r:.60}")
        return {_key(key, place): _checked_json(item, f"{place}.{key[:60]}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_checked_json(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise OptionError(f"{place}: {value!r:.60} is not a JSON value")


def _key(key: str, place: str) -> str:
    return str(_checked_json(key, f"a key of {place}"))


def _texts(value: Json) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)


def _marked(value: Json, marks: Marks, key: str = "") -> Any:
    """A copy of `value` with all strings marked, but for the names of the well-known roles."""
    if isinstance(value, str):
        return value if key == "role" and value in _ROLES else marks.mark(value)
    if isinstance(value, list):
        return [_marked(item, marks) for item in value]
    if isinstance(value, dict):
        return {marks.mark(name): _marked(item, marks, name) for name, item in value.items()}
    return value
