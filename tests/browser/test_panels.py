"""The steering panel, the cache view and the watch view where they are used: in JupyterLab, in a real browser."""

import time

from driving import Kernel, Notebook, colours, painted
from playwright.sync_api import Browser, Locator, Page, expect

STEER = """
import numpy as np
from irkit.analysis import steering_vector
joy = steering_vector(s, "I love this, it is wonderful", "I hate this, it is terrible", 14)
p = s.steering({"joy": joy}, prompt="I think dogs are", num_predict=24); p
"""
CACHE = """
_ = s.generate("The capital of France is a city on a river,", temperature=0, num_predict=12).wait()
v = s.cache.view(); v
"""


def shown(notebook: Notebook, source: str, name: str) -> Locator:
    """The view that a cell shows."""
    view = notebook.run(source).locator(f".irkit-{name}")
    view.wait_for()
    return view


def texts(view: Locator) -> list[str]:
    return view.locator(".irkit-answer").all_inner_texts()


def per_second(times: list[float]) -> int:
    """The most messages within one second."""
    return max((sum(begin <= each < begin + 1 for each in times) for begin in times), default=0)


def test_a_slider_steers_the_next_answer(notebook: Notebook, kernel: Kernel, page: Page) -> None:
    view = shown(notebook, STEER, "steering")
    notebook.messages.clear()
    view.get_by_role("button", name="Answer", exact=True).click()
    expect(view.locator(".irkit-answer").nth(0)).not_to_be_empty()
    kernel.until("not p.running and p.answers")
    expect(view.get_by_text("the same: nothing is edited")).to_be_visible()
    before = texts(view)
    # The slider by its keys; the answers begin anew by themselves, and part.
    view.get_by_label("Strength of joy", exact=True).focus()
    for _ in range(24):
        page.keyboard.press("ArrowRight")
    kernel.until("p.vectors[0]['strength'] > 2")
    kernel.until("not p.running and not p.answers['same']")
    expect(view.get_by_text("They differ from token")).to_be_visible()
    after = texts(view)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert kernel.ask("[p.unedited.text, p.edited.text]") == after
    expect(view.locator(".irkit-first")).to_have_count(2)
    # What both said of the token at which they part, as numbers.
    rows = view.locator(".irkit-compared tr")
    expect(rows).to_have_count(9)
    expect(rows.filter(has_text="●")).not_to_have_count(0)
    # A click takes a head out; the keys choose, the space bar puts it back.
    kernel.ask("exec('p.live = False', globals())")
    grid = view.locator("canvas")
    empty = painted(grid)
    box = grid.bounding_box()
    assert box
    grid.click(position={"x": 70, "y": 24})
    kernel.until("p.heads == [[0, 0, 0]]")
    expect(view.get_by_text("layer 0, head 0: out")).to_be_visible()
    assert painted(grid) != empty
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    kernel.until("p.heads == [[0, 0, 0], [1, 1, 0]]")
    assert kernel.ask("len(p.edits)") == 4
    view.get_by_role("button", name="Put all back").click()
    kernel.until("p.heads == [] and len(p.edits) == 1")


def test_stop_ends_both_answers(notebook: Notebook, kernel: Kernel, page: Page, browser: Browser) -> None:
    view = shown(notebook, STEER.replace("24); p", "2000, logit_bias={2: -1e4}); p"), "steering")
    notebook.messages.clear()
    kernel.ask("exec('p.vectors = [{**p.vectors[0], \"strength\": 1.0}]', globals())")
    view.get_by_role("button", name="Answer", exact=True).click()
    kernel.until("p.edited is not None and len(p.edited.partial_tokens) > 30")
    expect(view.locator(".irkit-answer").nth(1).locator("span").nth(20)).to_be_attached()
    assert 0 < per_second([when for when, _ in notebook.messages]) < 20
    view.get_by_role("button", name="Stop").click()
    kernel.until("p.unedited.done and p.edited.done and not p.running", 5)
    counted = kernel.ask("[len(p.unedited.partial_tokens), len(p.edited.partial_tokens)]")
    time.sleep(0.5)
    assert kernel.ask("[len(p.unedited.partial_tokens), len(p.edited.partial_tokens)]") == counted
    expect(view.get_by_text("cancelled")).to_have_count(2)
    # Loaded again, the page shows the answers as they stand; exported, without script, too.
    said = kernel.ask("p.edited.text")
    exported = notebook.export()
    notebook.reload()
    expect(page.locator(".irkit-steering .irkit-answer").nth(1)).to_have_text(said)
    with browser.new_context(java_script_enabled=False, offline=True) as context:
        opened = context.new_page()
        opened.goto(exported.as_uri(), wait_until="commit")
        expect(opened.get_by_text("+1 × joy at layer 14")).to_be_visible()
        expect(opened.locator("[class^='irkit-twin-'] u")).not_to_have_count(0)


def test_the_cache_is_rewound_forked_and_dropped_from(notebook: Notebook, kernel: Kernel, page: Page) -> None:
    view = shown(notebook, CACHE, "cache")
    canvas = view.locator("canvas").nth(0)
    held = kernel.ask("len(s.cache)")
    expect(view.get_by_text(f"{held} of 2,048 tokens")).to_be_visible()
    assert colours(canvas) > 50
    keys = colours(canvas)
    view.get_by_label("Length of").select_option("values")
    kernel.until("v.shown == 'values'")
    view.locator(".irkit-bar select").nth(1).select_option("2")
    kernel.until("v.head == 2")
    assert colours(canvas) != keys or colours(canvas) > 50
    # The text and the map are one choice; keys move it, with Shift they widen it.
    view.locator(".irkit-text span").nth(3).click()
    kernel.until("[v.position, v.until] == [3, 3]")
    view.get_by_role("button", name="Fork here").click()
    kernel.until("list(v.forks) == [1] and len(v.forks[1]) == 4")
    expect(view.get_by_text("4 tokens · shared with the cache")).to_be_visible()
    canvas.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("ArrowUp")
    kernel.until("[v.position, v.until, v.layer] == [4, 5, 1]")
    view.get_by_role("button", name="Drop 2 tokens").click()
    kernel.until(f"len(s.cache) == {held - 2}")
    expect(view.get_by_text("dropped")).to_be_visible()
    view.get_by_role("button", name="Rewind to here").click()
    kernel.until("len(s.cache) == 5")
    view.get_by_role("button", name="Put fork 1 back").click()
    kernel.until("len(s.cache) == 4 and s.cache.provenance == 'clean'")
    expect(view.get_by_text("4 of 2,048 tokens")).to_be_visible()
    view.get_by_text("As a table").click()
    expect(view.locator("details table tr")).to_have_count(31)


def test_what_a_session_answers_is_watched(notebook: Notebook, kernel: Kernel, page: Page) -> None:
    view = shown(notebook, "server = s.serve(port=0); w = s.watch(); w", "watch")
    expect(view.get_by_text("Nothing asked yet")).to_be_visible()
    notebook.messages.clear()
    kernel.ask(
        'exec(\'import httpx, threading; body = dict(model=server.model, stream=False, prompt="Name a river.", '
        "options=dict(num_predict=40, temperature=0)); ask = threading.Thread(target=lambda: "
        'httpx.post(server.url + "/api/generate", json=body, timeout=60)); ask.start()\', globals())'
    )
    expect(view.get_by_role("option")).to_have_count(1)
    expect(view.get_by_role("option")).to_contain_text("POST /api/generate")
    kernel.until("len(w.answers) == 1 and not w.answers[0].live")
    assert 0 < per_second([when for when, _ in notebook.messages]) < 20
    tokens = view.locator(".irkit-tokens .irkit-t")
    expect(tokens).to_have_count(kernel.ask("len(w.answers[0].tokens)"))
    kernel.ask("exec('s.generate(\"Two\", num_predict=3).wait()', globals())")
    expect(view.get_by_role("option").nth(0)).to_contain_text("this notebook")
    # Keys: the list, the tokens, and Enter to look inside.
    view.get_by_role("listbox").focus()
    page.keyboard.press("ArrowDown")
    kernel.until("w.chosen == 1 and not w.follow")
    expect(view.locator("h4")).to_contain_text("POST /api/generate")  # else the keys are still the other answer's
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(view.locator(".irkit-pinned .irkit-bars")).to_have_count(1)  # nobody asked for more with the answer
    # What is sent once more, as for another page, leaves the choice as it is.
    view.locator(".irkit-here").evaluate("(token) => token.setAttribute('data-old', '')")
    kernel.run("w._send_whole()")
    expect(view.locator("[data-old]")).to_have_count(0)
    expect(view.locator(".irkit-here")).to_be_focused()
    page.keyboard.press("Enter")
    inside = page.locator(".irkit-step")
    inside.locator(".irkit-attention").wait_for()
    assert painted(inside.locator("canvas").nth(0)) > 0.1
    kernel.ask("exec('server.stop()', globals())")
