"""A view and its static twin, and what happens to a view when its cell is run again."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from irkit.widgets import base


class Picture(base.View):
    _esm = "export default { render() {} }"

    def twin(self) -> str:
        return "<p>a picture</p>"


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Data and display id of each output, as they are published."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import RichOutput

    shown: list[tuple[dict[str, Any], Any]] = []

    def publish(self: Any, data: Any, metadata: Any = None, *, transient: Any = None, **_: Any) -> None:
        assert RichOutput(data)
        shown.append((data, (transient or {}).get("display_id")))

    shell = InteractiveShell.instance()
    monkeypatch.setattr(type(shell.display_pub), "publish", publish)
    monkeypatch.setattr(shell, "get_parent", dict, raising=False)
    yield shown
    InteractiveShell.clear_instance()


def run_cell(monkeypatch: pytest.MonkeyPatch, cell: str, execution: str) -> None:
    monkeypatch.setattr(base, "running", lambda: (cell, execution))


def test_a_view_is_displayed_once_with_its_twin_beside_it(displayed, monkeypatch):
    run_cell(monkeypatch, "a", "1")
    view = Picture()
    view.show()
    view._ipython_display_()  # the value of the same cell
    assert [sorted(data) for data, _ in displayed] == [
        ["application/vnd.jupyter.widget-view+json", "text/plain"],
        ["text/html", "text/plain"],
    ]
    assert displayed[1][0]["text/html"] == f'<div class="irkit-twin-{view.twin_id}"><p>a picture</p></div>'
    assert displayed[1][1] == view.twin_id
    view.refresh_twin()
    assert displayed[2][1] == view.twin_id
    run_cell(monkeypatch, "b", "2")
    view._ipython_display_()
    assert len(displayed) == 5


def test_running_a_cell_again_closes_what_it_showed(displayed, monkeypatch):
    first, second, elsewhere, later = (Picture() for _ in range(4))
    run_cell(monkeypatch, "again", "1")
    first.show()
    second.show()
    run_cell(monkeypatch, "other", "2")
    elsewhere.show()
    run_cell(monkeypatch, "again", "3")
    second.show()  # the same object: it stays
    later.show()
    assert [view.comm is None for view in (first, second, elsewhere, later)] == [True, False, False, False]


def test_where_a_part_is_missing_the_error_says_which_and_how_to_get_it():
    code = (
        "import sys; sys.modules['anywidget'] = None\ntry: import irkit.widgets.base\nexcept Exception as e: print(e)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "views in a notebook need anywidget, which comes with irkit: pip install irkit\n"
