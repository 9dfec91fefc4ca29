"""Unedited models through fit, checkpoint, resume, test, predict and undo."""

import pytest
import torch
import user_models as users

from em_lightning.callbacks import InsertEMOperator, LayerwiseEMLoss, RestoreSurgery, SwapActivations
from em_lightning.surgery import restore_surgery

pytestmark = [
    users.QUIET,
    pytest.mark.filterwarnings(
        "ignore:.*enable_nested_tensor",
        "ignore:`torch.jit",  # PyG's
    ),
]

CASES = {
    "MLP": (users.MLP, "encoder.0", "encoder.2"),
    "ResNet18": (users.ResNet18, "net.layer2", "net.layer4"),
    "Transformer": (users.Transformer, "encoder.layers.0", "encoder.layers.*.linear1"),
    "GCN": (users.GCN, "net.convs.0", "net.convs.*"),
    "GIN": (users.GIN, "net.convs.0", "net.convs.*"),
    "PointNet": (users.PointNet, "conv1", "conv?"),
    "TwoOptimizers": (users.TwoOptimizers, "encoder.0", "encoder.2"),
    "LateMLP": (users.LateMLP, "encoder.0", "encoder.2"),
    "SetupMLP": (users.SetupMLP, "encoder.0", "encoder.0"),
}


def callbacks(insert, tap):
    return [SwapActivations("signed"), InsertEMOperator(insert, 3, arguments={"num_iters": 1}), LayerwiseEMLoss(tap)]


def fresh(cls):
    torch.manual_seed(3)
    return cls()


def predictions(trainer, model, data, **options):
    return torch.cat(trainer.predict(model, data, **options))


@pytest.mark.parametrize("name", CASES)
def test_life_of_a_model(name, tmp_path):
    cls, insert, tap = CASES[name]
    data = cls.data()
    straight = fresh(cls)
    users.trainer(tmp_path, 2, callbacks(insert, tap)).fit(straight, data)

    half = fresh(cls)
    used = callbacks(insert, tap)
    first = users.trainer(tmp_path, 1, used)
    first.fit(half, data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fresh(cls)
    second = users.trainer(tmp_path, 2, callbacks(insert, tap))
    second.fit(resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    second.save_checkpoint(tmp_path / "full.ckpt", weights_only=True)
    expected = straight.state_dict()
    assert resumed.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())
    assert any(key.endswith("gate") and value != 0 for key, value in expected.items())

    # test and predict: with the callbacks, with the restoring one, and with none on the model that was trained
    ways = [(straight, [], {}), (fresh(cls), callbacks(insert, tap), {"ckpt_path": tmp_path / "full.ckpt"})]
    ways.append((fresh(cls), [RestoreSurgery(tmp_path / "full.ckpt")], {"ckpt_path": tmp_path / "full.ckpt"}))
    if name != "SetupMLP":  # load_from_checkpoint never calls setup
        ways.append((restore_surgery(cls, tmp_path / "full.ckpt"), [], {}))
    outputs, losses = [], []
    for model, added, options in ways:
        trainer = users.trainer(tmp_path, callbacks=added)
        outputs.append(predictions(trainer, model, data, **options))
        losses.append(trainer.test(model, data, verbose=False, **options)[0]["test_loss"])
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert losses == [losses[0]] * len(ways)
    with pytest.raises(RuntimeError, match="(Unexpected|unexpected).*em_surgery"):
        users.trainer(tmp_path).test(fresh(cls), data, ckpt_path=tmp_path / "full.ckpt", verbose=False)

    # undo, in the order of the list: the model is of its old types, and runs
    plain = fresh(cls)
    if name in ("LateMLP", "SetupMLP"):
        plain.configure_model(), plain.setup("fit")
    for callback in used[:2]:
        callback.surgery.undo()
    assert half.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in half.modules()] == [type(m) for m in plain.modules()]
    half.load_state_dict(plain.state_dict())
    with torch.no_grad():
        batch = next(iter(data))
        arguments = batch if name in ("GCN", "GIN", "PointNet") else batch[0]
        assert torch.equal(half.eval()(arguments), plain.eval()(arguments))
    assert not {"training_step", "forward", "setup", "configure_model", "on_save_checkpoint"} & set(vars(half))
