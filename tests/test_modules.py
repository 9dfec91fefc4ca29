import csv

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError

from em_lightning.callbacks import StepSeeds
from em_lightning.modules import EMModule, PointCloudGMM
from em_lightning.studies import ProceduralSurfaces

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
]


def surfaces(**options):
    return ProceduralSurfaces(**{"num_points": 96, "batch_size": 8, "train_clouds": 32, "val_clouds": 8,
                                 "test_clouds": 8, **options})  # fmt: skip


def trainer(folder, **options):
    return lightning.Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 2,
            **options,
        }
    )


class Regression(EMModule):
    def __init__(self, **options):
        super().__init__(**options)
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x)

    def step(self, batch, stage):
        x, y = batch
        return {"loss": (self(x) - y).square().mean(), "size": self.layer.weight.abs().sum()}


@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
def test_a_subclass_needs_only_forward_and_step(tmp_path, schedule):
    x = torch.linspace(-1, 1, 64)[:, None]
    loader = DataLoader(TensorDataset(x, 3 * x + 1), batch_size=16)
    module = Regression(lr=0.1, schedule=schedule)
    fit = trainer(tmp_path, max_epochs=50, enable_checkpointing=False)
    fit.fit(module, loader, loader)
    assert {"train/loss", "train/size", "val/loss", "val/size"} <= set(fit.callback_metrics)
    assert module.layer.weight.item() == pytest.approx(3, abs=0.05)
    assert fit.test(module, loader, verbose=False)[0]["test/loss"] < 1e-2


class Weighed(Regression):
    def __init__(self, **options):
        super().__init__(**options)
        self.add_metrics(error=MeanAbsoluteError())

    def step(self, batch, stage):
        self.metrics_of(stage)["error"].update(self(batch[0]), batch[1])
        return super().step(batch, stage)


def test_epoch_metrics_are_logged(tmp_path):
    x = torch.randn(50, 1)
    loader = DataLoader(TensorDataset(x, 3 * x), batch_size=16)  # the last batch has 8 items
    module = Weighed(lr=0.05)
    fit = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    fit.fit(module, loader, loader)
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert logged["val/error"] == pytest.approx((module(x) - 3 * x).abs().mean().item(), rel=1e-5)
    assert {"train/error", "train/size"} <= set(logged)


class TwoOptimizers(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("make, accumulate", [(lambda: Regression(lr=0.1), 1), (lambda: Regression(lr=0.1), 3),
                                              (TwoOptimizers, 1)])  # fmt: skip
def test_losses_are_logged_at_the_steps_of_the_loggers(make, accumulate, tmp_path):
    loader = DataLoader(TensorDataset(torch.ones(14 * accumulate, 1), torch.ones(14 * accumulate, 1)), batch_size=2)
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False, **options)
    fit.fit(make(), loader, loader)
    with open(f"{fit.logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 3  # of 7 steps


def test_steps_with_huge_or_nan_gradients_are_skipped(tmp_path):
    x = torch.ones(4, 1)
    for target, moves in ((2.0, True), (1e9, False), (torch.nan, False)):
        module = Regression(lr=0.1, skip_gradients_above=10.0)
        before = module.layer.weight.item()
        loader = DataLoader(TensorDataset(x, target * x), batch_size=4)
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, loader, loader)
        assert (module.layer.weight.item() != before) == moves


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: Regression(lr=0.0), ValueError, ["lr=0.0", "positive"]),
        (lambda: Regression(schedule="cosine"), ValueError, ["schedule='cosine'", "one_cycle"]),
        (lambda: Regression(skip_gradients_above=0.0), ValueError, ["skip_gradients_above=0.0"]),
        (lambda: Regression(optimizer="lion"), ValueError, ["optimizer='lion'", "adam"]),
        (lambda: Regression(weight_decay=-1.0), ValueError, ["weight_decay=-1.0"]),
        (lambda: PointCloudGMM(num_components=0), ValueError, ["num_components=0"]),
        (lambda: EMModule().step(None, "train"), NotImplementedError, ["EMModule", "step(batch, stage)"]),
    ],
)
def test_errors_name_the_argument_and_the_value(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_step_must_return_a_loss():
    class Forgetful(Regression):
        def step(self, batch, stage):
            return {"lost": torch.zeros(())}

    with pytest.raises(ValueError, match=r"'loss'.*'lost'"):
        Forgetful().training_step((torch.zeros(2, 1), torch.zeros(2, 1)), 0)


def test_training_raises_the_held_out_likelihood_above_classical_em(tmp_path):
    data = surfaces(train_clouds=128)
    module = PointCloudGMM(num_components=4, num_iters=2, lr=5e-3)
    fit = trainer(tmp_path, max_epochs=10, enable_checkpointing=False)
    before = fit.validate(module, data, verbose=False)[0]
    fit.fit(module, data)
    after = fit.validate(module, data, verbose=False)[0]
    assert after["val/log_likelihood"] > before["val/log_likelihood"] + 0.02
    assert after["val/loss"] == pytest.approx(-after["val/log_likelihood"], abs=1e-5)


@pytest.mark.parametrize("init", ["farthest", "kmeans++"])
def test_resumed_run_equals_uninterrupted_run_bitwise(tmp_path, init):
    options = {"num_components": 3, "num_iters": 2, "init": init}
    straight = PointCloudGMM(**options)
    start = {name: value.clone() for name, value in straight.state_dict().items()}
    # Random starts are drawn by PyTorch's generator, whose state is in no checkpoint.
    seeds = lambda: [] if init == "farthest" else [StepSeeds(0)]  # noqa: E731
    trainer(tmp_path / "a", max_epochs=4, callbacks=seeds()).fit(straight, surfaces())
    first = PointCloudGMM(**options)
    first.load_state_dict(start)

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    half = trainer(tmp_path / "b", max_epochs=4, callbacks=[Stop(), *seeds()])
    half.fit(first, surfaces())
    assert half.current_epoch == 2
    resumed = PointCloudGMM(**options)
    rest = trainer(tmp_path / "c", max_epochs=4, callbacks=seeds())
    rest.fit(resumed, surfaces(), ckpt_path=half.checkpoint_callback.best_model_path)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    reloaded = PointCloudGMM.load_from_checkpoint(half.checkpoint_callback.best_model_path, weights_only=True)
    assert reloaded.hparams.num_components == 3


def test_predictions_are_mixtures_in_the_units_of_the_data(tmp_path):
    data, module = surfaces(), PointCloudGMM(num_components=3, init="farthest")  # both calls start alike
    (mixture,) = trainer(tmp_path, enable_checkpointing=False).predict(module, data)
    batch = next(iter(data.predict_dataloader()))
    own = batch.held_out * batch.scale[:, None, None] + batch.center[:, None]
    normalized = module(batch.points, batch.mask).log_prob(batch.held_out)
    expected = normalized - 3 * batch.scale.log()[:, None]
    assert torch.allclose(mixture.log_prob(own), expected, atol=1e-3)


def test_the_loss_is_taken_at_held_out_points():
    batch = next(iter(surfaces().train_dataloader()))
    module = PointCloudGMM(num_components=3, init="farthest")
    log_prob = module(batch.points, batch.mask).log_prob(batch.held_out)
    # Points below -6 nats count by a logarithm of what they are below it.
    loss = torch.where(log_prob >= -6, -log_prob, 6 + (-5 - log_prob).clamp(min=1).log())
    found = module.step(batch, "train")
    assert found["loss"].item() == pytest.approx(loss.mean().item())
    assert found["log_likelihood"].item() == pytest.approx(log_prob.mean().item())


@pytest.mark.parametrize("optimizer, weight_decay", [("adam", 0.0), ("adam", 0.1), ("sgd", 0.0)])
@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_an_optimizer_on_a_gpu_takes_no_loop_over_the_parameters(device, optimizer, weight_decay, monkeypatch):
    """With ``fused=False`` PyTorch would not choose ``foreach`` either."""
    monkeypatch.setattr(Regression, "device", torch.device(device))
    options = Regression(optimizer=optimizer, weight_decay=weight_decay).configure_optimizers().defaults
    assert options["fused"] is None and options["foreach"] is None


def test_an_optimizer_on_a_cpu_is_fused():
    assert Regression().configure_optimizers().defaults["fused"] is True
