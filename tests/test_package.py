"""What the package promises of itself: its public names, a quick import, and which part may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import irkit

PACKAGE = Path(irkit.__file__).parent


def test_public_names() -> None:
    assert sorted(irkit.__all__) == [
        "Edit",
        "IrkitError",
        "Session",
        "Trace",
        "__version__",
        "ablate",
        "call",
        "compare",
        "errors",
        "gguf",
        "load_trace",
        "patch",
        "sampling_distribution",
        "scale",
        "steer",
        "tokenizer",
        "view",
    ]
    for name in irkit.__all__:
        assert getattr(irkit, name) is not None
    assert dir(irkit) == sorted(irkit.__all__)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        irkit.nothing_like_this  # noqa: B018


def test_python_m_irkit_is_the_command_line() -> None:
    shown = subprocess.run([sys.executable, "-m", "irkit", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"irkit {irkit.__version__}\n"


def imported_by(statement: str) -> set[str]:
    """Top-level modules in memory after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in listed.stdout.split()}


HEAVY = {
    "jax",
    "jaxlib",
    "fastapi",
    "uvicorn",
    "ipywidgets",
    "anywidget",
    "matplotlib",
    "pandas",
    "safetensors",
    "prompt_toolkit",
}
HEAVY |= {"httpx", "huggingface_hub"}


def test_importing_irkit_imports_nothing_heavy() -> None:
    assert not imported_by("import irkit") & HEAVY
    assert "jax" in imported_by("import irkit.transformer.decoder")  # the check can tell


def test_tokenizing_needs_no_jax(model_path: Path) -> None:
    statement = f"import irkit\nirkit.Session({str(model_path)!r}).tokenize('hello')"
    assert not imported_by(statement) & {"jax", "fastapi", "httpx"}


# Each may import those after it, and the leaves; `cli`, `server` and `widgets` may not import each other.
ORDER = [
    {"cli", "server", "view", "widgets"},
    {"bench"},
    {"verbs"},
    {"analysis"},
    {"session"},
    {"engine"},
    {"hub"},
    {"transformer", "families", "tokenizer"},
    {"kernels"},
    {"gguf"},
    {
        "options",
        "results",
        "as_json",
        "trace",
        "tracefile",
        "plots",
        "edits",
        "errors",
        "garbage",
        "reprs",
        "notebook",
        "observing",
    },
]
# Where one thing opens another, imported there and then: `Session.chat()` the prompt loop or the widget, `irkit serve`
# the server, which is measured in a process of its own.
OPENS = {("session", "cli"), ("session", "widgets"), ("session", "server"), ("cli", "server"), ("bench", "server")}
# `view()` of what is found out, and `irkit.view`.
OPENS |= {("analysis", "view"), ("analysis", "widgets"), ("trace", "view"), ("trace", "widgets")}
OPENS |= {("session", "view"), ("engine", "view"), ("engine", "widgets")}
OPENS |= {("view", "widgets"), ("view", "analysis"), ("widgets", "analysis"), ("session", "analysis")}


def imports(file: Path) -> set[str]:
    """The parts of irkit that a source file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = [f"irkit.{alias.name}" for alias in node.names] if module == "irkit" else [module]
        found |= {name.split(".")[1] for name in names if name.startswith("irkit.")}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_dependencies_point_downward(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return
    level = next(index for index, parts in enumerate(ORDER) if part in parts)
    allowed = {part, *ORDER[-1]}.union(*ORDER[level + 1 :])
    # Families read the transformer's Config; everything else on a level keeps to itself.
    allowed |= {"transformer"} if part == "families" else set()
    assert {(part, name) for name in imports(file) - allowed - {"__version__"}} <= OPENS


@pytest.mark.parametrize("part", ["transformer", "kernels"])
def test_the_mathematics_knows_no_pydantic(part: str) -> None:
    for file in (PACKAGE / part).rglob("*.py"):
        assert "pydantic" not in file.read_text()


def test_gguf_needs_numpy_alone() -> None:
    assert not imported_by("import irkit.gguf.reader, sys; sys.modules.pop('irkit')") & {"jax", "jaxlib"}
