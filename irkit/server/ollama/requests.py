"""The bodies of Ollama's requests, and what their `options` say."""

import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ConfigDict, Field, field_validator, model_validator

from irkit.errors import OptionError
from irkit.options import (
    Captures,
    Edits,
    EmbedOptions,
    GenerateOptions,
    KeepAlive,
    LoadOptions,
    Options,
    parse,
    seconds,
)
from irkit.server.captures import Format

_BOOLEANS = (
    *("penalize_newline", "low_vram", "f16_kv", "numa"),
    *("logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only"),
)
IGNORED: dict[str, type] = {
    **dict.fromkeys(("mirostat", "num_keep", "num_batch", "num_gpu", "main_gpu"), int),
    **dict.fromkeys(("mirostat_tau", "mirostat_eta", "tfs_z"), float),
    **dict.fromkeys(_BOOLEANS, bool),
}
"""Options that clients still send, and that have no meaning here: of which type each must be."""

_NAMED_HERE = {"num_thread": "threads"}
"""Options of Ollama's that have another name here; 0 or less is as if they were not given."""

_MOST_TOLD = 1000
"""Of that many unknown fields the log says that they are left out."""

_Kind = TypeVar("_Kind", bound=Options)
_log = logging.getLogger("irkit.server")
_told: set[str] = set()


def _properties(*models: type[Options]) -> dict[str, Any]:
    """What the schemas of `models` say of their fields."""
    return {k: v for model in models for k, v in model.model_json_schema()["properties"].items()}


class OllamaRequest(Options):
    """What all of them have."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    """The name of a model."""
    name: str = ""
    """The same, as older clients call it."""

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, given: Any) -> Any:
        """Null, and, as the log says once of each, what nothing knows."""
        made = {name: value for name, value in given.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = {name[:80] for name in made.keys() - known} - _told
        if unknown and len(_told) < _MOST_TOLD:
            _told.update(unknown)
            _log.warning("unknown fields, left out: %s", ", ".join(sorted(unknown)))
        return made

    @property
    def named(self) -> str:
        """The name of the model, by whichever field it came."""
        return self.model or self.name


class _ComputeRequest(OllamaRequest):
    keep_alive: KeepAlive | None = None
    """How long the model stays in memory afterwards: seconds, or a duration such as 10m; below 0 is for ever."""

    @property
    def kept(self) -> float | None:
        """The same in seconds, if it was said."""
        return None if self.keep_alive is None else seconds(self.keep_alive)


class AnswerRequest(_ComputeRequest):
    """What the requests for an answer have."""

    stream: bool = True
    """Send the answer piece by piece, as lines of JSON, not as one object."""
    options: dict[str, Any] = Field({}, json_schema_extra={"properties": _properties(GenerateOptions, LoadOptions)})
    """How the answer is made, and how the model is opened."""
    format: dict[str, Any] | Literal["", "json"] = ""
    """What the answer must be: "json" is any JSON object, and a JSON schema whatever it describes."""
    think: bool | None = None
    """Whether to think before the answer, if the model can; if not given, its template says."""
    logprobs: bool = False
    """Report the log-probability of each token."""
    top_logprobs: Any = Field(None, json_schema_extra=_properties(GenerateOptions)["top_logprobs"])
    truncate: bool = False
    """Leave out the oldest turns of a conversation that does not fit the context; else, and for `generate`, it is an
    error."""
    shift: bool = False
    """Not supported: an answer ends where the context is full."""
    capture: Captures = None
    edits: Edits = None
    capture_format: Format = "safetensors"

    @field_validator("think", mode="before")
    @classmethod
    def _on_or_off(cls, think: Any) -> Any:
        if think in ("low", "medium", "high"):
            raise ValueError("how much to think is not supported: it can be true or false")
        return think

    def picked(self) -> tuple[GenerateOptions, LoadOptions]:
        """How the answer is made, and how the model is opened."""
        top = {"top_logprobs": self.top_logprobs} if self.logprobs else {}
        formed = {"format": self.format} if self.format else {}
        return picked(self.options | top | formed, GenerateOptions)


class GenerateRequest(AnswerRequest):
    """The body of `POST /api/generate`."""

    prompt: str = ""
    """What to answer; if it is empty, the model is loaded."""
    suffix: str = ""
    """What follows the answer: the model fills in what belongs between `prompt` and this, if it can."""
    system: str = ""
    """What the model is told before the prompt."""
    template: str = ""
    """The chat template to use instead of the model's own, in Jinja, or one of Ollama's simple ones in Go."""
    raw: bool = False
    """Continue the prompt as it is, without the chat template."""
    context: list[int] = Field([], max_length=1 << 22)
    """What an earlier answer gave under this name: the prompt goes on from there."""
    images: Any = None
    """Not supported."""


class ChatRequest(AnswerRequest):
    """The body of `POST /api/chat`."""

    messages: list[dict[str, Any]] = Field([])
    """The conversation; if it is empty, the model is loaded."""
    tools: list[dict[str, Any]] = Field([])
    """Tools the model may call, as JSON schemas, if it can."""


class EmbedRequest(_ComputeRequest):
    """The body of `POST /api/embed`."""

    input: str | list[str] = Field([])
    """One text or several."""
    options: dict[str, Any] = Field({}, json_schema_extra={"properties": _properties(EmbedOptions, LoadOptions)})
    """How vectors are made, and how the model is opened."""
    truncate: bool = False
    """Leave the end of a text that does not fit the context away; else it is an error."""
    dimensions: int | None = Field(None, ge=1, le=1 << 20)
    """Give the first so many numbers of each vector."""


class EmbeddingsRequest(_ComputeRequest):
    """The body of `POST /api/embeddings`."""

    prompt: str = ""
    """A text."""
    options: dict[str, Any] = Field({}, json_schema_extra={"properties": _properties(EmbedOptions, LoadOptions)})
    """How the vector is made, and how the model is opened."""


class ShowRequest(OllamaRequest):
    """The body of `POST /api/show`."""

    verbose: bool = False
    """Give the lists of the file's metadata, and its tensors, too."""


class PullRequest(OllamaRequest):
    """The body of `POST /api/pull`."""

    stream: bool = True
    """Say how far it is, line by line."""


class CreateRequest(OllamaRequest):
    """The body of `POST /api/create`."""

    from_: str = Field("", alias="from")
    """The model that it is made of."""
    files: dict[str, str] = Field({}, max_length=64)
    """Or its GGUF file: a name, and the digest it was sent as."""
    modelfile: str = ""
    """Or what a Modelfile says, as older clients send it."""
    template: str = ""
    """Its chat template, in Jinja, or one of Ollama's simple ones in Go."""
    system: str = ""
    """What it is told before each conversation."""
    parameters: dict[str, Any] = Field({})
    """Its options."""
    license: str | list[str] = ""
    """Its license."""
    stream: bool = True
    """Say what is being done, line by line."""
    adapters: Any = None
    """Not supported."""
    messages: Any = None
    """Not supported."""
    quantize: Any = None
    """Not supported."""


class CopyRequest(OllamaRequest):
    """The body of `POST /api/copy`."""

    source: str = ""
    """The name of a model."""
    destination: str = ""
    """Its further name."""


def picked(options: Mapping[str, Any], kind: type[_Kind]) -> tuple[_Kind, LoadOptions]:
    """The fields of `kind`, and of `LoadOptions`, in the `options` of a request; what nothing has is logged.

    Raises:
        OptionError: one has the wrong type, in Ollama's words, or is out of bounds.
    """
    given = {name: value for name, value in options.items() if value is not None}
    fields = kind.model_fields | LoadOptions.model_fields | GenerateOptions.model_fields
    known = IGNORED | dict.fromkeys(_NAMED_HERE, int) | {name: field.annotation for name, field in fields.items()}
    unknown = [name[:80] for name in given if name not in known]
    if unknown:
        _log.warning("unknown options, left out: %s", ", ".join(unknown))
    for name, value in given.items():
        if name in known:
            _check_type(name, value, known[name])
    named = {here: given[name] for name, here in _NAMED_HERE.items() if given.get(name, 0) > 0}
    return _parse_some(kind, given), _parse_some(LoadOptions, named | given)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    members = (tuple,) if get_origin(annotation) is tuple else get_args(annotation) or (annotation,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for kind, word, fits in (
        (int, "integer", number and float(value).is_integer()),
        (float, "float32", number),
        (bool, "boolean", isinstance(value, bool)),
        (tuple, "array", isinstance(value, list | str)),  # one string is several of one
    ):
        if kind in members and not fits:
            raise OptionError(f'option "{name}" must be of type {word}', name)


def _parse_some(kind: type[_Kind], given: Mapping[str, Any]) -> _Kind:
    return parse(kind, {name: value for name, value in given.items() if name in kind.model_fields})


def refuse(asked: Options, *names: str) -> None:
    """Raises OptionError where one of these was asked for: to answer as if it had not been would be worse."""
    for name in names:
        if getattr(asked, name):
            raise OptionError(f'"{name}" is not supported', name)
