"""Callbacks and audit in small models of the shapes met in other people's projects, all through one harness."""

import copy
import random

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from project_models import PROJECTS, Autoencoder, loader, normal

from em_lightning import audit
from em_lightning.callbacks import (
    EMAudit,
    InsertEMOperator,
    LayerwiseEMLoss,
    RestoreSurgery,
    StepSeeds,
    SwapActivations,
)
from em_lightning.surgery import NoMatchError, restore_surgery

CALLBACKS = {"swap": SwapActivations, "insert": InsertEMOperator, "layers": LayerwiseEMLoss}
MODES = {"swap": ["swap"], "insert": ["insert"], "layers": ["layers"], "all": ["swap", "insert", "layers"]}

pytestmark = pytest.mark.filterwarnings(
    "ignore:a batch of . item",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec.`",
    "ignore:.*torch.jit.script.*:DeprecationWarning",
    "ignore:The number of training batches",
    "ignore:Be aware that when using `ckpt_path`, callbacks",
    "ignore:Detected call of `lr_scheduler.step",
)


def trainer_of(folder, callbacks, epochs=2):
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fitted(project, folder, callbacks=(), ckpt_path=None, save=False):
    """Return a model after two epochs and its Trainer; save writes a checkpoint of each epoch to the folder."""
    torch.manual_seed(0)
    model = project.build()
    torch.manual_seed(1)
    savers = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if save else []
    trainer = trainer_of(folder, [StepSeeds(0), *callbacks, *savers])
    trainer.fit(model, project.data(), ckpt_path=ckpt_path, weights_only=project.weights_only)
    return model, trainer


def made(project, mode):
    return [CALLBACKS[name](**getattr(project, name)) for name in MODES[mode]]


def predicted(project, model, folder, callbacks=(), ckpt_path=None):
    outputs = trainer_of(folder, list(callbacks)).predict(
        model, project.data(), ckpt_path=ckpt_path, weights_only=project.weights_only
    )
    return torch.cat([output.flatten() for output in outputs])


def assert_same(found, expected):
    """Compare states bitwise, in containers of any depth."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert list(found) == list(expected)
        for key in found:
            assert_same(found[key], expected[key])
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(found, torch.Tensor):
        assert torch.equal(found, expected) or (found.isnan() & expected.isnan()).all()
    elif not callable(found):
        assert found == expected


def structure(model):
    """Return the classes, keys, attributes and hooks of a model."""
    ignored = {"_trainer", "_current_fx_name", "_param_requires_grad_state", "_compiled_call_impl"}
    return (
        [(path, type(module)) for path, module in model.named_modules(remove_duplicate=False)],
        list(model.state_dict()),
        [sorted(set(vars(module)) - ignored) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROJECTS)
def test_project(name, mode, tmp_path):
    project = PROJECTS[name]
    callbacks = made(project, mode)
    torch.manual_seed(0)
    before = project.build()
    model, trainer = fitted(project, tmp_path, callbacks, save=True)

    # It trains: with layer losses that are logged, and gates that have left zero.
    assert any(not torch.equal(model.state_dict().get(key, value), value) for key, value in before.state_dict().items())
    for callback in callbacks:
        if isinstance(callback, LayerwiseEMLoss):
            weights = [key for key in trainer.callback_metrics if key.startswith("em/") and key.endswith("/weight")]
            assert weights and all(trainer.callback_metrics[key].isfinite() for key in weights)
        if isinstance(callback, InsertEMOperator):
            gates = [(key, value) for key, value in model.named_parameters() if key.endswith("gate")]
            trained = {id(p) for one in trainer.optimizers for group in one.param_groups for p in group["params"]}
            assert any(value.item() != 0 for key, value in gates if id(value) in trained)
            assert all(value.item() == 0 for key, value in gates if not value.requires_grad) or name == "byol"
    assert all(value.isfinite().all() for value in model.state_dict().values())

    # Resumed equals straight.
    first, last = (str(tmp_path / f"epoch={epoch}.ckpt") for epoch in (0, 1))
    resumed, again = fitted(project, tmp_path, made(project, mode), first)
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same([one.state_dict() for one in again.optimizers], [one.state_dict() for one in trainer.optimizers])

    expected = predicted(project, model, tmp_path)
    if mode == "layers":
        assert torch.equal(predicted(project, project.build(), tmp_path, (), last), expected)
    else:
        # A plain load is refused; the surgery is restored by a function and by a callback.
        with pytest.raises((RuntimeError, ValueError), match=r"em_surgery|surgery"):
            predicted(project, project.build(), tmp_path, (), last)
        with pytest.raises(RuntimeError, match="em_surgery"):
            project.build().load_state_dict(model.state_dict())
        trusted = {} if project.weights_only is None else {"weights_only": project.weights_only}
        restored = restore_surgery(type(model), last, **trusted)
        assert torch.equal(predicted(project, restored, tmp_path), expected)
        restorer = RestoreSurgery(last, **trusted)
        assert torch.equal(predicted(project, project.build(), tmp_path, [restorer], last), expected)
        results = [
            trainer_of(tmp_path, [StepSeeds(0), *more]).test(
                one, project.data(), ckpt_path=path, weights_only=project.weights_only, verbose=False
            )
            for one, more, path in ((model, [], None), (project.build(), [RestoreSurgery(last, **trusted)], last))
            if torch.manual_seed(0)
        ]
        assert results[0] == results[1] and results[0]

    # Undoing leaves the model as a run without callbacks.
    for callback in callbacks:
        if not isinstance(callback, LayerwiseEMLoss):
            callback.surgery.undo()
    plain, _ = fitted(project, tmp_path)
    assert structure(model) == structure(plain)
    project.build().load_state_dict(model.state_dict())


def randomness():
    return [torch.get_rng_state(), random.getstate(), list(np.random.get_state()[1])]


def attributes(model):
    """Return the plain attributes and the tensors of all modules, with their identities."""
    return {
        f"{path}: {key}": (id(value), value.clone() if isinstance(value, torch.Tensor) else repr(value))
        for path, module in model.named_modules()
        for key, value in vars(module).items()
    }


@pytest.mark.parametrize("mode", ["plain", "all"])
@pytest.mark.parametrize("name", PROJECTS)
def test_audit_leaves_everything_as_it_was(name, mode, tmp_path):
    project = PROJECTS[name]
    runs = []
    for watching in ([], [EMAudit(printed=False)]):
        callbacks = made(project, mode) if mode == "all" else []
        runs.append(fitted(project, tmp_path, [*callbacks, *watching]))
    (model, trainer), (watched, _) = runs
    assert_same(watched.state_dict(), model.state_dict())
    (watcher,) = watching
    assert any(one.em for one in watcher.audit) or (not project.em and mode == "plain")

    environment = getattr(model, "environment", None)
    place = vars(environment).copy() if environment else None
    batch = next(iter(project.data()))
    state, random_state, plain = copy.deepcopy(model.state_dict()), randomness(), attributes(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    shape = structure(model)
    found = audit(model, batch)
    assert_same(model.state_dict(), state)
    assert_same(randomness(), random_state)
    assert_same(attributes(model), plain)
    assert structure(model) == shape and model.trainer is trainer
    assert all(new is old for new, old in zip((p.grad for p in model.parameters()), gradients, strict=True))
    assert (vars(environment) if environment else None) == place
    if project.em:
        assert any(one.operation == project.em and one.em for one in found)
    assert len(str(found).splitlines()) > len(found)


@pytest.mark.parametrize("name", PROJECTS)
def test_wrong_uses_are_named(name, tmp_path):
    project = PROJECTS[name]

    def fit(callback):
        trainer_of(tmp_path, [callback], epochs=1).fit(project.build(), project.data())

    for key, cls in CALLBACKS.items():
        arguments = getattr(project, key)
        with pytest.raises(NoMatchError, match="bodi"):
            fit(cls(**{**arguments, "where": "bodi.*"}))
        with pytest.raises(ValueError, match="bodi"):
            where = arguments.get("where", "*")
            fit(cls(**{**arguments, "where": [*([where] if isinstance(where, str) else where), "bodi.*"]}))
    with pytest.raises(ValueError, match="num_components=0"):
        fit(InsertEMOperator(**{**project.insert, "num_components": 0}))
    with pytest.raises(ValueError, match="'singed'.*'signed'"):
        fit(SwapActivations(**{**project.swap, "activation": "singed"}))
    with pytest.raises(ValueError, match="weight=-1"):
        fit(LayerwiseEMLoss(**{**project.layers, "weight": -1}))


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return loader(normal(16, 8))

    test_dataloader = predict_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI uses old names of jsonargparse
def test_lightning_cli(tmp_path, monkeypatch):
    """A project under LightningCLI gets the callbacks in its config, with no edit."""
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns of arguments beside args=
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {tmp_path}
  callbacks:
    - {{class_path: em_lightning.callbacks.SwapActivations, init_args: {{where: encoder.1}}}}
    - {{class_path: em_lightning.callbacks.InsertEMOperator, init_args: {{where: encoder.2, num_components: 2}}}}
    - {{class_path: em_lightning.callbacks.LayerwiseEMLoss, init_args: {{where: encoder.1, weight: 0.1}}}}
    - {{class_path: em_lightning.callbacks.EMAudit, init_args: {{printed: false}}}}
model: {{width: 12, code: 2}}
"""
    )

    def cli(*args):
        arguments = [*args, f"--config={config}"]
        return LightningCLI(Autoencoder, Data, args=arguments, save_config_callback=None, seed_everything_default=0)

    trained = cli("fit")
    assert type(trained.model.encoder[1]).__name__ == "SignedActivation"
    path = trained.trainer.checkpoint_callback.best_model_path
    tested = cli("test", f"--ckpt_path={path}")
    assert tested.trainer.callback_metrics["test_loss"].isfinite()
    assert_same(tested.model.state_dict(), trained.model.state_dict())
    with pytest.raises(SystemExit):
        cli("fit", "--trainer.callbacks.num_component=3")
