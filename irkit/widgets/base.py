"""What the views share: the text of their modules, a static twin beside each, and an end when the cell is run again."""

from __future__ import annotations

import base64
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any
from uuid import uuid4

from irkit.errors import IrkitError, OptionError

try:
    import anywidget
    import traitlets
    from IPython.core.display import HTML
    from IPython.core.display_functions import display, publish_display_data
    from IPython.core.getipython import get_ipython
    from ipywidgets import Widget
except ImportError as error:
    raise OptionError(f"views in a notebook need {error.name}, which comes with irkit: pip install irkit") from error


@cache
def source(*names: str) -> str:
    """The texts of these files of the package, one after the other."""
    return "\n".join(files("irkit.widgets").joinpath(name).read_text("utf-8") for name in names)


class View(anywidget.AnyWidget):
    """A widget with a static twin: HTML without script, which a saved or exported notebook shows in its place.

    The twin is an output beside the widget's own, in a `div` of the class `irkit-twin-<twin_id>`, which the widget's
    JavaScript hides while it is there. Running a cell again closes the views that it showed before.
    """

    twin_id = traitlets.Unicode().tag(sync=True)
    _wholes: tuple[Widget, ...] = ()
    """What it was displayed as."""

    def __init__(self, **traits: Any) -> None:
        super().__init__(**{"twin_id": uuid4().hex, **traits})
        self._shown_by: str | None = None
        beside_cells(self)

    def twin(self) -> str:
        """The view as it is now, as HTML."""
        raise NotImplementedError

    def whole(self) -> Widget:
        """What is displayed: the view itself, or a box of widgets with it inside."""
        return self

    def show(self) -> None:
        """Display the view and its twin, now; as the last value of the same cell it is not displayed again."""
        cell, execution = running()
        self._shown_by = execution
        _take_over(self, cell, execution)
        whole = self.whole()
        self._wholes = (*self._wholes, whole)
        show(whole, self._framed(), self.twin_id)

    def refresh_twin(self) -> None:
        """Put what the view shows now into its twin, wherever that was displayed."""
        if not self._wholes:
            return
        display(HTML(self._framed()), display_id=self.twin_id, update=True)

    def succeed(self, old: View) -> None:
        """Take over what should last of a view that an earlier run of the cell showed, and that is closed now."""

    def close(self) -> None:
        """Take the view away, and what it was displayed with."""
        if self.comm is None:  # it was closed, or never made
            return
        for whole in self._wholes:
            close_tree(whole, but=self)
        self._wholes = ()
        self.layout.close()
        super().close()

    def _framed(self) -> str:
        return f'<div class="irkit-twin-{self.twin_id}">{self.twin()}</div>'

    def _ipython_display_(self) -> None:
        _, execution = running()
        again, self._shown_by = self._shown_by is not None and self._shown_by == execution, None
        if not again:
            self.show()


def show(widget: Widget, twin: str, twin_id: str) -> None:
    """Display a widget, and beside it its static twin, an HTML output of this display id."""
    # AnyWidget's method gives data and metadata, other widgets' the data alone; the view's own would ask for itself.
    bundle: Any = widget._repr_mimebundle_()
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
    publish_display_data(data, metadata)
    display(HTML(twin), display_id=twin_id)


def close_tree(widget: Any, but: Widget | None = None) -> None:
    """Close a widget with its children, layouts and styles; a page that is loaded asks for each that is left."""
    if widget is but:
        return
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        if isinstance(part, Widget):
            close_tree(part, but)
    widget.close()


def beside_cells(widget: Widget) -> None:
    """Have what the page says to a widget taken up where the page asks for, beside a cell that runs.

    ipykernel 7.4 hands it to the shell that last said something to the page about the widget. That is the cells' own as
    often as not, and Stop, like all else, would wait until the cell has ended.
    """
    comm: Any = widget.comm
    comm._reply_subshell_for = lambda data, asked_for: asked_for


def problem(error: Exception) -> str:
    """What a page says of an error: irkit's speak for themselves, and what nobody expected comes with its kind."""
    return str(error) if isinstance(error, IrkitError) else f"{type(error).__name__}: {error}"


def running() -> tuple[str | None, str | None]:
    """The ids of the cell that is run, where the front end names it, and of this execution of it."""
    parent = getattr(get_ipython(), "get_parent", dict)() or {}
    return parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id")


_shown: dict[str, tuple[str | None, list[View]]] = {}
"""By cell: its last execution that showed views, and those."""


def _take_over(view: View, cell: str | None, execution: str | None) -> None:
    """Close what an earlier execution of `cell` showed, for `view` is shown there now."""
    if cell is None:
        return
    before, views = _shown.get(cell, (execution, []))
    if before != execution:
        for old in views:
            if old is not view:
                view.succeed(old)
                old.close()
        views = []
    _shown[cell] = execution, [*views, view]


def picture(figure: Any, alt: str) -> str:
    """A matplotlib Figure as an HTML image that holds its own data."""
    data = base64.b64encode(figure._repr_png_()).decode()
    return f'<img style="max-width:100%" alt="{escape(alt)}" src="data:image/png;base64,{data}">'
