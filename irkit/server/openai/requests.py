"""What OpenAI's clients ask for: the bodies of their requests, in the words of irkit's options."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from irkit.errors import OptionError
from irkit.options import Captures, Edits, EmbedOptions, GenerateOptions, LoadOptions, Texts, Think
from irkit.server.captures import Format

IGNORED = {
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
"""Fields that say nothing about the answer here: they are for OpenAI's own service."""

MAX_CHOICES = 128
"""The most answers of one request."""

COMPLETION_TOKENS = 16
"""What `max_tokens` is for completions where nothing says: OpenAI's default, as a text may go on for ever."""

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class _OpenAIRequest(LoadOptions):
    model: str
    """The name of a model."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None and name not in IGNORED}

    @property
    def load(self) -> LoadOptions:
        """How the model is opened."""
        return LoadOptions(**{name: getattr(self, name) for name in LoadOptions.model_fields})


class AnswerRequest(_OpenAIRequest, GenerateOptions):
    """What the bodies of requests for answers have in common."""

    stream: bool = False
    """Send the answer piece by piece, as server-sent events."""
    stream_options: dict[str, Any] = Field({})
    """With `include_usage`, a stream ends with the counts of tokens."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """How many answers to make; each draws with a seed of its own, the first one's plus 1, 2, ..."""
    max_tokens: int | None = Field(default=None, ge=-1, le=1 << 24)
    """The same as `num_predict`."""
    capture: Captures = None
    edits: Edits = None
    capture_format: Format = "safetensors"

    @property
    def options(self) -> dict[str, Any]:
        """How answers are made, as far as the request says: the rest is the model's own to set."""
        given = self.model_dump(include=self.model_fields_set & GenerateOptions.model_fields.keys())
        return given | ({} if self.max_tokens is None else {"num_predict": self.max_tokens})


class ChatRequest(AnswerRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    """The conversation."""
    max_completion_tokens: int | None = Field(default=None, ge=-1, le=1 << 24)
    """The same as `num_predict`."""
    logprobs: bool = False
    """Report the log-probability of each token, and those of `top_logprobs` others."""
    tools: list[dict[str, Any]] = Field([])
    """Tools the model may call."""
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    """Whether it may, or must, or which one it must call."""
    parallel_tool_calls: bool = True
    """Whether there may be several calls in one answer."""
    response_format: dict[str, Any] = Field({})
    """What the answer must be: `{"type": "json_object"}`, or `json_schema` with a schema."""
    think: Think = None
    reasoning_effort: str | None = None
    """`none` is `think` false, and all else true."""
    chat_template_kwargs: dict[str, bool] = Field({})
    """`{"enable_thinking": false}` is `think` false."""
    audio: Any = None
    """Not supported."""
    modalities: list[Literal["text"]] = Field(["text"])
    """What to answer with."""
    functions: Any = None
    """Not supported: `tools` are what came after it."""
    function_call: Any = None
    """Not supported."""
    web_search_options: Any = None
    """Not supported."""

    @property
    def options(self) -> dict[str, Any]:
        """How answers are made."""
        given = super().options | {"top_logprobs": self.top_logprobs if self.logprobs else 0}
        if self.max_completion_tokens is not None:
            given["num_predict"] = self.max_completion_tokens
        if (form := self.forced or _format(self.response_format)) is not None:
            given["format"] = form
        return given

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of, if any."""
        chosen = _chosen(self.tool_choice)
        found = [tool for tool in self.tools if chosen in (None, function_of(tool)["name"])]
        if not found and (chosen or self.tool_choice == "required"):
            raise OptionError('"tool_choice" asks for a tool that is not among "tools"', "tool_choice")
        return None if self.tool_choice == "none" else found or None

    @property
    def forced(self) -> dict[str, Any] | None:
        """The JSON schema of the call that the answer must be, if it must be one."""
        if self.tool_choice in ("none", "auto"):
            return None
        return {"anyOf": [_call_schema(function_of(tool), f"#/anyOf/{i}") for i, tool in enumerate(self.offered or ())]}

    @property
    def thinks(self) -> bool | None:
        """Whether to think before the answer, if the request says."""
        if unknown := self.chat_template_kwargs.keys() - {"enable_thinking", "thinking"}:
            raise OptionError(f'"chat_template_kwargs" may hold enable_thinking, not {min(unknown)[:80]}')
        told = [self.think, *self.chat_template_kwargs.values()]
        if self.reasoning_effort is not None:
            told.append(self.reasoning_effort != "none")
        return next((value for value in told if value is not None), None)


class CompletionRequest(AnswerRequest):
    """The body of `POST /v1/completions`."""

    prompt: Texts
    """One text or several, each a string or token ids."""
    echo: bool = False
    """Put the prompt before what follows it; with `logprobs`, its tokens have theirs."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Report the log-probability of each token, and of that many of the likeliest in its place."""
    best_of: int | None = None
    """Not supported, where it is more than `n`."""
    suffix: str = ""
    """What comes after the gap that is to be filled, if the model can do that."""

    @property
    def options(self) -> dict[str, Any]:
        """How answers are made."""
        return super().options | {"top_logprobs": self.logprobs or 0}

    @property
    def prompts(self) -> list[str | Sequence[int]]:
        """Each of the prompts."""
        found = texts_of(self.prompt)
        if not 0 < len(found) * self.n <= MAX_CHOICES:
            raise OptionError(
                f"prompt: there may be {MAX_CHOICES} answers at once, got {len(found)} prompts of {self.n}", "prompt"
            )
        return found


class EmbeddingsRequest(_OpenAIRequest, EmbedOptions):
    """The body of `POST /v1/embeddings`."""

    input: Texts
    """One text or several, each a string or token ids."""
    encoding_format: Literal["float", "base64"] = "float"
    """Lists of numbers, or the bytes of little-endian float32 in base64."""
    dimensions: int | None = None
    """The length of a vector: only the model's own can be had."""

    @field_validator("input")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        found = texts_of(value)
        if not found or not all(map(len, found)):
            raise ValueError("there must be a text, and none that is empty")
        return found


def texts_of(texts: Any) -> list[str | Sequence[int]]:
    """Each of the texts, which may be one, as a string or token ids."""
    one = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], int))
    return [texts] if one else list(texts)


def _format(response_format: Mapping[str, Any]) -> Any:
    """The option `format`, as OpenAI's `response_format` says it."""
    match response_format:
        case {} if not response_format:
            return None
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return "json"
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
            return schema
    raise OptionError(
        'option "response_format" must have the type text, json_object, or json_schema with a schema', "response_format"
    )


def _chosen(choice: str | Mapping[str, Any]) -> str | None:
    """The name of the tool that must be called, if it is one."""
    match choice:
        case str():
            return None
        case {"type": "function", "function": {"name": str() as name}}:
            return name
    raise OptionError('option "tool_choice" must be none, auto, required, or name a function', "tool_choice")


def function_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The function that a tool is.

    Raises:
        OptionError: it is something else.
    """
    match tool:
        case {"type": "function", "function": {"name": str()} as found}:
            return found
    raise OptionError('option "tools" must hold functions, each with a name', "tools")


def _call_schema(called: Mapping[str, Any], at: str) -> dict[str, Any]:
    """What a call of a function looks like, where `at` points to this in the whole schema."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        made = {name: moved(item) for name, item in value.items()}
        if isinstance(reference := value.get("$ref"), str) and reference.startswith("#"):
            made["$ref"] = f"{at}/properties/arguments{reference[1:]}"
        return made

    arguments = moved(called.get("parameters") or _NO_PARAMETERS)
    properties = {"name": {"const": called["name"]}, "arguments": arguments}
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def message_of(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message as chat templates want it: without what is null, and with the arguments of calls as objects.

    Raises:
        OptionError: it holds something else than text.
    """
    made = {name: value for name, value in given.items() if value is not None}
    if "content" in given:
        made["content"] = given["content"]
    for part in made["content"] if isinstance(made.get("content"), list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise OptionError(f'{place}: content of type "{kind[:40]}" is not supported, only text is', "messages")
    if isinstance(calls := made.get("tool_calls"), list):
        made["tool_calls"] = [_call(call, place) for call in calls]
    return made


def _call(call: Any, place: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except ValueError:
        raise OptionError(f"{place}: the arguments of a tool call are not JSON", "messages") from None
