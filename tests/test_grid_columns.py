"""Tables without published numbers: one column per metric, and gains paired by seed."""

import json

import numpy as np
import pytest
import yaml

from em_lightning.cli import run
from em_lightning.studies import grid


def test_gains_of_a_table_are_paired_by_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"plain": [0.5, 0.75, 1.0], "swapped": [1.5, 1.25, 2.5]}

    def finish(load, cells, jobs):
        for cell in cells:
            cell.folder.mkdir(parents=True)
            found = {"score": values[cell.row][cell.seed], **({"dead": 1.0} if cell.row == "plain" else {})}
            cell.result.write_text(json.dumps({"values": found}))

    monkeypatch.setattr(grid, "run_cells", finish)
    table = {"title": "Scores", "seeds": [0, 1, 2], "columns": ["score", "dead"]}
    table["rows"] = {"plain": {"arguments": {"model.width": 4}}, "swapped": {"against": "plain"}}
    (tmp_path / "scores.yaml").write_text(yaml.safe_dump({"table": table}))
    run("swap_activations", ["--config", "scores.yaml"])
    (written,) = tmp_path.glob("lightning_logs/swap_activations/scores*/results.json")
    rows = json.loads(written.read_text())["rows"]
    difference = np.subtract(values["swapped"], values["plain"])
    error = difference.std(ddof=1) / 3**0.5
    assert rows == [
        {"row": "plain", "score": "0.75 ± 0.25", "dead": "1 ± 0", "gain": ""},
        {"row": "swapped", "score": "1.75 ± 0.66", "dead": "", "gain": f"{difference.mean():+.2f} ± {error:.2f}"},
    ]
    assert "swapped over plain" in written.with_name("results.md").read_text()


# The test chooses an activation that loses accuracy in wide layers.
@pytest.mark.filterwarnings("ignore:SoftmaxGatedActivation over the 128 units")
def test_swapped_activations_are_measured_from_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--trainer.callbacks.activation=softmax_gated", "--trainer.max_epochs=1", "--trainer.logger.version=one"]
    run("swap_activations", given)
    found = json.loads((tmp_path / "lightning_logs/swap_activations/one/results.json").read_text())["values"]
    assert {"accuracy %", "calibration_error %", "activation1/dead_units", "activation2/redundancy"} <= set(found)
    assert "Data: scikit-learn's digits" in capsys.readouterr().out
