"""A browser, a Jupyter server and a kernel for the tests of what a notebook shows.

They need Chromium, Debian's or another; where there is none they are skipped, unless IRKIT_BROWSER_REQUIRED is set.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from driving import Jupyter, Kernel, Notebook, Outside
    from playwright.sync_api import Browser, BrowserContext, Error, Page

REQUIRED = "IRKIT_BROWSER_REQUIRED"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put these tests last: Playwright's event loop runs in the main thread, and others want to run their own there.

    A page of JupyterLab may miss its time on a busy machine: each of them has three tries, and pytest tells how many.
    """
    here = Path(__file__).parent
    items.sort(key=lambda item: here in item.path.parents)
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Chromium, without a screen."""
    refuse = pytest.fail if os.environ.get(REQUIRED) else pytest.skip
    from driving import CHROMIUM, SECONDS, chromium, launched
    from playwright.sync_api import expect

    if chromium() is None:
        refuse(f"no Chromium: none of {', '.join(CHROMIUM)} is there (Debian's package is chromium)")
    expect.set_options(timeout=SECONDS * 1000)
    with launched() as browser:
        yield browser


@pytest.fixture(scope="session")
def context(browser: "Browser") -> "Iterator[BrowserContext]":
    """One profile for all pages, so that JupyterLab's files are read once."""
    with browser.new_context(viewport={"width": 1400, "height": 1000}) as context:
        yield context


@pytest.fixture(scope="session")
def outside(context: "BrowserContext") -> "Outside":
    """What asked for another machine."""
    from driving import Outside

    return Outside(context)


@pytest.fixture(scope="session")
def jupyter(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Jupyter]":
    """The server of JupyterLab and Notebook 7."""
    from driving import jupyter

    with jupyter(tmp_path_factory.mktemp("jupyter")) as server:
        yield server


@pytest.fixture(scope="session")
def kernel(jupyter: "Jupyter", model_path: Path) -> "Iterator[Kernel]":
    """One kernel for all tests; `s` in it is a session of the default model."""
    from driving import REPOSITORY

    kernel = jupyter.start_kernel()
    kernel.run("import irkit; s = irkit.Session('smollm2', num_ctx=2048)")
    assert Path(kernel.ask("irkit.__file__")).parents[1] == REPOSITORY
    yield kernel
    kernel.close()


@pytest.fixture
def page(context: "BrowserContext", outside: "Outside") -> "Iterator[Page]":
    """A page, in which no script of a widget may fail and from which no request may leave this machine."""
    from driving import SECONDS

    failures: list[str] = []

    def failed(error: "Error") -> None:
        if "blob:" in (error.stack or ""):  # where a widget's module comes from; the others are Jupyter's own
            failures.append(f"{error}\n{error.stack}")

    outside.asked.clear()
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)
    page.on("pageerror", failed)
    yield page
    page.close()
    assert outside.asked == []
    assert failures == []


@pytest.fixture
def notebook(jupyter: "Jupyter", kernel: "Kernel", page: "Page") -> "Notebook":
    """An empty notebook in JupyterLab, at the shared kernel, in which no view of an earlier one is left."""
    kernel.run("from ipywidgets import Widget; Widget.close_all()")
    return jupyter.open(page, kernel)
