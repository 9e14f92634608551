"""What the browser tests are made of: a Jupyter server, a kernel in it, and a notebook in a page of Chromium."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from io import BytesIO
from pathlib import Path
from queue import Empty
from typing import Any, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import nbformat
from jupyter_client.blocking.client import BlockingKernelClient
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, WebSocket, sync_playwright

REPOSITORY = Path(__file__).parents[2]
SECONDS = 60
"""How long a slow machine may take for one step."""
CHROMIUM = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
"""Where Chromium may be, in the order they are tried."""
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
"""For a machine without a screen; and no name is looked up, so that what asks for another machine fails."""

App = Literal["lab", "notebook"]


def chromium() -> str | None:
    """The path of the installed Chromium, if there is one."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """The installed Chromium, without a screen."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Outside:
    """The requests and sockets of a browser context, of which none may leave this machine."""

    def __init__(self, context: BrowserContext) -> None:
        self.asked: list[str] = []
        context.on("request", lambda request: self._note(request.url))
        context.on("page", lambda page: page.on("websocket", lambda opened: self._note(opened.url)))

    def _note(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            self.asked.append(url)


class Kernel:
    """A kernel of the server, which can also be asked past the page, even while a cell runs in it."""

    def __init__(self, key: str, connection_file: Path) -> None:
        self.key = key
        self._client = BlockingKernelClient(connection_file=str(connection_file))
        self._client.load_connection_file()
        self._client.start_channels(
            hb=False
        )  # on a busy machine the heart is heard late, and the kernel taken for dead
        self._subshell = ""

    def connect(self) -> None:
        """Waits for the kernel, and makes a subshell in it."""
        asked = self._client.session.msg("kernel_info_request")  # before it is up, ipykernel 7 fails to make a subshell
        self._client.shell_channel.send(asked)
        self._reply(self._client.get_shell_msg, asked)
        asked = self._client.session.msg("create_subshell_request")
        self._client.control_channel.send(asked)
        self._subshell = self._reply(self._client.get_control_msg, asked)["subshell_id"]

    def ask(self, expression: str) -> Any:
        """The value of an expression in the kernel's namespace, by way of JSON; computed beside what else it does."""
        wanted = {"value": f"__import__('json').dumps({expression})"}
        content = {"code": "", "silent": True, "store_history": False, "user_expressions": wanted, "allow_stdin": False}
        asked = self._client.session.msg("execute_request", content)
        asked["header"]["subshell_id"] = self._subshell
        self._client.shell_channel.send(asked)
        value = self._reply(self._client.get_shell_msg, asked)["user_expressions"]["value"]
        if value["status"] != "ok":
            raise RuntimeError(f"{expression}: {value['ename']}: {value['evalue']}")
        return json.loads(eval(value["data"]["text/plain"]))  # the repr of a str

    def run(self, statements: str) -> None:
        """Runs statements in the kernel's namespace, beside what else it does."""
        self.ask(f"exec({statements!r}, globals())")

    def until(self, expression: str, seconds: float = SECONDS) -> Any:
        """Waits until an expression is true, and returns it."""
        end = time.monotonic() + seconds
        while not (found := self.ask(expression)):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.1)
        return found

    def close(self) -> None:
        self._client.stop_channels()

    @staticmethod
    def _reply(receive: Any, asked: dict[str, Any]) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            message = receive(timeout=SECONDS)
            if message["parent_header"].get("msg_id") == asked["header"]["msg_id"]:
                return message["content"]
        raise TimeoutError(asked["header"]["msg_type"])


class Notebook:
    """A notebook in a page: JupyterLab's or Notebook 7's."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page, self.path = page, path
        self.messages: list[tuple[float, bytes]] = []
        """The beginning of every message of a widget that came to the page, and when the kernel sent it: the page's
        events come in bursts."""
        page.on("websocket", self._listen)

    def _listen(self, opened: WebSocket) -> None:
        def received(payload: str | bytes) -> None:
            data = payload if isinstance(payload, bytes) else payload.encode()
            if re.search(rb'"msg_type": ?"comm_(msg|open)"', data):
                sent = re.search(rb'"date": ?"([^"]+)"', data)
                assert sent, "a message says when it was sent"
                when = datetime.fromisoformat(sent[1].decode().replace("Z", "+00:00"))
                self.messages.append((when.timestamp(), data[:4000]))

        opened.on("framereceived", received)

    def wait_until_ready(self) -> None:
        """Until the notebook is there and its kernel answers."""
        self.page.wait_for_function(
            """() => {
                const panel = window.jupyterapp?.shell.currentWidget;
                return panel?.content?.widgets?.length && panel.sessionContext?.session?.kernel?.status === "idle"
                    && panel.sessionContext.isReady;
            }""",
            timeout=SECONDS * 1000,
        )

    def command(self, name: str, **arguments: Any) -> Any:
        """Does what a menu's entry does, and waits for its end."""
        return self.page.evaluate("([name, its]) => window.jupyterapp.commands.execute(name, its).then(() => null)",
                                  [name, arguments])  # fmt: skip

    def run_all(self) -> None:
        self.command("notebook:run-all-cells")

    def add(self, source: str) -> int:
        """Adds a code cell at the end, makes it the active one, and returns its number."""
        return self.page.evaluate(
            """(source) => {
                const notebook = window.jupyterapp.shell.currentWidget.content;
                const cells = notebook.model.sharedModel;
                const number = cells.cells.length;
                cells.insertCell(number, { cell_type: "code", source, metadata: { trusted: true } });
                notebook.activeCellIndex = number;
                notebook.deselectAll();
                return number;
            }""",
            source,
        )

    def start(self, source: str | int) -> Locator:
        """Runs a cell, new or by its number, and returns where its output comes, without waiting for its end."""
        number = self.add(source) if isinstance(source, str) else source
        self.page.evaluate(
            """(number) => {
                const notebook = window.jupyterapp.shell.currentWidget.content;
                notebook.activeCellIndex = number;
                notebook.deselectAll();
                window.lastRun = window.jupyterapp.commands.execute("notebook:run-cell").then(() => null);
            }""",
            number,
        )
        return self.output(number)

    def run(self, source: str | int) -> Locator:
        """Runs a cell, new or by its number, to its end, and returns its output.

        Raises:
            AssertionError: the cell ended with an error.
        """
        output = self.start(source)
        self.page.evaluate("() => window.lastRun")
        failed = output.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
        assert not any("Traceback" in text or "Error" in text for text in failed), failed
        return output

    def output(self, number: int) -> Locator:
        """The output of a cell."""
        return self.page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{number}'] .jp-Cell-outputArea")

    def dark(self, wanted: bool = True) -> None:
        """Changes the theme, and waits until it is there."""
        self.command("apputils:change-theme", theme="JupyterLab Dark" if wanted else "JupyterLab Light")
        self.page.wait_for_selector(
            f"body[data-jp-theme-light='{str(not wanted).lower()}']", state="attached", timeout=SECONDS * 1000
        )

    def windowed(self) -> None:
        """Takes cells that are out of sight out of the page, as long notebooks do."""
        self.page.evaluate("""() => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.notebookConfig = { ...notebook.notebookConfig, windowingMode: "full" };
        }""")

    def scroll_to(self, number: int) -> None:
        """Brings a cell into sight."""
        self.page.evaluate("(at) => window.jupyterapp.shell.currentWidget.content.scrollToItem(at, 'start')", number)

    def save(self) -> dict[str, Any]:
        """Saves the notebook, and returns what is in the file."""
        self.command("docmanager:save")
        return json.loads(self.path.read_text("utf-8"))

    def reload(self) -> None:
        """Loads the page again, as F5 does."""
        self.page.reload(wait_until="domcontentloaded")
        self.wait_until_ready()

    def export(self) -> Path:
        """Saves the notebook and has nbconvert make a page of it."""
        self.save()
        command = [sys.executable, "-m", "nbconvert", "--to", "html", "--log-level", "ERROR", str(self.path)]
        subprocess.run(command, check=True, timeout=2 * SECONDS)
        return self.path.with_suffix(".html")


class Jupyter:
    """A Jupyter server of this checkout's irkit, on loopback, with directories of its own."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url, self.directory = url, directory
        self.root = directory / "notebooks"
        self._count = 0

    def start_kernel(self) -> Kernel:
        """Starts a kernel, and connects to it."""
        key = (
            httpx.post(f"{self.url}/api/kernels", json={"name": "python3"}, timeout=SECONDS)
            .raise_for_status()
            .json()["id"]
        )
        kernel = Kernel(key, self.directory / "runtime" / f"kernel-{key}.json")
        try:
            kernel.connect()
        except Empty as error:
            kernel.close()  # else what was sent waits for ever
            raise RuntimeError(f"the kernel does not answer:\n{self.log()}") from error
        return kernel

    def log(self) -> str:
        """The end of what the server and its kernels have printed."""
        return (self.directory / "server.log").read_text()[-4000:]

    def write(self, cells: Sequence[str] = ("",)) -> Path:
        """Writes a notebook of these code cells."""
        self._count += 1
        path = self.root / f"{self._count}.ipynb"
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, path)
        return path

    def open(self, page: Page, kernel: Kernel, path: Path | None = None, app: App = "lab") -> Notebook:
        """Opens a notebook that was not opened before, or a new one, in a page with this kernel."""
        path = path or self.write()
        session = {"path": path.name, "name": path.name, "type": "notebook", "kernel": {"id": kernel.key}}
        made = httpx.post(f"{self.url}/api/sessions", json=session, timeout=SECONDS).raise_for_status()
        assert made.json()["kernel"]["id"] == kernel.key, "a notebook keeps the kernel it was first opened with"
        notebook = Notebook(page, path)
        # A workspace of its own has no tabs of other notebooks.
        where = f"lab/workspaces/{uuid4().hex}/tree" if app == "lab" else "notebooks"
        page.goto(f"{self.url}/{where}/{path.name}", wait_until="domcontentloaded")
        notebook.wait_until_ready()
        return notebook


@contextmanager
def jupyter(directory: Path) -> Iterator[Jupyter]:
    """A server of JupyterLab and Notebook 7, which keeps all it writes below this directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("notebooks", "config", "data", "runtime", "ipython", "settings", "workspaces"):
        (directory / name).mkdir(parents=True)
    quiet = directory / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    no_news = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    (quiet / "notification.jupyterlab-settings").write_text(json.dumps(no_news))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)])),
        "JUPYTER_CONFIG_DIR": str(directory / "config"),
        "JUPYTER_DATA_DIR": str(directory / "data"),
        "JUPYTER_RUNTIME_DIR": str(directory / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(directory / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(directory / "workspaces"),
        "IPYTHONDIR": str(directory / "ipython"),
    }
    flags = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.allow_root": True,
        "ServerApp.root_dir": directory / "notebooks",
        "ServerApp.disable_check_xsrf": True,  # for the requests that the tests make themselves
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
        "JupyterNotebookApp.expose_app_in_browser": True,
    }
    with (directory / "server.log").open("wb") as written:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                *(f"--{name}={value}" for name, value in flags.items()),
            ],
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the kernels too, so that nothing is left behind
        )
    try:
        url = f"http://127.0.0.1:{port}"
        server = Jupyter(url, directory)
        _wait_for(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(server: Jupyter, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 2 * SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{server.url}/api/status", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"Jupyter did not start:\n{server.log()}")


CONTRAST = """(root) => {
    const probe = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const brush = probe.getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        brush.clearRect(0, 0, 1, 1);
        brush.fillStyle = colour;
        brush.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = ([r, g, b, a], ground) => [r, g, b].map((part, at) => a * part + (1 - a) * ground[at]);
    const ground = (element) => {
        const below = element.parentElement ? ground(element.parentElement) : [255, 255, 255];
        return over(rgba(getComputedStyle(element).backgroundColor), below);
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((part) => part / 255).map(
            (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4),
        );
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const element of root.querySelectorAll("*")) {
        const texts = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
        const text = texts.map((node) => node.data.trim()).join("");
        if (!text || !element.checkVisibility() || element.matches("style, script, option, :disabled")) continue;
        const under = ground(element);
        const [a, b] = [light(under), light(over(rgba(getComputedStyle(element).color), under))];
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text.slice(0, 40)]);
    }
    return found;
}"""


def hard_to_read(shown: Locator, least: float = 4.5) -> list[tuple[float, str]]:
    """The texts in an element that stand out less than WCAG 2.2 asks for (contrast of 4.5), with their contrast."""
    found = shown.evaluate(CONTRAST)
    assert found
    return [(contrast, text) for contrast, text in found if contrast < least]


def picture(shown: Locator) -> Image.Image:
    """What is to be seen of an element."""
    return Image.open(BytesIO(shown.screenshot())).convert("RGB")


def colours(shown: Locator) -> int:
    """How many colours are to be seen in an element: few in one that is blank."""
    return len(picture(shown).getcolors(1 << 24) or ())


def painted(shown: Locator) -> float:
    """Which part of an element has another colour than its commonest."""
    seen = picture(shown).getcolors(1 << 24) or []
    return 1 - max(count for count, _ in seen) / sum(count for count, _ in seen)
