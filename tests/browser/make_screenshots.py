"""Takes the pictures of the views in docs/images, in JupyterLab, light and dark; run it with Python.

Names of pictures as arguments take only those. Not a test; to be looked at before they are committed.
"""

import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from driving import REPOSITORY, SECONDS, Kernel, Notebook, jupyter, launched
from PIL import Image
from playwright.sync_api import Locator, expect

FOLDER = REPOSITORY / "docs" / "images"
MOST_BYTES = 200_000
SCALE = 2
"""Pixels of the picture to one of the page."""
TEXT = "The cat sat on the mat. The dog sat on the log. The cat sat on the"


def attention(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run(f"s.trace({TEXT!r}, names='pattern').view(locked=True)")
    expect(output.locator("table tr")).not_to_have_count(0)
    return output.locator(".irkit-view")


def lens(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run("v = s.lens('The Eiffel Tower is in the city of').view(); v.follow(' Paris'); v")
    return output.locator(".irkit-view")


def chat(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run("c = s.chat(temperature=0, num_predict=120)\nc")
    view = output.locator(".irkit-chat")
    say = view.get_by_label("Message", exact=True)
    for text in ("What is a prime number? Answer in one sentence.", "Name five planets, as a list."):
        say.fill(text)
        say.press("Enter")
        expect(view.locator(".irkit-stop")).to_be_visible()
        expect(view.locator(".irkit-stop")).to_be_hidden()
    return view


def token(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run("c = s.chat(temperature=0, num_predict=40); c.colour = 'probability'\nc")
    view = output.locator(".irkit-chat")
    say = view.get_by_label("Message", exact=True)
    say.fill("What is the capital of France, and what is it known for?")
    say.press("Enter")
    kernel.until("c.wait(60)")
    view.locator("article.irkit-its .irkit-t").nth(9).click()
    expect(output.locator(".irkit-step .irkit-attention table tr")).not_to_have_count(0)
    return output.locator(".jp-OutputArea-output").first


def controls(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run("c = s.chat()\nc")
    output.get_by_text("Sampling", exact=True).click()
    expect(output.get_by_text("temperature")).to_be_visible()
    return output.locator(".jp-Accordion, .jupyter-widget-Accordion, .widget-accordion").first


def steering(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run(
        "from irkit import analysis\nglad = analysis.steering_vector(s, ['I love this.', 'What a great day!'],"
        " ['I hate this.', 'What an awful day!'], layer=14)\n"
        "p = s.steering({'glad': glad}, 'The food was', temperature=0, num_predict=30); p"
    )
    view = output.locator(".irkit-view")
    kernel.run("p.as_message = False; p.vectors = [{**p.vectors[0], 'strength': 1.5}]; p.heads = [[3, 2, 0]]")
    view.get_by_role("button", name="Answer", exact=True).click()
    kernel.until("p.edited is not None and not p.running", seconds=5 * SECONDS)
    return view


def cache(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run(f"s.reset(); s.generate({TEXT!r}, temperature=0, num_predict=12).wait(); s.cache.view()")
    notebook.page.wait_for_timeout(1000)
    return output.locator(".irkit-view").first


def watch(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run("w = s.watch(); w")
    notebook.run("s.respond('Name three rivers.', temperature=0, num_predict=40).wait()")
    notebook.run("s.generate('The capital of Italy is', temperature=0, num_predict=30).wait()")
    notebook.page.wait_for_timeout(1000)
    return output.locator(".irkit-view").first


VIEWS: dict[str, Callable[[Notebook, Kernel], Locator]] = {
    each.__name__: each for each in (attention, lens, chat, token, controls, steering, cache, watch)
}


def write(shown: Locator, path: Path) -> None:
    """A picture in 256 colours, or in fewer pixels where that is too much."""
    picture = Image.open(BytesIO(shown.screenshot(animations="disabled"))).convert("RGB")
    for scale in (1.0, 0.75, 0.5):
        size = round(picture.width * scale), round(picture.height * scale)
        small = picture.resize(size, Image.Resampling.LANCZOS) if scale < 1 else picture
        small.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            break
    print(f"{path.relative_to(REPOSITORY)} {path.stat().st_size // 1000} kB, {small.width} x {small.height}")


def main(names: list[str]) -> None:
    """Take these pictures, or all."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, jupyter(Path(folder) / "jupyter") as server, launched() as browser:
        kernel = server.start_kernel()
        kernel.run("import irkit; s = irkit.Session('smollm2', num_ctx=2048)")
        with browser.new_context(viewport={"width": 1500, "height": 2000}, device_scale_factor=SCALE) as context:
            for name in names or VIEWS:
                page = context.new_page()
                page.set_default_timeout(SECONDS * 1000)
                expect.set_options(timeout=SECONDS * 1000)
                notebook = server.open(page, kernel)
                if page.locator("#filebrowser").is_visible():
                    notebook.command("application:toggle-left-area")
                notebook.dark(False)
                view = VIEWS[name](notebook, kernel)
                view.scroll_into_view_if_needed()
                for theme in ("light", "dark"):
                    notebook.dark(theme == "dark")
                    page.mouse.move(0, 0)
                    page.wait_for_timeout(500)
                    write(view, FOLDER / f"{name}-{theme}.png")
                page.close()
        kernel.close()


if __name__ == "__main__":
    main(sys.argv[1:])
