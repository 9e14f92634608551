"""Takes the pictures of the views in docs/images, in JupyterLab, light and dark; run it with Python.

Names of pictures as arguments take only those. Not a test; to be looked at before they are committed.
"""

import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from driving import REPOSITORY, SECONDS, Kernel, Notebook, jupyter, launched
from PIL import Image, ImageChops
from playwright.sync_api import Locator, expect

FOLDER = REPOSITORY / "docs" / "images"
MOST_BYTES = 200_000
WIDTH = 1180
"""Of the page: a view is about 1000 wide in it, so that its words can still be read where a picture is shown small."""
SCALE = 2
"""Pixels of the picture to one of the page."""
SCALES = {"token": 1.5}
"""Of single pictures, which are large."""
TEXT = "The cat sat on the mat. The dog sat on the log. The cat sat on the"
AT_SEA = [
    "The ship sailed across the ocean waves.",
    "Pirates of the sea sail with the tide.",
    "Fishermen on the boat saw whales in the sea.",
    "The captain steered the ship to the island.",
]
ASHORE = [
    "The clerk walked into the office.",
    "Students in the class read in the library.",
    "Farmers in the field saw cows on the hill.",
    "The driver steered the car to the town.",
]


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
    for text in ("List three facts about the Moon.", "What is a prime number? Answer in one sentence."):
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
        f"from irkit import analysis\nsea = analysis.steering_vector(s, {AT_SEA}, {ASHORE}, layer=10)\n"
        "p = s.steering({'sea': sea}, 'Tell me about your day.', temperature=0, num_predict=57); p"
    )
    view = output.locator(".irkit-view")
    kernel.run("p.vectors = [{**p.vectors[0], 'strength': 1.5}]")
    for _ in range(2):  # the first compiles, which its speed would show
        view.get_by_role("button", name="Answer", exact=True).click()
        notebook.page.wait_for_timeout(1000)
        kernel.until("p.edited is not None and not p.running", seconds=5 * SECONDS)
    return view


def cache(notebook: Notebook, kernel: Kernel) -> Locator:
    kernel.run(f"s.reset(); s.generate({TEXT!r}, temperature=0, num_predict=12).wait()")
    output = notebook.run("s.cache.view(position=17, until=17, layer=12)")
    notebook.page.wait_for_timeout(1000)
    return output.locator(".irkit-view").first


def watch(notebook: Notebook, kernel: Kernel) -> Locator:
    output = notebook.run("w = s.watch(); w")
    notebook.run("s.generate('The capital of Italy is', temperature=0, num_predict=30).wait()")
    notebook.run(
        "import httpx; served = s.serve(port=0)\n"
        "ask = {'model': 'smollm2', 'temperature': 0, 'max_tokens': 60, 'logprobs': True, 'top_logprobs': 5,"
        " 'messages': [{'role': 'user', 'content': 'What is the capital of Japan?'}]}\n"
        "for _ in range(2): httpx.post(f'{served.url}/v1/chat/completions', json=ask, timeout=60).raise_for_status()\n"
        "served.stop()"
    )
    notebook.page.wait_for_timeout(1000)
    return output.locator(".irkit-view").first


VIEWS: dict[str, Callable[[Notebook, Kernel], Locator]] = {
    each.__name__: each for each in (attention, lens, chat, token, controls, steering, cache, watch)
}


def write(shown: Locator, path: Path) -> None:
    """A picture in 256 colours, or in fewer where that is too much; what is empty at its right is left out."""
    picture = Image.open(BytesIO(shown.screenshot(animations="disabled"))).convert("RGB")
    ground = Image.new("RGB", picture.size, picture.getpixel((picture.width - 1, 0)))
    filled = ImageChops.difference(picture, ground).getbbox() or (0, 0, *picture.size)
    picture = picture.crop((0, 0, min(picture.width, filled[2] + 12 * SCALE), picture.height))
    for colours in (256, 128, 96, 64):
        fewer(picture, colours).save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            break
    print(f"{path.relative_to(REPOSITORY)} {path.stat().st_size // 1000} kB, {picture.width} x {picture.height}")


def fewer(picture: Image.Image, count: int) -> Image.Image:
    """The picture in so many colours: the commonest as they are, the rest so that small marks keep theirs, too."""
    packed = np.asarray(picture, np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    seen, where, areas = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([seen >> 16, seen >> 8 & 255, seen & 255], axis=1).astype(np.uint8)
    weighed = np.repeat(colours, np.sqrt(areas).astype(int), axis=0)
    found = Image.fromarray(weighed[None]).quantize(count - 8, kmeans=1).getpalette() or []
    palette = np.concatenate([colours[np.argsort(-areas)[:8]], np.reshape(found, (-1, 3)).astype(np.uint8)])
    nearest = [np.argmin(((palette - colour.astype(float)) ** 2).sum(axis=1)) for colour in colours]
    made = Image.fromarray(np.array(nearest, np.uint8)[where].reshape(packed.shape), "P")
    made.putpalette(palette.tobytes())
    return made


def main(names: list[str]) -> None:
    """Take these pictures, or all."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, jupyter(Path(folder) / "jupyter") as server, launched() as browser:
        kernel = server.start_kernel()
        kernel.run("import irkit; s = irkit.Session('smollm2', num_ctx=2048)")
        for name in names or VIEWS:
            size: Any = {"width": WIDTH, "height": 2000}
            with browser.new_context(viewport=size, device_scale_factor=SCALES.get(name, SCALE)) as context:
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
                    page.evaluate("document.activeElement.blur()")
                    page.wait_for_timeout(500)
                    write(view, FOLDER / f"{name}-{theme}.png")
        kernel.close()


if __name__ == "__main__":
    main(sys.argv[1:])
