"""Runs what the README and the documentation show: Python blocks, the output behind them, and shell sessions.

A block behind `<!-- not run: ... -->` is left out, and `…` in an output stands for anything.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SKIP = r"(?P<skip><!-- not run: .*? -->\n)?"
BLOCK = re.compile(SKIP + r"^```(?P<kind>python|output|console)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    skipped = False
    for match in BLOCK.finditer(page.read_text()):
        # What is printed behind a block that is not run is not checked either.
        skipped = bool(match["skip"]) or (skipped and match["kind"] == "output")
        if not skipped:
            yield match["kind"], match["text"]


def assert_shown(shown: str, printed: str) -> None:
    pattern = ".*".join(map(re.escape, shown.rstrip().split("…")))
    assert re.fullmatch(pattern, printed.rstrip(), re.S), f"shown:\n{shown}\nprinted:\n{printed}"


def run_console(text: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M):
        result = subprocess.run(
            ["bash", "-c", command], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert_shown(shown, result.stdout)


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.stem)
@pytest.mark.usefixtures("model_path")
def test_what_a_page_shows_is_true(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for kind, text in blocks(page):
        if kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, str(page), "exec"), names)
            printed = output.getvalue()
        elif kind == "output":
            assert_shown(text, printed)
        else:
            run_console(text, tmp_path)
    if "s" in names:
        names["s"].close()
