"""Runs the Jinja template of a model file, which anyone may have written, without trusting it.

Jinja's own sandbox keeps a template away from Python's internals. This adds bounds: every value that the
template makes is measured, and large ones refused before they are made where a few characters of template
ask for gigabytes; processor time is looked at with every statement and operation. What can neither be
measured nor is used by chat templates (the `urlize` filter, `str.center`, `lipsum`, ...) is left out.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import cache, wraps
from typing import Any

from jinja2 import nodes, pass_context, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from irkit.errors import IrkitError, ModelFileError, OptionError
from irkit.tokenizer.bounds import Rendering, rendering
from irkit.tokenizer.marked import Marks

_SOURCE_LIMIT = 1 << 16
_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "string",
    "trim", "unique", "upper",
)  # fmt: skip
_METHODS = {
    str: frozenset({
        "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
        "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle",
        "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
        "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
        "title", "upper",
    }),
    dict: frozenset({"get", "items", "keys", "values"}),
    Sequence: frozenset({"count", "index"}),
    (int, float, complex, bytes): frozenset[str](),
}  # fmt: skip
_NOT_PRINTABLE_ASCII = re.compile("[^ -~\n\r\t]")


def compile_template(source: str) -> Template:
    """The template, ready to `render`; it can be shared by threads.

    Raises:
        ModelFileError: If it is not a Jinja template, or too long.
    """
    if len(source) > _SOURCE_LIMIT:
        raise ModelFileError(f"the chat template has {len(source)} characters, more than the {_SOURCE_LIMIT} allowed")
    try:
        return _environment().from_string(source)
    except Exception as error:
        raise ModelFileError(f"the chat template cannot be read: {_reason(error)}") from None


def render(template: Template, variables: dict[str, Any], now: datetime, marks: Marks | None = None) -> str:
    """What the template makes of its variables.

    Args:
        template: From `compile_template`.
        variables: What the template sees, besides `raise_exception` and `strftime_now`. The bounds on time and
            space grow with their size.
        now: The time the template sees.
        marks: The stand-ins in the variables, if there are any; the result keeps them.

    Raises:
        OptionError: If the template itself refuses the messages; in its words.
        BoundsError: If it takes more time or space than chat templates do.
        ModelFileError: If it fails.
    """

    def strftime_now(format: str) -> str:
        return now.strftime(format)

    token = rendering.set(Rendering(variables, marks))
    try:
        text = template.render({"strftime_now": strftime_now, **variables})
        text.encode()
        return text
    except IrkitError:
        raise
    except Exception as error:
        raise ModelFileError(f"the chat template failed: {_reason(error)}") from None
    finally:
        rendering.reset(token)


def _reason(error: Exception) -> str:
    text = f"{error}" or type(error).__name__
    line = getattr(error, "lineno", None)
    return (text if len(text) <= 300 else text[:297] + "...") + (f" (line {line})" if line else "")


class _Generator(CodeGenerator):
    """Writes calls into the compiled template where values are made and time passes."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        # An empty loop body passes time, too.
        self.writeline("environment.tick()")
        for node in nodes:
            super().blockvisit([node], frame)
            self.writeline("environment.tick()")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._kept(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._kept(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._kept(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._kept(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _kept(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.keep(")
        visit(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def tick(self) -> None:
        rendering.get().tick()

    def keep(self, value: Any) -> Any:
        return rendering.get().keep(value)

    def joined(self, parts: Iterable[Any]) -> str:
        bounds = rendering.get()
        texts = []
        size = 0
        for part in parts:
            texts.append(str(bounds.check(part)))
            size += len(texts[-1])
            bounds.allow(size)
        return bounds.keep("".join(texts))

    # Jinja calls this with the pieces of a block, a macro or the whole template.
    concat = joined  # pyright: ignore[reportAssignmentType]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        known = allowed is None or not callable(value) or attr in allowed
        return known and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        format = value.__self__
        # A specification could ask for any width. What marks are in a format string would be lost.
        if type(format) is not str or ":" in format:
            raise ModelFileError("the chat template formats in a way that irkit does not support")

        def measured(*args: Any, **kwargs: Any) -> str:
            rendering.get().check_repeated(format, "{", (args, kwargs))
            return wrapped(*args, **kwargs)

        return measured

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        bounds = rendering.get()
        for name, value in (*enumerate(args), *kwargs.items()):
            # A macro may be given a namespace; Jinja itself passes the variables of loops and blocks.
            if not isinstance(value, Namespace) and name not in ("_loop_vars", "_block_vars"):
                bounds.check(value)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join":
                return __self.joined(_between(owner, args[0]))
            if __obj.__name__ == "replace":
                bounds.check_replace(owner, *args)
        return bounds.keep(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        bounds = rendering.get()
        if operator == "%" and isinstance(left, str):
            bounds.check_format(left, right)
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    bounds.charge(len(many) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            bounds.check_integer(left.bit_length() * (max(right, 1) if operator == "**" else 1))
        return bounds.keep(super().call_binop(context, operator, left, right))


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the answers for training, and here means nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _between(separator: str, parts: Iterable[Any]) -> Iterable[Any]:
    for index, part in enumerate(parts):
        if index:
            yield separator
        yield part


@pass_environment
def _join(environment: _Environment, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return environment.joined(_between(d, value))


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new, limit = str(text), str(old), str(new), -1 if count is None else count
    rendering.get().check_replace(text, old, new, limit)
    return text.replace(old, new, limit)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(text)
    margin = len(width) if isinstance(width, str) else width
    rendering.get().charge(len(text) + margin * (len(text.splitlines()) + 1))
    return FILTERS["indent"](text, width, first, blank)


def _format(format: Any, *args: Any, **kwargs: Any) -> str:
    rendering.get().check_format(str(format), (args, kwargs))
    return str(format) % (kwargs or args)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if not -20 <= precision <= 20:
        raise ModelFileError("the chat template rounds to more than 20 digits")
    return FILTERS["round"](value, precision, method)


@pass_environment
def _tojson(
    environment: _Environment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    options = {"ensure_ascii": False, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    if indent is None and separators is None:
        text = json.dumps(value, **options)
    else:
        # Indents and separators may come to far more than the value, so it is written bit by bit.
        text = environment.joined(json.JSONEncoder(**options).iterencode(value))
    return _NOT_PRINTABLE_ASCII.sub(_escaped, text) if ensure_ascii else text


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    marks = rendering.get().marks
    real = marks.real(character) if marks else character
    # A stand-in for a character that JSON would have left alone goes on standing in for it.
    return character if " " <= real <= "~" else json.dumps(real)[1:-1]


def _escape(value: Any) -> str:
    # Not as the markup that Jinja makes of it, which in turn escapes what it is joined with: prompts are not HTML.
    return str(FILTERS["escape"](value))


def _of_real(filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at letters in its own way, which stand-ins would disturb."""

    def on_real(value: Any, *args: Any, **kwargs: Any) -> Any:
        marks = rendering.get().marks
        if marks is None or not isinstance(value, str):
            return filter(value, *args, **kwargs)
        return marks.apply(lambda text: filter(text, *args, **kwargs), value)

    return on_real


def _raise_exception(message: Any) -> None:
    bounds = rendering.get()
    text = str(message)
    raise OptionError(f"the chat template refuses: {bounds.marks.real(text) if bounds.marks else text}")


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    return rendering.get().check(value)


def _guarded(filter: Callable[..., Any]) -> Callable[..., Any]:
    # `wraps` also carries over whether Jinja is to pass its environment or context.
    @wraps(filter)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        bounds = rendering.get()
        for value in (*args, *kwargs.values()):
            bounds.check(value)
        return bounds.keep(filter(*args, **kwargs))

    return guarded


@cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        finalize=_finalize,
        optimized=False,
    )
    own = {
        "e": _of_real(_escape),
        "escape": _of_real(_escape),
        "float": _of_real(FILTERS["float"]),
        "format": _format,
        "indent": _indent,
        "int": _of_real(FILTERS["int"]),
        "join": _join,
        "replace": _replace,
        "round": _round,
        "safe": str,
        "title": _of_real(FILTERS["title"]),
        "tojson": _tojson,
    }
    filters = {name: FILTERS[name] for name in _FILTERS} | own
    environment.filters = {name: _guarded(filter) for name, filter in filters.items()}
    environment.globals = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.globals["raise_exception"] = _raise_exception
    return environment
