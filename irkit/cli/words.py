"""Parameters of verbs as words on the command line: how they are declared, and what the words mean."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic_core import from_json

from irkit.errors import OptionError
from irkit.options import check
from irkit.verbs import REQUIRED, Parameter

Shape = Literal["flag", "word", "words", "pairs", "json"]
"""How a value is written: --x/--no-x, one word, several words, KEY=VALUE words, or one word of JSON."""


def declare(parameter: Parameter, complete: Callable[[str], list[str]] | None = None) -> inspect.Parameter:
    """`parameter` as Typer reads it: what has no default is an argument, all else is an option.

    Words stay strings here; `convert` gives them their meaning. `complete` is what the shell may offer for
    the beginning of a word, where the values are not listed in the parameter's type.
    """
    shape, default = _shape(parameter.annotation), parameter.default
    declared: Any = {"flag": bool, "words": list[str], "pairs": list[str]}.get(shape, str)
    if default is REQUIRED:
        optional = shape == "word" and Path not in _members(parameter.annotation)
        hint = " Left out, it is read from standard input." if optional else ""
        info = typer.Argument(help=parameter.help + hint, metavar=label(parameter), autocompletion=complete)
        if optional:
            declared, default = str | None, None
    else:
        choices = _choices(parameter.annotation)
        info = typer.Option(
            label(parameter) if shape != "flag" else f"{label(parameter)}/{label(parameter, 'no-')}",
            help=parameter.help,
            metavar=None if shape == "flag" else _metavar(parameter, shape),
            autocompletion=(lambda incomplete: [c for c in choices if c.startswith(incomplete)]) if choices else None,
        )
        default = _as_words(default)
        if default is None:
            declared = declared | None
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(parameter.name, kind, default=default, annotation=Annotated[declared, info])


def convert(parameter: Parameter, given: Any) -> Any:
    """The value that `given`, the words for `parameter`, stands for.

    Raises:
        OptionError: naming the option, if the words mean nothing or the value is out of bounds.
    """
    if parameter.default is not REQUIRED and given == _as_words(parameter.default):
        return parameter.default
    name, shape = label(parameter), _shape(parameter.annotation)
    if shape == "flag":
        return given
    words = [given] if isinstance(given, str) else given
    if not all(map(_is_text, words)):
        raise OptionError(f"{name} must be UTF-8 text")
    value: Any = words if shape == "words" else words[0]
    if shape == "pairs":
        if not all("=" in word for word in words):
            raise OptionError(f"{name} must be KEY=VALUE, got {' '.join(words)!r}")
        value = dict(word.split("=", 1) for word in words)
    elif shape == "json" or _is_object(parameter.annotation, words):
        content = _content(words[0], name)
        try:
            value = from_json(content, allow_inf_nan=False)
        except ValueError as error:
            raise OptionError(f"{name} must be JSON: {error}") from None
    return check(parameter.annotation, name, value)


def label(parameter: Parameter, prefix: str = "") -> str:
    """The name of `parameter` on the command line: `--top-k`, or `PROMPT` for an argument."""
    if parameter.default is REQUIRED:
        return parameter.name.upper()
    return f"--{prefix}{parameter.name.replace('_', '-')}"


def _is_text(word: str) -> bool:
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    return word.isascii() or not any("\ud800" <= character <= "\udfff" for character in word)


def _as_words(default: Any) -> Any:
    """`default` as it would be given on the command line."""
    if default is None or isinstance(default, bool):
        return default
    if isinstance(default, Mapping):
        return [f"{key}={value}" for key, value in default.items()]
    return [str(item) for item in default] if isinstance(default, tuple) else str(default)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types `annotation` is a union of, without None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return () if annotation is type(None) else (annotation,)


def _shape(annotation: Any) -> Shape:
    members = _members(annotation)
    if bool in members:
        return "flag"
    for member in members:
        if get_origin(member) in (dict, Mapping) and len(members) == 1:
            return "pairs"
        if get_origin(member) in (tuple, Sequence):
            items = _members(get_args(member)[0])
            if str in items or (str not in members and items in ((int,), (float,))):
                return "words"
            if str not in members:
                return "json"
    return "word"


def _is_object(annotation: Any, words: Sequence[str]) -> bool:
    """Whether these words are an object, or several, of a parameter that may be words as well."""
    members = _members(annotation)
    items = (get_args(member)[0] for member in members if get_origin(member) is Sequence)
    several = any(get_origin(item) is Mapping for item in items) and words[0].lstrip().startswith("[{")
    # Where any text is allowed, one that begins with @ is just that.
    begins = "{" if str in members else ("{", "@")
    one = any(get_origin(member) in (dict, Mapping) for member in members) and words[0].lstrip().startswith(begins)
    return several or (one and len(words) == 1)


def _content(word: str, name: str) -> str:
    """The JSON that `word` is, or that is in the file which it names after an @."""
    if not word.startswith("@"):
        return word
    try:
        return Path(word[1:]).expanduser().read_text("utf-8")
    except OSError as error:
        raise OptionError(f"{name}: {word[1:]} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OptionError(f"{name}: {word[1:]} is not UTF-8 text") from None


def _choices(annotation: Any) -> tuple[str, ...]:
    return next((get_args(member) for member in _members(annotation) if get_origin(member) is Literal), ())


def _metavar(parameter: Parameter, shape: Shape) -> str:
    if parameter.minimum is not None and parameter.maximum is not None:
        return f"{parameter.minimum}..{parameter.maximum}"
    if shape in ("json", "pairs"):
        return "JSON" if shape == "json" else "KEY=VALUE"
    members = _members(parameter.annotation)
    objects = ["JSON|@FILE"] if str not in members and any(get_origin(member) is dict for member in members) else []
    return "|".join([*_choices(parameter.annotation), *objects]) or "TEXT"
