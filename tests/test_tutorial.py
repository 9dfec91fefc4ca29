"""The tutorial and the notebooks, executed from the first cell to the last."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"


# Warnings of the Jupyter kernel, and of sockets that it does not close.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Return a function that executes a notebook in an empty folder and compares the kinds of its outputs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(path):
        notebook = nbformat.read(path, as_version=4)
        stored = [kinds(cell) for cell in notebook.cells]
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        message = "the stored outputs are old: run the notebook and save it"
        assert [kinds(cell) for cell in notebook.cells] == stored, message
        return "".join(
            out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream"
        )

    return run


def test_many_small_clouds(execute):
    printed = execute(NOTEBOOKS / "many-small-clouds.ipynb")
    assert "torch.Size([500, 8, 3]) torch.Size([500, 8, 3, 3])" in printed
    classical, trained = (float(number) for number in re.findall(r"(-?\d+\.\d+) nats per new point", printed))
    assert trained > classical + 0.05


@pytest.mark.slow
def test_score_a_table(execute):
    printed = execute(NOTEBOOKS / "score-a-table.ipynb")
    assert "odd rows among the 20 lowest scores: 20" in printed


@pytest.mark.slow
def test_competition_in_a_cnn(execute):
    printed = execute(NOTEBOOKS / "competition-in-a-cnn.ipynb")
    gain, error = re.search(r"gain ([+-]\d+\.\d+) points, standard error (\d+\.\d+)", printed).groups()
    assert abs(float(gain)) < 5 and float(error) < 1
    assert min(float(number) for number in re.findall(r"(\d+\.\d+)%", printed)) > 90


def test_the_tutorial_runs_and_prints_the_numbers_in_its_text(execute):
    printed = execute(ROOT / "docs" / "tutorial.ipynb")
    alone, variance, both = (line.split() for line in printed.splitlines() if "units alive" in line)
    assert alone[-7] == "0" and variance[-7] == both[-7] == "8"
    assert float(both[-1]) < 1 < float(variance[-1])
    own, sklearn = (
        float(word) for word in printed.split("em_lightning ")[1].split(" nats")[0].split(", scikit-learn ")
    )
    assert abs(own - sklearn) < 1e-5
    small, large = (re.findall(r"-\d+\.\d+", line) for line in printed.splitlines() if line.startswith("floor "))
    for *classical, trained in (small, large):
        assert len(classical) == 3 and float(trained) > max(map(float, classical))
    # The floor alone gains as much as training with the small floor; both together gain a few hundredths more.
    assert abs(float(large[0]) - float(small[-1])) < 0.015
    assert 0.02 < float(large[-1]) - float(large[0]) < 0.1


def kinds(cell):
    """Return the first words of the lines that a cell prints, and the types of its other outputs.

    Lines are joined first, because a kernel may send the printed text in several pieces.
    """
    streams = [out.text for out in cell.get("outputs", []) if out.output_type == "stream"]
    others = [sorted(set(out.data) - {"text/plain"}) for out in cell.get("outputs", []) if out.output_type != "stream"]
    return [line.split(" ")[0] for line in "".join(streams).splitlines()] + others
