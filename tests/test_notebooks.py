"""The notebooks as they are kept: whole, without outputs, each with a figure. pytest runs them through nbmake."""

from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURES = (".plot(", "plt.show()")


def test_there_are_eight_in_order():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}_" for number in range(1, 9)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_what_running_it_leaves(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"
    assert any(figure in cell.source for cell in code for figure in FIGURES)
    assert notebook.cells[0].source.startswith("# "), "it begins with its title"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_somewhere(path: Path):
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    targets = [part.split(")")[0] for text in texts for part in text.split("](")[1:]]
    assert all(target.startswith("https://") or (FOLDER / target).exists() for target in targets)
