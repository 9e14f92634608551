"""The attention and the lens view where they are used: in JupyterLab and Notebook 7, in a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from driving import App, Jupyter, Kernel, Notebook, colours, hard_to_read, painted
from playwright.sync_api import Browser, Locator, Page, expect

ATTENTION = "a = s.trace('The cat sat on the mat. The cat sat', names='pattern').view(); a"
LENS = "v = s.lens('The capital of France is').view(); v"


def shown(notebook: Notebook, source: str | int) -> Locator:
    """The view that a cell shows."""
    view = notebook.run(source).locator(".irkit-view")
    view.wait_for()
    return view


def thumbnails(view: Locator) -> Locator:
    return view.locator("canvas").nth(0)


def whole_head(view: Locator) -> Locator:
    return view.locator("canvas").nth(1)


@pytest.fixture
def dark(notebook: Notebook) -> Iterator[None]:
    notebook.dark()
    yield
    notebook.dark(False)


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
    kernel.run("a.sort = 'entropy'; a.layer = 7")
    expect(view.locator("h4")).to_have_text("Layer 7, head 1")
    expect(view.get_by_label("Sort by")).to_have_value("entropy")


def test_attention_of_512_tokens_has_no_element_a_cell(notebook: Notebook, kernel: Kernel) -> None:
    view = shown(
        notebook,
        "ids = (s.tokenize('The cat sat on the mat. ') * 80)[:512]\nt = s.trace(ids, names='pattern')\na = t.view(); a",
    )
    assert kernel.ask("[len(ids), len(a.info['layers']), len(a.info['heads'])]") == [512, 30, 9]
    assert view.locator("*").count() < 512 + 200  # the text's tokens, and all else
    assert painted(thumbnails(view)) > 0.3
    assert colours(whole_head(view)) > 100


def test_lens_follows_a_token(notebook: Notebook, kernel: Kernel) -> None:
    view = shown(notebook, LENS)
    grid = view.locator("canvas").first
    assert painted(grid) > 0.5
    expect(view.locator("table tr").nth(1)).to_contain_text("·Paris")
    # The pointer looks, a click locks, keys move.
    grid.hover(position={"x": 60, "y": 30})
    expect(view.locator(".irkit-tip")).to_contain_text("KL")
    expect(view.locator("h4").first).to_contain_text("Layer 29, after 0")
    grid.click(position={"x": 60, "y": 30})
    kernel.until("v.locked and [v.layer, v.position] == ['29', 0]")
    notebook.page.keyboard.press("ArrowRight")
    notebook.page.keyboard.press("ArrowDown")
    expect(view.locator("h4").first).to_contain_text("Layer 28, after 1")
    # The rank of a token is asked of the kernel; what is none is said.
    view.get_by_label("Token to follow").fill(" Rome")
    view.get_by_role("button", name="Follow").click()
    expect(view.get_by_text("Rank of “·Rome”")).to_be_visible()
    assert kernel.ask("v.followed") == " Rome"
    view.get_by_label("Token to follow").fill(" Rome and more")
    notebook.page.keyboard.press("Enter")
    expect(view.get_by_role("status")).to_contain_text("tokens")


@pytest.mark.usefixtures("dark")
def test_in_the_dark_everything_can_be_read(notebook: Notebook) -> None:
    for source in (ATTENTION, LENS):
        view = shown(notebook, source)
        assert view.evaluate("(it) => getComputedStyle(it).backgroundColor") in ("rgb(17, 17, 17)", "rgb(33, 33, 33)")
        assert painted(view.locator("canvas").first) > 0.5
        assert hard_to_read(view) == []
    notebook.dark(False)
    assert hard_to_read(view) == []


def test_a_canvas_that_was_out_of_sight_is_painted_again(notebook: Notebook) -> None:
    notebook.windowed()
    view = shown(notebook, ATTENTION)
    below = [notebook.add("\n" * 12) for _ in range(20)]
    notebook.scroll_to(below[-1])
    expect(view).not_to_be_in_viewport()
    notebook.scroll_to(1)
    expect(view).to_be_in_viewport()
    assert painted(thumbnails(view)) > 0.5


def test_running_a_cell_again_closes_its_view(notebook: Notebook, kernel: Kernel) -> None:
    kernel.run("kept = []")
    cell = notebook.add(f"{ATTENTION}\nkept.append(a); a")
    shown(notebook, cell)
    view = shown(notebook, cell)
    expect(view).to_have_count(1)
    assert kernel.ask("[each.comm is None for each in kept]") == [True, False]


def test_a_reloaded_page_has_the_view_and_another_kernel_its_twin(
    jupyter: Jupyter, notebook: Notebook, kernel: Kernel
) -> None:
    view = shown(notebook, ATTENTION)
    twin = notebook.output(1).locator("[class^='irkit-twin-']")
    expect(twin).to_be_hidden()
    kernel.run("a.layer = 5")
    expect(view.locator("h4")).to_contain_text("Layer 5")
    notebook.save()
    notebook.reload()
    expect(view.locator("h4")).to_contain_text("Layer 5")
    assert painted(thumbnails(view)) > 0.5
    expect(twin).to_be_hidden()
    copy = jupyter.root / f"copy-{notebook.path.name}"
    shutil.copy(notebook.path, copy)
    other = jupyter.start_kernel()
    jupyter.open(notebook.page, other, copy)
    expect(view).to_have_count(0)
    expect(twin).to_be_visible()
    expect(twin.locator("img").first).to_be_visible()
    other.close()


def test_an_exported_page_without_script_and_network_shows_the_twins(
    notebook: Notebook, browser: Browser, tmp_path: Path
) -> None:
    shown(notebook, ATTENTION)
    shown(notebook, LENS)
    page = notebook.export()
    for script in (False, True):
        with browser.new_context(java_script_enabled=script, offline=True) as context:
            opened = context.new_page()
            opened.goto(page.as_uri(), wait_until="commit")
            attention, lens = opened.locator("[class^='irkit-twin-']").all()
            expect(attention.locator("img").first).to_be_visible()
            assert painted(attention.locator("img").first) > 0.1
            expect(attention).to_contain_text("induction score: L")
            expect(lens.locator("table")).to_be_visible()
            expect(lens.locator("td").get_by_text("·Paris").first).to_be_visible()
