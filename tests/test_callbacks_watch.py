import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import user_models as users
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from em_lightning import EMLoss
from em_lightning.callbacks import EMAudit, LayerwiseEMLoss, PosteriorMonitor, SwapActivations, TemperatureSchedule
from em_lightning.metrics import layer_metrics
from em_lightning.scope import Audit
from em_lightning.surgery import NoMatchError

pytestmark = [
    users.QUIET,
    pytest.mark.filterwarnings(
        "ignore:.*enable_nested_tensor",
    ),
]


def test_temperature_is_scheduled_logged_and_saved(tmp_path):
    schedule = TemperatureSchedule(4.0, 1.0, 4)
    callbacks = [SwapActivations("softmax_gated", where="encoder.1"), SwapActivations(where="encoder.3"), schedule]
    model = users.MLP()
    trainer = users.trainer(tmp_path, 2, callbacks, limit_train_batches=1)
    trainer.fit(model, users.MLP.data())
    assert model.encoder[1].temperature == model.encoder[3].temperature == pytest.approx(4.0 / 4**0.25)
    assert trainer.callback_metrics["em/temperature"].item() == pytest.approx(4.0 / 4**0.25)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = users.MLP()
    with pytest.warns(UserWarning, match="need to be provided.*TemperatureSchedule"):  # by Lightning
        users.trainer(tmp_path, 1, callbacks[:2]).test(
            other, users.MLP.data(), ckpt_path=tmp_path / "model.ckpt", verbose=False
        )
    assert other.encoder[1].temperature == model.encoder[1].temperature


def test_curves():
    for shape, middle in (("linear", 2.5), ("cosine", 2.5), ("exponential", 2.0)):
        schedule = TemperatureSchedule(4.0, 1.0, 10, shape)
        assert [schedule.value(0), schedule.value(5), schedule.value(99)] == pytest.approx([4.0, middle, 1.0])
    assert TemperatureSchedule(4.0, 1.0, 4, "cosine").value(1) == pytest.approx(1 + 1.5 * (1 + math.sqrt(0.5)))


def test_temperature_schedule_refuses(tmp_path):
    for arguments, match in (
        ((0.0, 1.0, 5), "start=0.0"),
        ((1.0, -1.0, 5), "end=-1.0"),
        ((1.0, 2.0, 0), "steps=0"),
        ((1.0, 2.0, 5, "step"), "shape='step'"),
    ):
        with pytest.raises(ValueError, match=match):
            TemperatureSchedule(*arguments)
    with pytest.raises(NoMatchError, match="Sequential: encoder"):
        users.trainer(tmp_path, 1, [TemperatureSchedule(2.0, 1.0, 5)]).fit(users.MLP(), users.MLP.data())
    learned = [SwapActivations(arguments={"learnable": True}), TemperatureSchedule(2.0, 1.0, 5)]
    with pytest.raises(ValueError, match="'encoder.1' .*learned"):
        users.trainer(tmp_path, 1, learned).fit(users.MLP(), users.MLP.data())


def test_monitor_logs_metrics_and_histograms(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitor = PosteriorMonitor(["encoder.1"], every_n_steps=2)
    model, data = users.MLP(), users.MLP.data()
    trainer = users.trainer(tmp_path, 1, [monitor], logger=logger, log_every_n_steps=1)
    trainer.fit(model, data, data)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert events.Tags()["histograms"] == ["em/encoder.1/responsibilities", "em_val/encoder.1/responsibilities"]
    assert [event.step for event in events.Histograms("em/encoder.1/responsibilities")] == [1, 3]
    assert [event.step for event in events.Histograms("em_val/encoder.1/responsibilities")] == [3]
    expected = layer_metrics()
    expected.update(model.encoder[:2](torch.cat([batch[0] for batch in data])))
    for name, value in expected.compute().items():
        assert trainer.callback_metrics[f"em_val/encoder.1/{name}"].item() == pytest.approx(value.item(), rel=1e-4)
    result = users.trainer(tmp_path, 1, [monitor]).test(model, data, verbose=False)[0]
    assert result["em_test/encoder.1/entropy"] == pytest.approx(expected.compute()["entropy"].item(), rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_monitor_disables_the_fast_path_of_transformers(tmp_path):
    model = users.Transformer().eval()
    trainer = users.trainer(tmp_path, 1, [PosteriorMonitor("encoder.layers.1.linear1", dim=-1)])
    result = trainer.test(model, users.Transformer.data(), verbose=False)[0]
    assert result["em_test/encoder.layers.1.linear1/effective_rank"] > 1
    assert model.encoder.layers[1].activation_relu_or_gelu == 1


def test_monitor_refuses(tmp_path):
    with pytest.raises(ValueError, match="every_n_steps=0"):
        PosteriorMonitor("encoder.1", every_n_steps=0)
    with pytest.raises(ValueError, match="tap='middle'"):
        users.trainer(tmp_path, 1, [PosteriorMonitor("encoder.1", tap="middle")]).fit(users.MLP(), users.MLP.data())
    with pytest.raises(NoMatchError, match="where='decoder'"):
        users.trainer(tmp_path, 1, [PosteriorMonitor("decoder")]).fit(users.MLP(), users.MLP.data())


def test_audit_is_printed_and_logged_once(tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = EMAudit()
    callbacks = [SwapActivations("softmax_gated"), callback, LayerwiseEMLoss("encoder.1")]
    model = users.MLP()
    users.trainer(tmp_path, 2, callbacks, logger=logger).fit(model, users.MLP.data())
    assert [finding.path for finding in callback.audit if finding.em] == ["encoder.1", "encoder.3", "head"]
    assert capsys.readouterr().out.count("cross-entropy") == 1
    logger.experiment.flush()
    assert "em/audit/text_summary" in EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]
    torch.manual_seed(3)
    plain = users.MLP()
    quiet = EMAudit(printed=False)
    users.trainer(tmp_path, 1, [quiet]).fit(users.TwoOptimizers(), users.MLP.data())
    assert capsys.readouterr().out == "" and {one.operation for one in quiet.audit if one.em} == {"cross-entropy"}
    users.trainer(tmp_path, 1, [EMAudit(printed=False)]).fit(plain, users.MLP.data())
    torch.manual_seed(3)
    unwatched = users.MLP()
    users.trainer(tmp_path, 1).fit(unwatched, users.MLP.data())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in unwatched.state_dict().items())


class Acting(users.MLP):
    """Its training step takes an iterator forward, which cannot be copied."""

    def build(self):
        super().build()
        self.noise = (0.1 * i for i in range(100))

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] + next(self.noise), batch[1]), batch_idx)


class FirstStepOnly(users.MLP):
    """Its training step raises while it is audited."""

    def training_step(self, batch, batch_idx):
        if not self.training:
            raise KeyError("only in training mode")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("cls", [Acting, FirstStepOnly])
def test_an_audit_that_fails_warns_and_changes_nothing(cls, tmp_path):
    states = []
    for callbacks in ([], [EMAudit()]):
        torch.manual_seed(0)
        model = cls()
        trainer = users.trainer(tmp_path, 1, callbacks)
        if callbacks:
            with pytest.warns(
                UserWarning, match=r"EMAudit .*(Acting|only in training mode).*continues.*em_lightning.audit"
            ):
                trainer.fit(model, users.MLP.data())
            assert callbacks[0].audit == []
        else:
            trainer.fit(model, users.MLP.data())
        assert trainer.state.finished and trainer.global_step == 3
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


class FullDisk(TensorBoardLogger):
    """Its writer raises."""

    @property
    def experiment(self):
        raise OSError("no space left")


def test_an_audit_is_kept_where_its_table_cannot_be_logged(tmp_path, capsys):
    trainer = users.trainer(tmp_path, 1, [EMAudit()])
    trainer.loggers = [FullDisk(tmp_path)]
    with pytest.warns(UserWarning, match="could not log its table.*OSError: no space left") as caught:
        trainer.callbacks[0].on_train_batch_start(trainer, users.MLP(), next(iter(users.MLP.data())), 0)
    assert not any("em_lightning.audit" in str(warning.message) for warning in caught)
    assert trainer.callbacks[0].audit.at("encoder.1") and "encoder.1" in capsys.readouterr().out


def test_an_audit_without_findings_is_not_taken_for_one_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("em_lightning.callbacks.watch.audit", lambda *_: Audit())
    trainer = users.trainer(tmp_path, 1, [EMAudit(printed=False)])
    trainer.loggers = [FullDisk(tmp_path)]
    with pytest.warns(UserWarning, match="could not log its table.*OSError: no space left. Training continues$"):
        trainer.callbacks[0].on_train_batch_start(trainer, users.MLP(), next(iter(users.MLP.data())), 0)


class Returns(torch.nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


class Odd(users.MLP):
    """Has a layer whose output is no tensor of energies."""

    def __init__(self, change):
        super().__init__()
        self.odd = Returns(change)

    def training_step(self, batch, batch_idx):
        self.odd(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "change", [lambda x: (x > 0).long(), lambda x: x > 0, lambda x: "text", lambda x: (1, x), lambda x: x[None, None]]
)
def test_a_layer_that_cannot_be_monitored_is_skipped_with_one_warning(change, tmp_path):
    monitor = PosteriorMonitor(["odd", "encoder.0"], every_n_steps=1, verbose=False)
    with pytest.warns(UserWarning, match="PosteriorMonitor skips 'odd'") as caught:
        trainer = users.trainer(tmp_path, 1, [monitor])
        trainer.fit(Odd(change), users.MLP.data())
    assert sum("skips" in str(one.message) for one in caught) == 1
    assert trainer.global_step == 3
    assert any(key.startswith("em/encoder.0/") for key in trainer.callback_metrics)


def test_the_first_tensor_of_a_tuple_is_monitored(tmp_path):
    trainer = users.trainer(tmp_path, 1, [PosteriorMonitor("odd", every_n_steps=1, dim=-1, verbose=False)])
    trainer.fit(Odd(lambda x: (x, 3)), users.MLP.data())
    assert any(key.startswith("em/odd/") for key in trainer.callback_metrics)


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    callbacks = [EMAudit(printed=False), PosteriorMonitor("encoder.1", every_n_steps=1, verbose=False)]
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(logger.experiment, "add_text", full)
    monkeypatch.setattr(logger.experiment, "add_histogram", full)
    trainer = users.trainer(tmp_path, 1, callbacks, logger=logger)
    with pytest.warns(UserWarning, match="disk full") as caught:
        trainer.fit(users.MLP(), users.MLP.data())
    found = [str(one.message).split()[0] for one in caught if "disk full" in str(one.message)]
    assert found == ["EMAudit", "PosteriorMonitor"]
    assert trainer.global_step == 3 and any(one.em for one in callbacks[0].audit)


def test_a_logger_that_fails_is_not_taken_for_a_layer_that_cannot_be_measured(tmp_path, monkeypatch):
    def add_histogram(*args):
        raise OSError("no space left")

    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(logger.experiment, "add_histogram", add_histogram)
    with pytest.warns(UserWarning, match="could not log all of 'encoder.1'.*OSError: no space left") as caught:
        trainer = users.trainer(tmp_path, 1, [PosteriorMonitor("encoder.1", verbose=False)], logger=logger)
        trainer.fit(users.MLP(), users.MLP.data())
    assert not any("skips" in str(warning.message) for warning in caught)
    assert any(key.startswith("em/encoder.1/") for key in trainer.callback_metrics)


@pytest.mark.parametrize("fails", [False, True])
def test_a_layer_that_fails_in_a_part_of_the_validation_has_no_value(tmp_path, fails):
    class Model(users.MLP):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Linear(6, 6)

        def validation_step(self, batch, batch_idx):
            self.block(torch.randn(6) if fails and batch_idx == 0 else torch.randn(2, 4, 6))  # the first has no axis 1

    monitor = PosteriorMonitor("block", dim=1, verbose=False)
    trainer = users.trainer(tmp_path, 1, [monitor], limit_val_batches=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(Model(), users.MLP.data(), verbose=False)
    assert any("skips 'block'" in str(one.message) for one in caught) == fails
    assert any(key.startswith("em_val/block") for key in trainer.callback_metrics) != fails


def test_a_tensor_that_is_overwritten_in_place_gives_one_warning_that_names_the_selection(tmp_path):
    model = users.MLP()
    model.encoder[1] = torch.nn.ReLU(inplace=True)
    trainer = users.trainer(tmp_path, 1, [PosteriorMonitor("*.0", every_n_steps=1, verbose=False)])
    with pytest.warns(UserWarning, match="takes no tensors of '\\*.0'.*overwritten in place") as caught:
        trainer.fit(model, users.MLP.data())
    assert sum("overwritten" in str(one.message) for one in caught) == 1
    assert trainer.global_step == 3 and not any(key.startswith("em/") for key in trainer.callback_metrics)


def test_calls_without_gradient_do_not_count_beside_one_with(tmp_path):
    class Target(users.MLP):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.encoder(0.0 * batch[0])
            return loss

    values = []
    for kind in (users.MLP, Target):
        torch.manual_seed(0)
        trainer = users.trainer(tmp_path, 1, [PosteriorMonitor("encoder.1", every_n_steps=1, verbose=False)])
        trainer.fit(kind(), users.MLP.data())
        values.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("em/")})
    assert values[0] == values[1] != {}


def test_dominance_is_that_of_the_first_loss_of_a_step(tmp_path):
    class Twice(users.MLP):
        scales = (1.0, 100.0)

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for scale in self.scales:
                self.manual_backward(scale * F.cross_entropy(self.head(self.encoder(batch[0])), batch[1]))

    class Once(Twice):
        scales = (1.0,)

    values = []
    for kind in (Twice, Once):
        torch.manual_seed(0)
        monitor = PosteriorMonitor("encoder.1", every_n_steps=1, loss=EMLoss(), verbose=False)
        trainer = users.trainer(tmp_path, 1, [monitor], limit_train_batches=1)
        trainer.fit(kind(), users.MLP.data())
        values.append(float(trainer.callback_metrics["em/encoder.1/dominance"]))
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("loss", ["em", {"free_energy": 1.0}, torch.square])
def test_other_losses_are_refused_at_once(loss):
    with pytest.raises(TypeError, match=r"loss=.* must be an EMLoss or None"):
        PosteriorMonitor("encoder.1", loss=loss)
