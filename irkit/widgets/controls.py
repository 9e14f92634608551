"""Controls made from an options model: a slider, a box or a drop-down for each field, with its bounds and its help."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from ipywidgets import (
    Accordion,
    BoundedFloatText,
    BoundedIntText,
    Checkbox,
    Dropdown,
    FloatSlider,
    IntSlider,
    Layout,
    TagsInput,
    VBox,
)

from irkit.options import GenerateOptions, Options
from irkit.verbs import Parameter, option_parameters
from irkit.widgets import base

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "precise": {"temperature": 0.3, "top_p": 0.8},
    "balanced": {},
    "creative": {"temperature": 1.2, "top_k": 100, "top_p": 1.0, "min_p": 0.05},
}
"""What each preset changes of the values that the controls begin with."""
_FIRST = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "num_predict", "seed")
"""The options that are seen at once, in this order; the others are folded away."""
_WIDEST = 20
"""The widest range that a slider is good for."""
_OWN = "own values"


@dataclass(frozen=True, eq=False)
class Controls:
    """Controls, to be displayed as `box`, and what they say."""

    box: VBox
    widgets: Mapping[str, Any]
    """The control of each option that has one."""
    preset: Dropdown

    def read(self) -> dict[str, Any]:
        """What each control says, by option."""
        return {name: _value(widget) for name, widget in self.widgets.items()}

    def set(self, **values: Any) -> None:
        """Move controls to these values; those that bounds do not allow stop at the bound."""
        for name, value in values.items():
            self.widgets[name].value = list(value) if isinstance(value, tuple) else value

    def observe(self, call: Callable[[dict[str, Any]], Any]) -> None:
        """Have `call` told what changed, `{option: value}`, whenever somebody moves a control."""
        for name, widget in self.widgets.items():
            widget.observe(lambda _, name=name, widget=widget: call({name: _value(widget)}), "value")

    def close(self) -> None:
        """Take the controls away."""
        base.close_tree(self.box)


def sampling(model: type[Options] = GenerateOptions, values: Mapping[str, Any] | None = None) -> Controls:
    """Controls for the fields of `model`, beginning with `values` where they are not the model's own defaults.

    Fields that no simple control can set, such as `logit_bias`, are left to Python.
    """
    parameters = option_parameters(model)
    layout = Layout(width="auto", max_width="440px")
    made = {parameter.name: control(parameter, layout) for parameter in parameters}
    widgets = {name: widget for name, widget in made.items() if widget is not None}
    preset = Dropdown(options=[*PRESETS, _OWN], value="balanced", description="preset", layout=layout, style=_STYLE)
    first = [widgets[name] for name in _FIRST if name in widgets]
    more = [widget for name, widget in widgets.items() if name not in _FIRST]
    rest = Accordion([VBox(more)], titles=["More"], selected_index=None, layout=Layout(max_width="440px"))
    controls = Controls(VBox([preset, *first, *([rest] if more else [])]), widgets, preset)
    controls.set(**{name: value for name, value in (values or {}).items() if name in widgets})
    begun = controls.read()
    touched = {name for each in PRESETS.values() for name in each} & widgets.keys()
    meant = {name: {each: chosen.get(each, begun[each]) for each in touched} for name, chosen in PRESETS.items()}

    def choose(change: Any) -> None:
        if change["new"] in meant and not holds(change["new"]):
            controls.set(**meant[change["new"]])

    def holds(name: str) -> bool:
        now = controls.read()
        return all(math.isclose(now[each], value, abs_tol=1e-9) for each, value in meant[name].items())

    def moved(_: Any) -> None:
        if preset.value not in meant or not holds(preset.value):
            preset.value = next(filter(holds, meant), _OWN)

    preset.observe(choose, "value")
    controls.observe(moved)
    return controls


def folded(controls: Controls, title: str) -> Accordion:
    """The controls under a title, which a click opens."""
    return Accordion([controls.box], titles=[title], selected_index=None)


_STYLE = {"description_width": "9em"}


def control(parameter: Parameter, layout: Layout) -> Any:
    """A control for one option, with its default, bounds and help; None if its type has no simple one."""
    kind = _kind(parameter.annotation)
    label: dict[str, Any] = {"description": parameter.name, "tooltip": parameter.help}
    look = {"style": _STYLE, "layout": layout}
    start = parameter.default
    least, most = parameter.minimum, parameter.maximum
    if kind in (int, float) and least is not None and most is not None:
        bounds: dict[str, Any] = {"min": kind(least), "max": kind(most), "value": start}
        wide = most - least > _WIDEST
        if kind is int:
            return (BoundedIntText if wide else IntSlider)(**bounds, **label, **look)
        if wide:
            return BoundedFloatText(**bounds, step=0.1, **label, **look)
        return FloatSlider(**bounds, step=0.01 if most - least <= 1 else 0.05, **label, **look)
    if kind is bool:
        return Checkbox(start, **label, **look, indent=True)
    if get_origin(kind) is Literal:
        return Dropdown(options=list(get_args(kind)), value=start, **label, **look)
    if get_origin(kind) is tuple and _kind(get_args(kind)[0]) is str:
        # A TagsInput has no description of its own: what it is stands in it until something is written.
        return TagsInput(
            value=list(start),
            placeholder=f"{parameter.name}: text, Enter",
            tooltip=parameter.help,
            layout=Layout(max_width="440px", border="1px solid var(--jp-border-color2, #d0d7de)"),
        )
    return None


def _kind(annotation: Any) -> Any:
    """The type within what annotates it."""
    while hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return None
    return annotation


def _value(widget: Any) -> Any:
    """What a control says; a slider's page counts its steps, and gives 1.0000000000000002 for 1."""
    if isinstance(widget, TagsInput):
        return tuple(widget.value)
    return round(widget.value, 9) if isinstance(widget.value, float) else widget.value
