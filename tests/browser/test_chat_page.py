"""The chat, talked to in JupyterLab and Notebook 7 in a real browser, on the real model."""

from collections.abc import Callable, Iterator

import pytest
from driving import App, Jupyter, Kernel, Notebook, hard_to_read, painted
from playwright.sync_api import Browser, Page, expect

MOST_A_SECOND = 20
"""Messages of widgets, as many as a front end takes easily."""
STORY = "Tell me a long story about a ship."


class Talk:
    """A chat in a page, and the answers of the session behind it, as the engine makes them."""

    def __init__(self, notebook: Notebook, kernel: Kernel, options: str) -> None:
        self.notebook, self.kernel, self.page = notebook, kernel, notebook.page
        # Nothing of the model's own ends an endless answer.
        kernel.run("endless = {'logit_bias': {id: -1e4 for id in s.model.tokenizer.eog_ids}}; answers = []")
        kernel.run("stop_observing = s.observe(lambda asked: answers.append(asked.generation))")
        self.cell = notebook.add(f"c = s.chat({options}); c")
        self.output = notebook.run(self.cell)
        self.view = self.output.locator(".irkit-chat")
        self.input = self.view.get_by_label("Message", exact=True)
        self.answers = self.view.locator("article.irkit-its")
        self.send_button = self.view.locator(".irkit-send")
        self.stop_button = self.view.locator(".irkit-stop")
        self.colour = self.view.locator(".irkit-bar").get_by_label("Tokens")
        self.view.wait_for()

    def send(self, text: str) -> None:
        self.input.fill(text)
        self.input.press("Enter")

    def ask(self, text: str) -> str:
        """Says something, and returns the whole answer."""
        before = self.answers.count()
        self.send(text)
        expect(self.answers).to_have_count(before + 1)
        self.wait_for_end()
        return self.kernel.ask("c.messages[-1]['content']")

    def wait_for_words(self, count: int = 200) -> None:
        """Until so many characters of the last answer are to be seen."""
        enough = "([view, count]) => [...view.querySelectorAll('.irkit-its')].at(-1)?.textContent.length > count"
        self.page.wait_for_function(enough, arg=[self.view.element_handle(), count])

    def wait_for_end(self) -> None:
        expect(self.answers.last).to_be_visible()
        expect(self.stop_button).to_be_hidden()
        expect(self.send_button).to_be_visible()

    def made(self) -> int:
        """How many tokens the engine has made of the last answer."""
        return self.kernel.ask("len(answers[-1]._tokens)")

    def assert_engine_stopped(self) -> None:
        self.kernel.until("answers[-1].done")
        assert self.kernel.ask("answers[-1].finish_reason") == "cancelled"
        # What was queued on the device's thread behind it is done too, and then nothing more is made.
        self.kernel.run("s.model.submit(lambda: None).result(60)")
        before = self.made(), self.kernel.ask("len(s.cache.ids)")
        self.page.wait_for_timeout(500)
        assert (self.made(), self.kernel.ask("len(s.cache.ids)")) == before
        assert 0 < before[0] < 1500


@pytest.fixture
def talk(jupyter: Jupyter, kernel: Kernel, page: Page) -> Iterator[Callable[..., Talk]]:
    """Opens a chat with these options in an app."""

    def open_chat(options: str = "temperature=0, num_predict=40", app: App = "lab") -> Talk:
        return Talk(jupyter.open(page, kernel, app=app), kernel, options)

    yield open_chat
    kernel.run("c.stop(); c.wait(60); stop_observing()")


ENDLESS = "temperature=0, num_predict=1500, **endless"


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_text_streams_in_few_messages(app: App, talk: Callable[..., Talk]) -> None:
    chat = talk("temperature=0, num_predict=250, **endless", app)
    chat.view.evaluate("""(view) => {
        window.lengths = [];
        new MutationObserver(() => window.lengths.push(view.querySelector(".irkit-md")?.textContent.length ?? 0))
            .observe(view, { subtree: true, childList: true, characterData: true });
    }""")
    del chat.notebook.messages[:]
    text = chat.ask(STORY)
    grown = [length for length in sorted(set(chat.page.evaluate("window.lengths"))) if length]
    assert len(grown) > 4
    assert chat.kernel.ask("len(answers[-1].tokens)") == 250
    expect(chat.answers.last.locator(".irkit-md")).to_contain_text(text.split()[-1])
    expect(chat.answers.last).to_contain_text("tokens/s")
    expect(chat.view).to_contain_text("of 2,048 tokens")
    ours = chat.kernel.ask("c.comm.comm_id").encode()  # views of other notebooks on this kernel may be told things too
    times = [when for when, data in chat.notebook.messages if ours in data]
    assert len(times) > 4
    assert max(sum(begin <= when < begin + 1 for when in times) for begin in times) < MOST_A_SECOND


def test_stop_ends_the_computation(talk: Callable[..., Talk]) -> None:
    chat = talk(ENDLESS)
    chat.send(STORY)
    chat.wait_for_words()
    chat.stop_button.click()
    chat.assert_engine_stopped()
    chat.wait_for_end()
    text = chat.kernel.ask("c.messages[-1]['content']")
    assert len(text) > 100
    expect(chat.answers.last).to_contain_text(text.split()[-1])
    # And it goes on from there.
    chat.kernel.run("c.controls.set(num_predict=10)")
    chat.ask("Go on.")
    assert chat.kernel.ask("[m['role'] for m in c.messages]") == ["user", "assistant"] * 2


def test_stop_while_another_cell_runs(talk: Callable[..., Talk]) -> None:
    chat = talk(ENDLESS)
    other = chat.notebook.start(
        "import threading; gate = threading.Event(); print('waits', flush=True); gate.wait(120)"
    )
    expect(other).to_contain_text("waits")
    chat.send(STORY)
    chat.wait_for_words()
    chat.stop_button.click()
    chat.assert_engine_stopped()
    chat.wait_for_end()
    assert not chat.kernel.ask("gate.is_set()")
    chat.kernel.run("gate.set()")
    expect(other).to_contain_text("True")


def test_a_slider_changes_the_answer_while_it_is_made(talk: Callable[..., Talk]) -> None:
    chat = talk("temperature=0, num_predict=60, seed=1, **endless")
    first = chat.ask(STORY)
    chat.output.get_by_text("Sampling", exact=True).click()
    slider = chat.output.get_by_role("slider").first
    expect(chat.output.get_by_text("temperature")).to_be_visible()
    slider.focus()
    # The next answer is another, with the same seed.
    slider.press("End")
    chat.kernel.until("c.controls.read()['temperature'] > 2")
    chat.answers.last.get_by_role("button", name="Answer once more").click()
    chat.page.wait_for_function("(view) => view.textContent.includes('2/2')", arg=chat.view.element_handle())
    chat.wait_for_end()
    assert chat.kernel.ask("c.messages[-1]['content']") != first
    # And so is the rest of one that is being made: it begins as the greedy one does.
    slider.focus()
    slider.press("Home")
    chat.kernel.until("c.controls.read()['temperature'] == 0")
    chat.kernel.run("c.controls.set(num_predict=1500)")
    chat.answers.last.get_by_role("button", name="Answer once more").click()
    chat.page.wait_for_function("(view) => view.textContent.includes('3/3')", arg=chat.view.element_handle())
    chat.wait_for_words(len(first))
    slider.focus()
    slider.press("End")
    chat.kernel.until("c.controls.read()['temperature'] > 2")
    chat.kernel.until(f"answers[-1].done or len(answers[-1]._tokens) > {chat.made() + 100}")
    chat.kernel.run("turned = answers[-1]; c.stop(); c.wait(60); made = len(turned.tokens)")
    chat.kernel.run("greedy = s.fork().respond(c.messages[:-1], temperature=0, num_predict=made, **endless).wait()")
    same = "[one.id == other.id for one, other in zip(greedy.tokens, turned.tokens)]"
    assert chat.kernel.ask(f"all({same}[:30]) and not all({same})")


def test_a_token_opens_and_another_goes_on_from_it(talk: Callable[..., Talk]) -> None:
    chat = talk()
    first = chat.ask("What is the capital of France?")
    chat.colour.select_option("probability")
    tokens = chat.answers.last.locator(".irkit-t")
    expect(tokens).to_have_count(chat.made())
    words = tokens.all_inner_texts()
    tokens.nth(3).hover()
    expect(chat.view.locator(".irkit-tip")).to_contain_text("%")
    expect(chat.view.locator(".irkit-tip tr")).not_to_have_count(0)
    tokens.nth(3).click()
    panel = chat.answers.last.locator(".irkit-pinned")
    expect(panel).to_contain_text("In place of")
    # What the kernel computes of that step: attention, lens, cache.
    step = chat.output.locator(".irkit-step")
    expect(step.locator(".irkit-attention")).to_be_visible()
    assert painted(step.locator(".irkit-attention canvas").first) > 0.3
    step.get_by_role("tab", name="Logit lens").click()
    expect(step.locator(".irkit-lens")).to_be_visible()
    assert painted(step.locator(".irkit-lens canvas").first) > 0.3
    step.get_by_role("tab", name="Cache").click()
    expect(step.get_by_text("tokens were held")).to_be_visible()
    # Another token in its place: what stands before it stays, the old answer is kept.
    other = panel.locator("button.irkit-pick").first
    name = other.inner_text()
    other.click()
    expect(chat.answers.last).to_contain_text("2/2")
    chat.wait_for_end()
    expect(chat.answers.last.locator(".irkit-t").nth(3)).to_have_text(name.replace("·", " "), use_inner_text=False)
    assert chat.answers.last.locator(".irkit-t").all_inner_texts()[:3] == words[:3]
    second = chat.kernel.ask("c.messages[-1]['content']")
    assert second != first
    chat.answers.last.get_by_role("button", name="Version before").click()
    expect(chat.answers.last).to_contain_text("1/2")
    assert chat.kernel.ask("c.messages[-1]['content']") == first


def test_a_reload_keeps_the_conversation(talk: Callable[..., Talk]) -> None:
    chat = talk()
    text = chat.ask("Name a colour.")
    chat.notebook.save()
    chat.notebook.reload()
    expect(chat.answers).to_have_count(1)
    expect(chat.answers.last).to_contain_text(text.split()[-1])
    # And it goes on.
    chat.ask("And another?")
    assert chat.kernel.ask("len(c.messages)") == 4


def test_a_reload_in_the_middle_of_an_answer(talk: Callable[..., Talk]) -> None:
    chat = talk(ENDLESS)
    chat.notebook.save()
    chat.send(STORY)
    chat.wait_for_words(50)
    chat.notebook.reload()
    chat.wait_for_words(50)
    before = len(chat.answers.last.inner_text())
    chat.wait_for_words(before + 100)
    expect(chat.stop_button).to_be_visible()
    chat.stop_button.click()
    chat.assert_engine_stopped()
    chat.wait_for_end()
    expect(chat.answers.last).to_contain_text(chat.kernel.ask("c.messages[-1]['content']").split()[-1])


def test_running_the_cell_again_closes_the_old_chat_and_its_answer(talk: Callable[..., Talk]) -> None:
    chat = talk(ENDLESS)
    chat.kernel.run("old = c")
    chat.send(STORY)
    chat.wait_for_words(50)
    chat.notebook.run(chat.cell)
    chat.assert_engine_stopped()
    expect(chat.view).to_have_count(1)
    assert chat.kernel.ask("[old is c, old.comm is None, c.comm is None]") == [False, True, False]
    expect(chat.view).to_contain_text(STORY)


def test_keyboard_only(talk: Callable[..., Talk]) -> None:
    chat = talk(ENDLESS)
    keys = chat.page.keyboard

    def tab_to(wanted: str, key: str = "Tab") -> None:
        for _ in range(60):
            if chat.page.evaluate(f"document.activeElement.matches({wanted!r})"):
                return
            keys.press(key)
        pytest.fail(f"{key} does not come to {wanted}")

    tab_to(".irkit-chat textarea[aria-label=Message]")
    keys.type("Tell me a story")
    keys.press("Enter")
    chat.wait_for_words()
    keys.press("Escape")
    chat.assert_engine_stopped()
    chat.wait_for_end()
    tab_to(".irkit-chat .irkit-bar select", "Shift+Tab")
    tab_to(".irkit-chat .irkit-bar label select", "Shift+Tab")
    keys.press("ArrowDown")
    chat.kernel.until("c.colour == 'probability'")
    expect(chat.answers.last.locator(".irkit-t").first).to_be_visible()
    tab_to(".irkit-t")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    keys.press("Enter")
    panel = chat.answers.last.locator(".irkit-pinned")
    expect(panel).to_contain_text("In place of")
    expect(chat.output.locator(".irkit-step")).to_be_visible()
    tab_to("button.irkit-pick")
    keys.press("Enter")
    expect(chat.answers.last).to_contain_text("2/2")
    chat.wait_for_words(100)
    keys.press("Escape")
    chat.assert_engine_stopped()


def test_an_exported_page_without_script_and_network_shows_the_conversation(
    talk: Callable[..., Talk], browser: Browser
) -> None:
    chat = talk()
    text = chat.ask("What is the capital of France?")
    page = chat.notebook.export()
    with browser.new_context(java_script_enabled=False, offline=True) as context:
        opened = context.new_page()
        opened.goto(page.as_uri(), wait_until="commit")
        twin = opened.locator("[class^='irkit-twin-']")
        expect(twin).to_be_visible()
        expect(twin).to_contain_text("What is the capital of France?")
        expect(twin).to_contain_text(text)


def test_the_chat_can_be_read_in_both_themes(talk: Callable[..., Talk]) -> None:
    chat = talk()
    chat.ask("Write one line of Python, and say what it does.")
    chat.colour.select_option("probability")
    chat.answers.last.locator(".irkit-t").nth(2).click()
    expect(chat.output.locator(".irkit-step .irkit-attention")).to_be_visible()
    try:
        for dark in (False, True):
            chat.notebook.dark(dark)
            assert hard_to_read(chat.view) == [], dark
    finally:
        chat.notebook.dark(False)
