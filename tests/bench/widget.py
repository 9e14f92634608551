"""What the chat costs, measured in JupyterLab in the installed Chromium: python tests/bench/widget.py [--rounds N]

Decoding through the chat against decoding without it, in turns; how long Stop takes to end the computation; and how
smooth the page is while an answer of some thousand tokens is made, as text and with its tokens coloured.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "browser"))
from driving import Kernel, Notebook, jupyter, launched  # pyright: ignore[reportMissingImports]
from playwright.sync_api import CDPSession

STORY = "Tell me a very long story about a ship."
WATCH = """() => {
    window.tasks = [];
    window.frames = [];
    const note = (seen) => window.tasks.push(...seen.getEntries().map((task) => task.duration));
    window.observer = new PerformanceObserver(note);
    window.observer.observe({ type: "longtask" });
    let last = performance.now();
    const frame = (now) => {
        window.frames.push(now - last);
        last = now;
        window.watched = requestAnimationFrame(frame);
    };
    window.watched = requestAnimationFrame(frame);
}"""
REPORT = """() => {
    window.observer.disconnect();
    cancelAnimationFrame(window.watched);
    return [window.tasks, window.frames];
}"""

NOTE_END = """
import threading, time
ended, last = [], answers[-1]
threading.Thread(target=lambda: (last.wait(), ended.append(time.monotonic()))).start()
"""


def wait(kernel: Kernel) -> None:
    kernel.until("c.wait(600)", seconds=1800)


def decode(notebook: Notebook, kernel: Kernel, rounds: int, tokens: int) -> None:
    """Tokens per second without the chat, and with it."""
    kernel.run(f"c.controls.set(num_predict={tokens}, temperature=0)")
    speeds: dict[str, list[float]] = {"without": [], "chat": []}
    for turn in range(rounds + 1):  # the first compiles
        for how in speeds:
            if how == "chat":
                kernel.run(f"c.new(); c.ask({STORY!r})")
                wait(kernel)
            else:
                kernel.run(f"s.respond({STORY!r}, temperature=0, num_predict={tokens}, **endless).wait()")
            if turn:
                speeds[how].append(kernel.ask("answers[-1].stats.tokens_per_second"))
    medians = {how: statistics.median(all_of_it) for how, all_of_it in speeds.items()}
    print(
        f"decoding {tokens} tokens, medians of {rounds} in turns: {medians['without']:.1f} tokens/s without the chat,"
    )
    print(f"  {medians['chat']:.1f} through it: {100 * medians['chat'] / medians['without']:.1f} %")


def stop(notebook: Notebook, kernel: Kernel, rounds: int) -> None:
    """From a click on Stop to the end of the computation."""
    view = notebook.page.locator(".irkit-chat")
    kernel.run("c.controls.set(num_predict=4000)")
    took = []
    for _ in range(rounds):
        kernel.run(f"c.new(); c.ask({STORY!r})")
        kernel.until("len(answers[-1]._tokens) > 50")
        kernel.run(NOTE_END)
        begun = time.monotonic()  # one clock for all processes of a machine
        view.locator(".irkit-stop").click()
        kernel.until("ended")
        took.append(1000 * (kernel.ask("ended[0]") - begun))
        wait(kernel)
    median = statistics.median(took)
    print(f"Stop, from the click to the end of the computation: median {median:.0f} ms, worst {max(took):.0f} ms")


def busy(session: CDPSession) -> dict[str, float]:
    """Seconds of processor time that the page's thread has spent, by kind: what else the machine does is not in it."""
    return {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}


def smoothness(notebook: Notebook, kernel: Kernel, tokens: int, colour: str) -> None:
    """Frames and long tasks of the page while an answer is made."""
    kernel.run(f"c.controls.set(num_predict={tokens}); c.colour = {colour!r}; c.new()")
    notebook.page.evaluate(WATCH)
    session = notebook.page.context.new_cdp_session(notebook.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    begun = busy(session)
    kernel.run(f"c.ask({STORY!r})")
    wait(kernel)
    notebook.page.wait_for_timeout(1000)
    took = {name: seconds - begun[name] for name, seconds in busy(session).items()}
    tasks, frames = notebook.page.evaluate(REPORT)
    made = kernel.ask("len(answers[-1].tokens)")
    nodes = notebook.page.locator(".irkit-chat *").count()
    ordered = sorted(frames)
    quantile = {part: ordered[int(part * (len(ordered) - 1))] for part in (0.5, 0.99, 1.0)}
    print(f"an answer of {made} tokens, tokens {'coloured' if colour != 'none' else 'as text'}: {nodes} elements;")
    print(f"  frames: median {quantile[0.5]:.0f} ms, 99 % {quantile[0.99]:.0f}, longest {quantile[1.0]:.0f};", end=" ")
    print(f"tasks over 50 ms: {len(tasks)}, longest {max(tasks, default=0):.0f} ms;")
    parts = {"all": "Task", "script": "Script", "layout": "Layout", "style": "RecalcStyle"}
    told = ", ".join(f"{name} {1000 * took[part + 'Duration'] / made:.2f}" for name, part in parts.items())
    print(f"  processor time of the page's thread, in ms for each token: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=400, help="of an answer whose speed is measured")
    parser.add_argument("--long", type=int, default=4000, help="tokens of the long answer")
    asked: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, jupyter(Path(folder) / "jupyter") as server, launched() as browser:
        kernel = server.start_kernel()
        kernel.run("import irkit; s = irkit.Session('smollm2', num_ctx=8192)")
        kernel.run("endless = {'logit_bias': {id: -1e4 for id in s.model.tokenizer.eog_ids}}; answers = []")
        kernel.run("s.observe(lambda asked: answers.append(asked.generation))")
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        notebook = server.open(page, kernel)
        notebook.run("c = s.chat(temperature=0, **endless); c").locator(".irkit-chat").wait_for()
        decode(notebook, kernel, asked.rounds, asked.tokens)
        stop(notebook, kernel, asked.rounds)
        for colour in ("none", "probability"):
            smoothness(notebook, kernel, asked.long, colour)
        kernel.close()


if __name__ == "__main__":
    main()
