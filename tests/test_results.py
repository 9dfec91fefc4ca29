"""Tables of results as Markdown and JSON, and their combination over seeds."""

import json

import lightning
import pytest
import torch

from em_lightning.modules import EMModule
from em_lightning.studies import Findings, Report, combine, markdown_table, write_results

ROWS = [{"method": "EM", "score": 1.23456, "count": 3}, {"method": "other", "score": -2.0, "count": 4}]


def test_a_table_is_written_for_people_and_for_programs(tmp_path):
    text = write_results(tmp_path / "new", "Title", ["A note."], ROWS, seed=7)
    assert (tmp_path / "new" / "results.md").read_text() == text
    assert text.startswith("# Title\n\nA note.\n\n| method | score | count |\n|---|---|---|\n| EM | 1.235 | 3 |")
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["rows"] == ROWS and content["seed"] == 7


def test_seeds_are_combined_as_mean_and_deviation(tmp_path):
    for seed, score in enumerate((1.0, 2.0, 3.0)):
        write_results(tmp_path / str(seed), "Title", [], [{"method": "EM", "score": score}])
    paths = [tmp_path / str(seed) / "results.json" for seed in range(3)]
    assert combine(paths) == [{"method": "EM", "score": "2 ± 1"}]
    assert combine(paths[:1]) == [{"method": "EM", "score": "1"}]
    assert "| EM | 2 ± 1 |" in markdown_table(combine(paths))


def test_different_tables_are_not_combined(tmp_path):
    write_results(tmp_path / "a", "Title", [], [{"method": "EM", "score": 1.0}])
    write_results(tmp_path / "b", "Title", [], [{"method": "other", "score": 1.0}])
    with pytest.raises(ValueError, match="different rows"):
        combine([tmp_path / "a" / "results.json", tmp_path / "b" / "results.json"])


class Frozen(EMModule):
    """A model whose batch norm is frozen, as in fine-tuning."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)
        self.layer = torch.nn.Linear(2, 1)

    def on_train_epoch_start(self):
        self.norm.eval()

    def step(self, batch, stage):
        return self.layer(self.norm(batch[0])).square().mean()


class Modes(Report):
    """Record the modes during the report, and fail if asked to."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails

    def report(self, trainer, module, folder):
        self.seen = [part.training for part in module.modules()]
        if self.fails:
            raise OSError("disk full")
        return Findings("Modes", [], [{"part": "norm"}], "done")


@pytest.mark.filterwarnings("ignore:.*many workers", "ignore:.*logging interval", "ignore:.*no `val_dataloader`")
@pytest.mark.parametrize("fails", [False, True])
def test_a_report_restores_the_mode_of_every_submodule(fails, tmp_path):
    module, report = Frozen(), Modes(fails)
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(callbacks=[report], **options)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2)), batch_size=4)
    if fails:
        with pytest.raises(OSError, match="disk full"):
            trainer.fit(module, loader)
    else:
        trainer.fit(module, loader)
    assert not any(report.seen) and module.training and not module.norm.training and module.layer.training
