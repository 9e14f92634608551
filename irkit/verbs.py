"""The verbs: what a `Session` can do, read off its public methods.

The command line and the server are made from these descriptions, so a verb, an option, a default, a bound
or a help text is written once, in `irkit.session` and `irkit.options`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from irkit.options import Options
from irkit.results import Generation
from irkit.session import Session

REQUIRED: Any = inspect.Parameter.empty
"""The default of a parameter that has none."""


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a verb."""

    name: str
    annotation: Any
    """Its type, with the bounds and validators that pydantic reads."""
    default: Any
    """`REQUIRED` if there is none."""
    help: str
    minimum: float | None
    """The least value it may have, if it is a bounded number."""
    maximum: float | None
    """The greatest value it may have, if it is a bounded number."""
    option: bool
    """Whether it is a field of an option model, not an argument of the method itself."""


@dataclass(frozen=True)
class Verb:
    """One public method of `Session`."""

    name: str
    doc: str
    parameters: tuple[Parameter, ...]
    result: Any
    """What it returns, as annotated."""

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring."""
        return " ".join(self.doc.partition("\n\n")[0].split())

    @property
    def streams(self) -> bool:
        """Whether its result is made token by token."""
        return self.result is Generation


@cache
def verbs() -> MappingProxyType[str, Verb]:
    """Every verb by name, in the order of `Session`'s methods."""
    methods = {name: method for name, method in vars(Session).items() if inspect.isfunction(method)}
    mine = {name: m for name, m in methods.items() if name[0] != "_" and not hasattr(m, "__python_only__")}
    return MappingProxyType({name: _verb(method) for name, method in mine.items()})


def load_parameters() -> tuple[Parameter, ...]:
    """The model, and the options of opening it: the parameters of `Session` itself."""
    return _parameters(Session.__init__)


def option_parameters(model: type[Options]) -> tuple[Parameter, ...]:
    """The fields of an option model."""
    return tuple(
        _parameter(name, field.rebuild_annotation(), field.get_default(), field, option=True)
        for name, field in model.model_fields.items()
    )


def _verb(method: Callable[..., Any]) -> Verb:
    result = inspect.signature(method).return_annotation
    return Verb(method.__name__, inspect.getdoc(method) or "", _parameters(method), result)


def _parameters(method: Callable[..., Any]) -> tuple[Parameter, ...]:
    options: type[Options] = getattr(method, "__options__", Options)
    arguments = tuple(
        _parameter(
            parameter.name,
            parameter.annotation,
            parameter.default,
            FieldInfo.from_annotation(parameter.annotation),
            option=False,
        )
        for parameter in inspect.signature(method).parameters.values()
        if parameter.name != "self" and parameter.name not in options.model_fields
    )
    return arguments + option_parameters(options)


def _parameter(name: str, annotation: Any, default: Any, field: FieldInfo, *, option: bool) -> Parameter:
    text = (field.description or "").replace("\n", " ")
    return Parameter(name, annotation, default, text, _bound(field, "ge"), _bound(field, "le"), option)


def _bound(field: FieldInfo, which: str) -> float | None:
    found = (getattr(item, which, None) for item in field.metadata)
    return next((bound for bound in found if bound is not None), None)
