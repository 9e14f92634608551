"""Answers in the cells of a notebook: a real kernel, asked as JupyterLab asks it."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

manager = pytest.importorskip("jupyter_client.manager", reason="no Jupyter client")
pytest.importorskip("ipykernel", reason="no Jupyter kernel")


class Kernel:
    """A kernel and its client."""

    def __init__(self, kernel: Any, client: Any) -> None:
        self.kernel, self.client = kernel, client

    def run(self, code: str, until: Callable[[dict[str, Any]], bool] | None = None) -> list[dict[str, Any]]:
        """Runs a cell, and returns the messages of its outputs; interrupts it once `until` says so of one of them."""
        asked, outputs = self.client.execute(code), []
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except Empty:
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return outputs
            outputs.append(message)
            if until and until(message):
                time.sleep(0.2)  # what is printed is printed
                self.kernel.interrupt_kernel()
                until = None
        raise TimeoutError(code)

    def printed(self, code: str) -> str:
        return "".join(m["content"]["text"] for m in self.run(code) if m["msg_type"] == "stream")


@pytest.fixture(scope="module")
def running() -> Iterator[Kernel]:
    kernel, client = manager.start_new_kernel()
    yield Kernel(kernel, client)
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


@pytest.fixture
def kernel(running: Kernel, tiny_path: Path) -> Kernel:
    """With a session `s` of the tiny model, whose answers end only when they are stopped."""
    running.run(f"import irkit, time; s = irkit.Session({str(tiny_path)!r}, num_ctx=1 << 20)")
    running.run("endless = dict(logit_bias={257: -1e4}); short = endless | dict(num_predict=40)")
    return running


def kinds(messages: list[dict[str, Any]]) -> list[str]:
    return [message["msg_type"] for message in messages]


def html(message: dict[str, Any]) -> str:
    return message["content"].get("data", {}).get("text/html", "")


def test_an_answer_as_the_value_of_a_cell_is_shown_while_it_is_made(kernel: Kernel) -> None:
    kernel.run("s.generate('hello', **short).wait()")
    outputs = [m for m in kernel.run("s.generate('hello', **(endless | dict(num_predict=3000)))") if html(m)]
    assert outputs[0]["msg_type"] == "display_data"
    assert {m["msg_type"] for m in outputs[1:]} == {"update_display_data"}
    assert len({m["content"]["transient"]["display_id"] for m in outputs}) == 1
    assert "3,000 tokens" in html(outputs[-1])
    assert "length" in html(outputs[-1])
    assert any(re.search(r"[1-9]\d* of 3,000 tokens .*…", html(m)) for m in outputs)


def test_an_interrupt_ends_the_answer_that_is_shown_and_keeps_what_was_made(kernel: Kernel) -> None:
    outputs = kernel.run("g = s.generate('hello', **endless)\ng", until=lambda m: "tokens/s" in html(m))
    assert kinds(outputs)[-1] == "error"
    assert "cancelled" in html([m for m in outputs if html(m)][-1])
    assert (
        kernel.printed("print(g.finish_reason, len(g.text) > 0, g.text == g.partial_text)") == "cancelled True True\n"
    )


def test_an_interrupt_ends_the_answer_that_a_loop_waits_for(kernel: Kernel) -> None:
    kernel.run("busy = s.model.submit(lambda: time.sleep(1))")
    loop = "g = s.generate('hello', **endless)\nprint('waits', flush=True)\nfor token in g:\n    print(token, end='')"
    outputs = kernel.run(loop, until=lambda m: m["msg_type"] == "stream")
    (line,) = outputs[-1]["content"]["traceback"]
    assert re.fullmatch(r"KeyboardInterrupt: the answer was stopped after \d+ tokens, which partial_text has", line)
    assert kernel.printed("print(g.finish_reason)") == "cancelled\n"


def test_an_interrupt_elsewhere_in_the_loop_ends_the_answer_too(kernel: Kernel) -> None:
    loop = "g = s.generate('hello', **endless)\nfor token in g:\n    print('.', flush=True)\n    time.sleep(60)"
    outputs = kernel.run(loop, until=lambda m: m["msg_type"] == "stream")
    assert outputs[-1]["content"]["ename"] == "KeyboardInterrupt"
    assert kernel.printed("print(g.finish_reason)") == "cancelled\n"
    # An error of another kind is none of its business, nor is an answer of another cell.
    kernel.run("g = s.generate('hello', **short)\n1 / 0")
    kernel.run("print('.', flush=True); time.sleep(60)", until=lambda m: m["msg_type"] == "stream")
    assert kernel.printed("print(g.finish_reason)") == "length\n"


def test_await_in_a_cell_and_its_interrupt(kernel: Kernel) -> None:
    assert kernel.printed("g = await s.agenerate('hello', **short); print(g.finish_reason)") == "length\n"
    loop = "g = s.agenerate('hello', **endless)\nasync for token in g:\n    print(token, end='', flush=True)"
    outputs = kernel.run(loop, until=lambda m: m["msg_type"] == "stream")
    assert kinds(outputs)[-1] == "error"
    assert kernel.printed("print(g.finish_reason)") == "cancelled\n"


def bars(messages: list[dict[str, Any]]) -> list[str]:
    """The widgets that were put up, in words."""
    shown = [message["content"].get("data", {}) for message in messages]
    return [data["text/plain"] for data in shown if "application/vnd.jupyter.widget-view+json" in data]


def states(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What widgets were told."""
    return [m["content"]["data"].get("state", {}) for m in messages if m["msg_type"] == "comm_msg"]


def test_loading_many_weights_shows_a_bar_and_few_do_not(kernel: Kernel, tiny_path: Path) -> None:
    opened = f"s = irkit.Session({str(tiny_path)!r}, precision='exact', cache_type='{{}}'); s.model.load().result()"
    assert bars(kernel.run(opened.format("f16"))) == []
    kernel.run("from irkit import notebook; notebook.LOAD_BAR_FROM = 1000")
    outputs = kernel.run(opened.format("f32"))
    (bar,) = bars(outputs)
    assert "loading tiny" in bar
    assert [state["bar_style"] for state in states(outputs) if "bar_style" in state][-1] == "success"


def test_fetching_shows_a_bar(kernel: Kernel) -> None:
    shown = "[show(done, 2_000_000, 'tiny from a host') for done in (0, 1000, 2_000_000)]"
    outputs = kernel.run(f"from irkit import notebook\nwith notebook.progress() as show:\n    {shown}")
    assert len(bars(outputs)) == 1
    assert any("2.00M/2.00M" in str(state.get("value")) for state in states(outputs))


def test_outside_a_notebook_there_is_no_bar() -> None:
    from irkit import notebook

    with notebook.progress() as show:
        assert show is None
    assert notebook.shell() is None
