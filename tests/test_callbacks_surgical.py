"""Surgical callbacks in runs: errors, checkpoints, several callbacks, and other libraries' callbacks."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import user_models as users
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from user_models import fit

from em_lightning.callbacks import InsertEMOperator, LayerwiseEMLoss, RestoreSurgery, SwapActivations
from em_lightning.surgery import (
    Chain,
    NoMatchError,
    Surgery,
    apply_plan,
    insert_after,
    read_plan,
    recorded_plan,
    replace_modules,
    restore_surgery,
)

pytestmark = users.QUIET
LEARNED = {"learnable": True}


def test_parameters_that_no_optimizer_trains_are_named(tmp_path):
    class Groups(users.MLP):
        def configure_optimizers(self):
            layers = [self.encoder[0], self.encoder[2], self.head]
            return torch.optim.SGD([{"params": layer.parameters()} for layer in layers], lr=0.1)

    with pytest.raises(ValueError, match=r"no optimizer trains encoder.1.log_temperature_ratio, encoder.3.log"):
        fit(tmp_path, Groups(), SwapActivations(arguments=LEARNED))
    fit(tmp_path, Groups(), SwapActivations())  # nothing to train


def test_an_optimizer_that_was_built_before_the_fit_needs_the_plain_function(tmp_path):
    class Cli(users.MLP):
        def configure_optimizers(self):
            return self.optimizer

    model = Cli()
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no optimizer trains .*em_lightning.surgery"):
        fit(tmp_path, model, InsertEMOperator("encoder.0", 2))
    model = Cli()
    insert_after(model, "encoder.0", nn.LayerNorm(16))
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(tmp_path, model)


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(0.1)])
def test_surgery_comes_before_weight_averaging(averaging, tmp_path):
    with pytest.raises(ValueError, match="WeightAveraging .*SwapActivations"):
        fit(tmp_path, users.MLP(), averaging(), SwapActivations())
    fit(tmp_path, users.MLP(), SwapActivations(arguments=LEARNED), averaging())


def test_swap_that_matches_nothing_lists_the_modules(tmp_path):
    for model in (users.MLP(), users.LateMLP(), users.SetupMLP()):
        with pytest.raises(NoMatchError, match="where='\\*' .*target=GELU.*ReLU"):
            fit(tmp_path, model, SwapActivations(target=nn.GELU))
        assert not any(isinstance(value, Chain) for value in vars(model).values())


def test_another_surgery_with_the_same_keys_does_not_load(tmp_path):
    trainer = fit(tmp_path, users.MLP(), SwapActivations("softmax_gated"))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    for other in (
        SwapActivations("residual_softmax"),
        SwapActivations("softmax_gated", arguments={"temperature": 2.0}),
    ):
        with pytest.raises(ValueError, match=r"another surgery.*replace encoder.1: .*SoftmaxGated"):
            users.trainer(tmp_path, 1, [other]).test(users.MLP(), users.MLP.data(), ckpt_path=tmp_path / "model.ckpt")
    plain = fit(tmp_path, users.MLP())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="nothing.* in the model: replace encoder.1"):
        users.trainer(tmp_path, 2, [SwapActivations()]).fit(
            users.MLP(), users.MLP.data(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True
        )
    with pytest.raises(ValueError, match="plain.ckpt .*without surgery"):
        restore_surgery(users.MLP, tmp_path / "plain.ckpt")


def test_modules_that_the_plan_cannot_build_are_named(tmp_path):
    model = users.MLP()
    replace_modules(model, nn.ReLU, lambda old: nn.PReLU())
    fit(tmp_path, model).save_checkpoint(tmp_path / "model.ckpt")
    assert read_plan(tmp_path / "model.ckpt") == recorded_plan(model)
    for restore in (
        lambda: restore_surgery(users.MLP, tmp_path / "model.ckpt"),
        lambda: apply_plan(fresh := users.MLP(), recorded_plan(model), into=Surgery(fresh)),
    ):
        with pytest.raises(ValueError, match="'encoder.1' .*PReLU .*load_state_dict"):
            restore()
    restored = users.MLP()  # as the message says
    replace_modules(restored, nn.ReLU, lambda old: nn.PReLU())
    restored.load_state_dict(torch.load(tmp_path / "model.ckpt")["state_dict"])
    assert torch.equal(restored.encoder[1].weight, model.encoder[1].weight)


def test_hyperparameters_and_own_hooks_survive_a_restore(tmp_path):
    class Own(users.MLP):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()
            self.extra = nn.Linear(width, 1)
            self.loaded = False

        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = 5

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["own"] == 5

    fit(tmp_path, Own(7), SwapActivations()).save_checkpoint(tmp_path / "model.ckpt")
    restored = restore_surgery(Own, tmp_path / "model.ckpt")
    assert restored.loaded and restored.extra.in_features == 7


def test_a_second_run_does_not_repeat_the_surgery(tmp_path):
    model, swap = users.MLP(), SwapActivations()
    fit(tmp_path, model, swap)
    first = model.encoder[1]
    fit(tmp_path, model, swap)
    fit(tmp_path, model, SwapActivations())
    users.trainer(tmp_path, 1, [SwapActivations()]).test(model, users.MLP.data(), verbose=False)
    assert model.encoder[1] is first
    swap.surgery.undo()
    assert isinstance(model.encoder[1], nn.ReLU) and "on_save_checkpoint" not in vars(model)


def test_nested_lightning_modules(tmp_path):
    class Outer(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = users.MLP()

        def training_step(self, batch):
            return F.cross_entropy(self.inner(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Outer()
    trainer = fit(tmp_path, model, SwapActivations(), LayerwiseEMLoss("inner.encoder"))
    assert [entry["path"] for entry in recorded_plan(model)] == ["inner.encoder.1", "inner.encoder.3"]
    assert "em/inner.encoder/variance" in trainer.callback_metrics


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:<class 'torch.autograd.function.Function'>"
)
def test_compiled_lightning_module(tmp_path):
    class Silent(users.MLP):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    states = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = Silent()
        given = torch.compile(model, backend="eager") if compiled else model
        swap = SwapActivations("softmax_gated", arguments=LEARNED)
        users.trainer(tmp_path, 1, [swap, InsertEMOperator("encoder.0", 2)]).fit(given, users.MLP.data())
        states.append(model.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value)


def test_callbacks_pickle_and_copy():
    for callback in (
        SwapActivations(),
        InsertEMOperator("encoder.0"),
        LayerwiseEMLoss("encoder.0"),
        RestoreSurgery("a"),
    ):
        for copied in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
            assert copied.state_key == callback.state_key
    assert SwapActivations("signed").state_key != SwapActivations("gated").state_key
    assert SwapActivations(where="a").state_key != SwapActivations(where="b").state_key


def test_hooks_are_set_after_batch_norms_are_converted(tmp_path):
    """Lightning's strategies convert batch norms between setup and on_fit_start."""

    class Normed(users.MLP):
        def build(self):
            super().build()
            self.encoder.append(nn.BatchNorm1d(16))

    class Convert(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            assert not pl_module.encoder[4]._forward_hooks
            pl_module.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(pl_module.encoder)
            assert isinstance(pl_module.encoder[4].layer, nn.SyncBatchNorm)
            pl_module.encoder[4].layer.forward = nn.BatchNorm1d.forward.__get__(pl_module.encoder[4].layer)

    insert = InsertEMOperator("encoder.4", 2)
    model = Normed()
    trainer = fit(tmp_path, model, insert, Convert(), LayerwiseEMLoss("encoder.4"))
    assert "em/encoder.4/variance" in trainer.callback_metrics and model.encoder[4].operator.gate != 0


def test_evaluating_restored_surgery_without_a_checkpoint_raises(tmp_path):
    trainer = fit(tmp_path, users.MLP(), SwapActivations(arguments=LEARNED))
    path = str(tmp_path / "swapped.ckpt")
    trainer.save_checkpoint(path)
    for run in ("validate", "test", "predict"):
        fresh = users.trainer(tmp_path, 1, [RestoreSurgery(path)])
        with pytest.raises(ValueError, match=f"{run} .*ckpt_path='.*swapped.ckpt"):
            getattr(fresh, run)(users.MLP(), users.MLP.data())
    data, loaded = users.MLP.data(), restore_surgery(users.MLP, path)
    once_more, model = users.trainer(tmp_path, 1, [RestoreSurgery(path)]), users.MLP()
    with pytest.warns(UserWarning, match="without its weights"):
        once_more.fit(model, data)
    once_more.test(model, data, verbose=False)
    users.trainer(tmp_path, 1, [RestoreSurgery(path)]).test(users.MLP(), data, ckpt_path=path, verbose=False)
    users.trainer(tmp_path, 1, [RestoreSurgery(path)]).test(loaded, data, verbose=False)
