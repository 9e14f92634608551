"""Every option irkit knows: the only place where a type, a default, a bound or a help text is written.

The Python verbs, the command line, the HTTP routes and the notebook controls are read off these models
(see `irkit.verbs`). Names are Ollama's where Ollama has the option and llama.cpp's otherwise; bounds are
inclusive. A field's docstring is its help text.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from irkit.errors import OptionError

Text = Annotated[str | Sequence[int], Field(description="Text, or (from a program) a list of token ids.")]
Texts = Annotated[str | Sequence[int] | Sequence[str | Sequence[int]], Field(description="One text or several.")]
TokenIds = Annotated[Sequence[int], Field(description="Token ids.")]
Messages = Annotated[
    str | Sequence[Mapping[str, Any]],
    Field(description='A conversation: a list of {"role", "content"}, or one user message as text.'),
]
Tools = Annotated[
    Sequence[Mapping[str, Any]] | None,
    Field(description="Tools the model may call, as JSON schemas, if its chat template has a place for them."),
]
Think = Annotated[
    bool | None,
    Field(description="Whether to think before the answer, if the model can; if not given, its template says."),
]
Template = Annotated[
    str | None,
    Field(description="A chat template, in Jinja, to lay the conversation out with instead of the model's own."),
]
System = Annotated[str | None, Field(description="What the model is told before the conversation.")]
Edits = Annotated[
    Annotated[Sequence[Any], Field(max_length=64)] | None,
    Field(description="Changes to make in the pass, as irkit.steer, scale, ablate, patch and call make, or as JSON."),
]
Captures = Annotated[
    str | Sequence[str] | Mapping[str, Any] | None,
    Field(description="Hook points whose values each token is to carry: names, or an object of capture options."),
]
PlainText = Annotated[str, Field(description="Text.")]
ModelName = Annotated[str | Path, Field(description="The name of a model, or a path to a GGUF file.")]

Precision = Literal["fast", "exact"]
Backend = Literal["cpu", "metal", "mps", "cuda"]
CacheType = Literal["f16", "f32"]


def _as_stop_strings(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _no_empty_stop(value: tuple[str, ...]) -> tuple[str, ...]:
    if "" in value:
        raise ValueError("a stop string must not be empty")
    return value


StopStrings = Annotated[
    tuple[Annotated[str, Field(max_length=1000)], ...],
    BeforeValidator(_as_stop_strings),
    AfterValidator(_no_empty_stop),
    Field(max_length=64),
]


def _as_several(value: object) -> object:
    if isinstance(value, range):
        return tuple(value)
    if isinstance(value, list | tuple) and any(isinstance(item, str) and "," in item for item in value):
        return tuple(part for item in value for part in (item.split(",") if isinstance(item, str) else [item]))
    if isinstance(value, str):
        return tuple(value.split(","))
    return (value,) if isinstance(value, int) else value


def _as_format(value: object) -> object:
    if value is None or value == "json":
        return value
    if not isinstance(value, Mapping):
        raise ValueError('must be "json" or a JSON schema, as an object')
    return dict(value)


Format = Annotated[Literal["json"] | dict[str, Any] | None, BeforeValidator(_as_format)]
"""What an answer must be: any JSON object, or what a JSON schema describes."""

Strings = Annotated[
    tuple[Annotated[str, Field(max_length=200)], ...], BeforeValidator(_as_several), Field(max_length=1 << 12)
]
"""Names: one, several, or (on the command line) with commas between them."""
Numbers = Annotated[tuple[int, ...], BeforeValidator(_as_several), Field(max_length=1 << 16)]
"""Likewise."""
LogitBias = dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-1e4, le=1e4)]]


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(rf"([-+]?)((?:\d+\.?\d*|\.\d+)(?:{'|'.join(_UNITS)}))+")


def seconds(value: float | str) -> float:
    """A time to keep something for, in seconds: a number of them, or as Go writes it (`1h30m`); below 0 is for ever.

    Raises:
        ValueError: it is neither.
    """
    try:
        found = float(value)
    except ValueError:
        text = str(value)
        if not (written := _DURATION.fullmatch(text)):
            raise ValueError("must be seconds, or a duration such as 10m or 1h30m") from None
        parts = re.findall(r"([\d.]+)([a-zµμ]+)", text)
        found = (-1 if written[1] == "-" else 1) * sum(float(number) * _UNITS[unit] for number, unit in parts)
    if math.isnan(found):
        raise ValueError("must be seconds, or a duration such as 10m or 1h30m")
    return math.inf if found < 0 else found


def _is_duration(value: Any) -> Any:
    seconds(value)
    return value


KeepAlive = Annotated[float | str, AfterValidator(_is_duration)]
"""How long a model stays in memory unused: see `seconds`."""


class Options(BaseModel):
    """What all option models share: frozen, and no name accepted that is not listed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class SamplingOptions(Options):
    """How the next token is drawn; the steps apply in the order of the fields, `temperature` last."""

    logit_bias: LogitBias = {}
    """Added to the logits of these token ids; -100 or so bans a token."""
    repeat_last_n: int = Field(default=64, ge=-1, le=1 << 20)
    """How many of the last tokens, the prompt's included, the penalties look at; 0 is none, -1 all."""
    repeat_penalty: float = Field(default=1.0, ge=0.1, le=10)
    """Divides positive and multiplies negative logits of tokens seen in that window; 1 is off."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logit of every token seen in that window."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted once for each time a token was seen in that window."""
    top_n_sigma: float = Field(default=-1.0, ge=-1, le=100)
    """Keeps logits within this many standard deviations of the largest; 0 or less is off."""
    top_k: int = Field(default=40, ge=-1, le=1 << 20)
    """Keeps the k most likely tokens; 0 or less is off."""
    typical_p: float = Field(default=1.0, ge=0, le=1)
    """Keeps the tokens whose surprise is nearest the entropy, up to this total probability; 1 is off."""
    top_p: float = Field(default=0.9, ge=0, le=1)
    """Keeps the fewest most likely tokens that reach this total probability; 1 is off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drops tokens less likely than this fraction of the likeliest; 0 is off."""
    xtc_probability: float = Field(default=0.0, ge=0, le=1)
    """How often XTC drops the top choices (all above its threshold but the least likely); 0 is off."""
    xtc_threshold: float = Field(default=0.1, ge=0, le=1)
    """The probability above which XTC counts a token as a top choice; above 0.5 it does nothing."""
    temperature: float = Field(default=0.8, ge=0, le=10)
    """Divides the logits before the draw: 0 always takes the likeliest token, 1 the model's own odds."""


class GenerateOptions(SamplingOptions):
    """How one answer is made."""

    num_predict: int = Field(default=-1, ge=-1, le=1 << 24)
    """The most tokens to make; -1 goes on until the model ends its answer or the context is full."""
    stop: StopStrings = ()
    """Strings that end the answer; the text stops before them."""
    seed: int = Field(default=-1, ge=-1, le=(1 << 63) - 1)
    """Makes the draws repeatable; -1 takes a new seed each time."""
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """How many of the likeliest tokens to report beside each token."""
    format: Format = None
    """What the answer must be: "json" is any JSON object, and a JSON schema whatever it describes."""


class LoadOptions(Options):
    """How a model is opened."""

    precision: Precision = "fast"
    """`fast`: the quickest arithmetic the backend has; `exact`: float32 of the dequantized weights."""
    num_ctx: int | None = Field(default=None, ge=8, le=1 << 22)
    """The context in tokens; if not given, what the model was trained for."""
    cache_type: CacheType | None = None
    """Numbers of the KV cache; if not given, f16 where the CPU's own kernels compute, else those of the activations."""
    backend: Backend | None = None
    """Where to compute; if not given, the best one that works here."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads; if not given, the physical cores."""
    mesh: int | None = Field(default=None, ge=1, le=4096)
    """Devices to divide each layer among, heads and MLP (tensor parallelism); if not given, one has all."""


class TokenizeOptions(Options):
    """How text becomes token ids."""

    add_special: bool = True
    """Add the tokens the model expects around a text, such as BOS."""
    parse_special: bool = False
    """Read control tokens written out in the text, such as <|im_end|>, as what they name."""


class DetokenizeOptions(Options):
    """How token ids become text."""

    skip_special: bool = False
    """Leave control tokens out."""


class ScoreOptions(Options):
    """How a text is scored."""

    top_logprobs: int = Field(default=0, ge=0, le=20)
    """How many of the likeliest tokens to report at each position."""


class EmbedOptions(Options):
    """How a text becomes one vector."""

    pooling: Literal["mean", "last"] = "mean"
    """What stands for a text: the mean over its positions, or its last position."""
    normalize: bool = True
    """Scale each vector to length 1."""


class CaptureOptions(Options):
    """What to keep of a forward pass."""

    names: Strings | None = None
    """Hook points, by short name (pattern, resid_post) or full; if not given, all but result and attn_scores."""
    layers: Numbers | None = None
    """Layers to keep, of those names that do not hold one; negative ones count from the last; if not given, all."""
    heads: Numbers | None = None
    """Heads to keep where there are heads; if not given, all."""
    reduce: Literal["none", "last", "mean", "norm", "entropy", "top_k", "lens"] = "none"
    """What to keep of each value, worked out on the device: its last position, the mean over positions, the length of
    each vector, the entropy of each row of a pattern, the k largest numbers, or the k likeliest next tokens as the
    logit lens reads them."""
    k: int = Field(default=10, ge=1, le=1000)
    """How many numbers or tokens top_k and lens keep."""
    budget: int | None = Field(default=None, ge=0, le=1 << 50)
    """The most bytes that what is kept may take; if not given, half of the memory that is free."""


class TraceOptions(CaptureOptions):
    """What a trace keeps of a forward pass, and how much of it."""

    positions: Numbers | None = None
    """Token positions to keep; negative ones count from the last; if not given, all."""
    logits: Literal["all", "last", "none"] = "all"
    """Of which positions to keep the logits."""


class SteerWords(Options):
    """What `irkit.steer` takes, as JSON."""

    vector: Any
    layers: Numbers
    positions: Numbers | None = None
    strength: float = 1.0
    name: str = Field(default="resid_post", max_length=200)


class ScaleWords(Options):
    """What `irkit.scale` takes, as JSON."""

    name: str = Field(max_length=200)
    factor: float | list[float] | list[list[float]]
    layers: Numbers | None = None
    heads: Numbers | None = None
    positions: Numbers | None = None


class AblateWords(Options):
    """What `irkit.ablate` takes, as JSON."""

    name: str = Field(max_length=200)
    layers: Numbers | None = None
    heads: Numbers | None = None
    positions: Numbers | None = None
    mean: Any = None


class LensOptions(Options):
    """What the logit lens looks at."""

    layers: Numbers | None = None
    """Layers to look at; negative ones count from the last; if not given, all."""
    positions: Numbers | None = None
    """Token positions to look at; negative ones count from the last; if not given, all."""
    k: int = Field(default=5, ge=1, le=1000)
    """How many of the likeliest tokens to keep at each place."""
    budget: int | None = Field(default=None, ge=0, le=1 << 50)
    """The most bytes that may be held meanwhile; half of the free memory, if not given."""


class ServeOptions(Options):
    """Where the server listens, to whom, and how much it takes on."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = Field(default=11434, ge=0, le=65535)
    """The port to listen on; 0 takes a free one."""
    api_key: str | None = Field(default=None, min_length=1, max_length=4096, pattern="^[!-~]+$", repr=False)
    """What requests must carry, as Authorization: Bearer KEY; if not given, IRKIT_API_KEY of the environment."""
    origins: Strings = ()
    """Further origins whose web pages may use the server, such as https://chat.example; * is every one."""
    parallel: int = Field(default=8, ge=1, le=64)
    """Answers that are made at once; each has a KV cache of its own."""
    max_queue: int = Field(default=256, ge=0, le=1 << 16)
    """Requests that may wait beyond those; further ones are refused with status 503."""
    memory: int | None = Field(default=None, ge=0, le=1 << 50)
    """The most bytes that the weights of the models in memory may take together, beside which there are KV caches; if
    not given, three quarters of this machine's."""
    keep_alive: Annotated[str, AfterValidator(_is_duration)] = "5m"
    """How long a model stays in memory unused: seconds, or a duration such as 1h30m; below 0 is for ever."""
    budget: int = Field(default=1 << 28, ge=0, le=1 << 50)
    """The most bytes that what one request traces or captures may take; a request may ask for less."""


_Lengths = tuple[Annotated[int, Field(ge=1, le=1 << 22)], ...]


class BenchOptions(LoadOptions):
    """What `irkit bench` measures."""

    prompt_lengths: _Lengths = (32, 128, 512)
    """The tokens of the prompts that are read."""
    contexts: _Lengths = (64, 512, 2048)
    """The tokens in the cache when tokens are made."""
    num_predict: int = Field(default=64, ge=1, le=1 << 24)
    """How many tokens are made at each context."""
    runs: int = Field(default=5, ge=1, le=1000)
    """How often everything is measured."""
    vs: Literal["llama.cpp"] | None = None
    """Another engine to measure in turns with irkit, on the same file with as many threads."""
    busy: bool = False
    """Keep one core busy with another process meanwhile."""
    serve: bool = False
    """Measure the servers too: one client, eight at once, and a short prompt while a long one is read."""
    json_format: bool = False
    """Measure too how fast irkit decodes what a JSON schema restricts, and what finding each token's rivals takes."""


_Model = TypeVar("_Model", bound=Options)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def parse(model: type[_Model], given: Mapping[str, Any]) -> _Model:
    """`model` made from `given`.

    Raises:
        OptionError: naming each option that is unknown (with the nearest name), of the wrong type or
            out of bounds.
    """
    try:
        return model(**given)
    except ValidationError as error:
        where = error.errors(include_url=False)[0]["loc"]
        raise OptionError(explain(error, model.model_fields), str(where[0])[:80] if where else None) from None


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    """Making one takes longer than a token."""
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def check(annotation: Any, name: str, value: Any) -> Any:
    """`value` as `annotation` describes it.

    Raises:
        OptionError: naming the argument, if it does not fit.
    """
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        detail = error.errors(include_url=False)[-1]
        raise OptionError(_sentence(name, detail), name) from None


def check_logit_bias(options: SamplingOptions, d_vocab: int) -> None:
    """Raises OptionError where `logit_bias` names a token that a vocabulary of this size does not have."""
    for token in options.logit_bias:
        if token >= d_vocab:
            raise OptionError(f"option logit_bias: token id {token} is outside the vocabulary of {d_vocab}")


def explain(error: ValidationError, known: Iterable[str]) -> str:
    """One line for a `ValidationError`: each option by name, what is wrong with it, and the nearest name."""
    known = list(known)
    parts = []
    for detail in error.errors(include_url=False)[:5]:
        name = ".".join(str(part) for part in detail["loc"])[:80] or "options"
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(known)}"
            parts.append(f'unknown option "{name}"{hint}')
        else:
            parts.append(_sentence(f'option "{name}"', detail))
    return "; ".join(parts)


def _sentence(what: str, detail: Mapping[str, Any]) -> str:
    if detail["type"] == "missing":
        return f"{what} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    shown = repr(detail.get("input"))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if message.startswith("Input should "):
        return f"{what} must {message.removeprefix('Input should ')}, got {shown}"
    return f"{what}: {message[0].lower()}{message[1:]}, got {shown}"


def accepts(model: type[Options]) -> Callable[[_Function], _Function]:
    """Marks a function that takes `**options: Any` as taking the fields of `model`.

    Only its signature changes (so that Jupyter completes the names, and `irkit.verbs` can read them); the
    function itself calls `parse(model, options)`.
    """

    def mark(function: _Function) -> _Function:
        signature = inspect.signature(function)
        fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.get_default(call_default_factory=True),
                annotation=field.rebuild_annotation(),
            )
            for name, field in model.model_fields.items()
        ]
        function.__signature__ = signature.replace(parameters=[*fixed, *fields])  # pyright: ignore[reportFunctionMemberAccess]
        function.__options__ = model  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def python_only(function: _Function) -> _Function:
    """Marks a public method of `Session` that takes or returns what only a program can: it is no verb."""
    function.__python_only__ = True  # pyright: ignore[reportFunctionMemberAccess]
    return function
