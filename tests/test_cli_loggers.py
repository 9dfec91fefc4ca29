"""Recipes with every kind of logger, without one, and with options from environment variables."""

import json
from pathlib import Path

import lightning
import pytest
import torch
import yaml

from em_lightning import cli
from em_lightning.callbacks import EMAudit, PosteriorMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of wandb and mlflow
]
SMALL = [
    *("--data.num_points=64", "--data.train_clouds=8", "--data.val_clouds=4", "--data.test_clouds=4"),
    *("--data.batch_size=4", "--model.num_components=3", "--model.num_iters=2", "--trainer.max_epochs=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--report.sklearn=false"),
    "--trainer.log_every_n_steps=1",
]
LOGGERS = {
    "none": ["--trainer.logger=false"],
    "csv": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"],
    "wandb": ["--trainer.logger=WandbLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.offline=true"],
    "mlflow": ["--trainer.logger=MLFlowLogger", "--trainer.logger.save_dir=logs"],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


@pytest.mark.parametrize("name", LOGGERS)
def test_a_run_with_any_logger_writes_its_report_beside_its_checkpoints(name, here):
    if name in ("wandb", "mlflow"):
        pytest.importorskip(name)
    assert cli.main(["run", "point_cloud_gmm", *SMALL, *LOGGERS[name]]) == 0
    (results,) = here.rglob("results.json")
    assert len(json.loads(results.read_text())["rows"]) >= 2
    (checkpoint,) = (path for path in here.rglob("*.ckpt") if not path.is_symlink())
    assert checkpoint.parents[1] == results.parent
    assert {"clouds.png", "sizes.png", "times.png"} <= {path.name for path in results.parent.glob("*.png")}
    if name == "csv":
        assert "train/loss" in (results.parent / "metrics.csv").read_text().partition("\n")[0]
    if name == "wandb":
        assert list(here.rglob("media/images/clouds*.png"))


@pytest.mark.parametrize("option", ["--trainer.logger=false", "--trainer.logger", "--trainer.logger.version=mine"])
@pytest.mark.parametrize("many", ["--seeds=0,1", "--config=ablation"])
def test_tables_and_seeds_refuse_another_logger(option, many, here, capsys):
    assert cli.main(["run", "decoder_free_sae", many, option]) == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("logger", [False, "csv"])
def test_callbacks_need_no_tensorboard(logger, here, caplog):
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())

        def training_step(self, batch, batch_idx):
            return self.encoder(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loggers = lightning.pytorch.loggers.CSVLogger("logs") if logger else False
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [PosteriorMonitor("encoder", every_n_steps=1), EMAudit(printed=False)]
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=loggers, callbacks=callbacks, **quiet)
    data = torch.utils.data.TensorDataset(torch.randn(8, 4))
    with caplog.at_level("INFO"):
        trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=4))
    assert caplog.text.count("No histograms of responsibilities are logged: they need a TensorBoardLogger") == 1
    assert any(name.startswith("em/encoder/") for name in trainer.callback_metrics)


def printed_config(capsys, *arguments):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_environment_variables_override_the_default_config_and_arguments_override_both(here, monkeypatch, capsys):
    monkeypatch.setenv("PL_TRAINER__MAX_EPOCHS", "7")
    monkeypatch.setenv("PL_MODEL__LR", "0.5")
    found = printed_config(capsys, "point_cloud_gmm", "--model.lr=0.25")
    assert (found["trainer"]["max_epochs"], found["model"]["lr"]) == (7, 0.25)
    monkeypatch.setenv("PL_TRAINER__MAX_EPOCHS", "many")
    assert cli.main(["run", "point_cloud_gmm"]) == 2
    assert "trainer.max_epochs" in capsys.readouterr().err


def test_a_config_file_can_be_named_in_the_environment(here, monkeypatch, capsys):
    Path("mine.yaml").write_text("model: {init_args: {lr: 0.125}}\n")
    monkeypatch.setenv("PL_CONFIG", "mine.yaml")
    assert printed_config(capsys, "volume_control")["model"]["init_args"]["lr"] == 0.125
