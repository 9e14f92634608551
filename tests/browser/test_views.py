"""The attention and the lens view where they are used: in JupyterLab and Notebook 7, in a real browser."""

from typing import TYPE_CHECKING

import pytest
from driving import App, Jupyter, Kernel, Notebook, colours, painted
from playwright.sync_api import Locator, Page, expect

if TYPE_CHECKING:
    pass

ATTENTION = "a = s.trace('The cat sat on the mat. The cat sat', names='pattern').view(); a"
LENS = "v = s.lens('The capital of France is').view(); v"


def shown(notebook: Notebook, source: str) -> Locator:
    """The view that a cell shows."""
    view = notebook.run(source).locator(".irkit-view")
    view.wait_for()
    return view


def thumbnails(view: Locator) -> Locator:
    return view.locator("canvas").nth(0)


def whole_head(view: Locator) -> Locator:
    return view.locator("canvas").nth(1)


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_attention_is_painted_and_answers_pointer_and_keys(
    app: App, jupyter: Jupyter, kernel: Kernel, page: Page
) -> None:
    view = shown(jupyter.open(page, kernel, app=app), ATTENTION)
    assert painted(thumbnails(view)) > 0.5
    assert colours(thumbnails(view)) > 100
    expect(whole_head(view)).to_be_visible()
    expect(view.locator("table tr")).to_have_count(9)  # a heading, and the tokens with the greatest weights
    # The pointer over a thumbnail says its scores, over the map the weight; a click chooses, in Python too.
    thumbnails(view).hover(position={"x": 30, "y": 22})
    expect(view.locator(".irkit-tip")).to_contain_text("layer 0, head 0entropy")
    thumbnails(view).click(position={"x": 30, "y": 22})
    expect(view.locator("h4")).to_have_text("Layer 0, head 0")
    kernel.until("[a.layer, a.head] == [0, 0]")
    whole_head(view).hover(position={"x": 105, "y": 200})
    expect(view.locator(".irkit-tip")).to_contain_text("→")
    view.locator(".irkit-text span").nth(3).click()
    kernel.until("a.locked and a.token == 3")
    # Keys: the head in the grid, the token in the map.
    thumbnails(view).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(view.locator("h4")).to_have_text("Layer 1, head 1")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    kernel.until("[a.layer, a.head, a.token] == [1, 1, 4]")
    page.keyboard.press("Escape")
    kernel.until("not a.locked")
    # Python chooses, and the page follows.
    kernel.ask("exec('a.sort = \"entropy\"; a.layer = 7', globals())")
    expect(view.locator("h4")).to_have_text("Layer 7, head 1")
    expect(view.get_by_label("Sort by")).to_have_value("entropy")
