"""LayerwiseEMLoss against losses written into the model by hand: the same parameters after training."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import user_models as users
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint

from em_lightning.callbacks import LayerwiseEMLoss
from em_lightning.losses import EMLoss
from em_lightning.surgery import Chain, LayerwiseLoss, NoMatchError

pytestmark = [
    users.QUIET,
    pytest.mark.filterwarnings(
        "ignore:.*torch.utils.checkpoint",
        "ignore:The .grad attribute of a Tensor that is not a leaf",  # dynamo's
    ),
]
WEIGHT = 0.01


def em(energies):
    with torch.autocast("cpu", enabled=False):
        return WEIGHT * EMLoss().total(energies.float())


class ByHand(users.MLP):
    """The MLP with the EM losses of its hidden layers in its own training_step."""

    def hidden(self, x):
        first = self.encoder[1](self.encoder[0](x))
        return first, self.encoder[3](self.encoder[2](first))

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.hidden(x)
        return F.cross_entropy(self.head(second), y) + (em(first) + em(second))


class Silent(users.MLP):
    """Lightning's own ``self.log`` does not compile."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class LBFGS:
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Dict:
    """A training_step with one argument that returns more than the loss."""

    def training_step(self, batch):
        return {"loss": super().training_step(batch, 0), "more": 1}


class Checkpointed:
    def forward(self, x):
        return self.head(checkpoint(self.encoder, x, use_reentrant=False))

    def hidden(self, x):
        return super().hidden(x)


def build(base, *mixins):
    torch.manual_seed(3)
    return type("Model", (*mixins, base), {})()


def fitted(tmp_path, model, callbacks=(), compiled=False, **options):
    if options.get("plugins") == "16-mixed":  # asked for by name, Lightning takes bf16 on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options = {**options, "plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    given = torch.compile(model, backend="aot_eager") if compiled else model
    users.trainer(tmp_path, 2, callbacks, **options).fit(given, users.MLP.data())
    return model


@pytest.mark.parametrize(
    ("mixins", "options"),
    [
        ((), {}),
        ((), {"accumulate_grad_batches": 2}),
        ((), {"gradient_clip_val": 0.1}),
        ((), {"precision": "bf16-mixed"}),
        ((), {"plugins": "16-mixed"}),
        ((), {"plugins": "16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        ((LBFGS,), {}),
        ((Dict,), {}),
        ((users.Manual,), {}),
        ((Checkpointed,), {}),
        ((), {"compiled": True}),
        ((LBFGS,), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        ((Checkpointed, users.Manual), {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
def test_equal_to_a_loss_written_by_hand(mixins, options, tmp_path):
    expected = fitted(tmp_path, build(ByHand, *mixins), **options)
    callback = LayerwiseEMLoss(["encoder.1", "encoder.3"], weight=WEIGHT)
    model = fitted(tmp_path, build(Silent, *mixins), [callback], **options)
    # A compiled model takes other roundings in its own EM losses; the callback's are outside of it.
    tolerance = 1e-6 if options.get("compiled") else 0.0
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=tolerance, atol=tolerance)
    assert not any(isinstance(value, Chain) for value in vars(model).values())  # all taken off again
    assert not any(module._forward_hooks for module in model.modules())
    plain = fitted(tmp_path, build(Silent, *mixins), **options)
    assert not torch.equal(plain.encoder[0].weight, model.encoder[0].weight)


def test_two_optimizers_charge_each_layer_to_the_loss_that_depends_on_it(tmp_path):
    class Hand(users.TwoOptimizers):
        def training_step(self, batch, batch_idx):
            x, y = batch
            first, second = self.optimizers()
            code = self.encoder(x)
            score = self.head(code.detach())
            second.zero_grad()
            self.manual_backward(F.cross_entropy(score, y) + em(score))
            second.step()
            first.zero_grad()
            self.manual_backward(F.mse_loss(self.decoder(code), x) + em(code))
            first.step()

    torch.manual_seed(3)
    expected = fitted(tmp_path, Hand())
    torch.manual_seed(3)
    model = fitted(tmp_path, users.TwoOptimizers(), [LayerwiseEMLoss(["encoder", "head"], weight=WEIGHT)])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.state_dict().items())


def test_input_taps_weights_and_schedule():
    model, x = users.MLP(), torch.randn(16, 6)
    factors = []
    for step in range(4):
        options = {"tap": "input", "schedule": lambda t: 3.0 - t}
        several = [
            LayerwiseLoss(model.encoder, path, weight=weight, **options) for path, weight in (("1", 0.5), ("3", 0.25))
        ]
        total = model(x).sum()
        for losses in several:
            losses.step = step
            total = losses.add_to(total)
        pre = [model.encoder[0](x), model.encoder[2](model.encoder[1](model.encoder[0](x)))]
        loss = EMLoss()
        own = 0.5 * loss.total(pre[0]) + 0.25 * loss.total(pre[1])
        factors.append(((total - model(x).sum()) / own).item())
        for losses in several:
            losses.remove()
    assert factors == pytest.approx([3.0, 2.0, 1.0, 0.0], abs=1e-5)
    losses = LayerwiseLoss(model.encoder, "1", weight=1.0, every=2)
    once = EMLoss().total(model.encoder[:2](x))
    losses.reset()
    for factor in (2, 0, 2):
        main = model(x).sum()
        torch.testing.assert_close(losses.add_to(main), main + factor * once)


def test_layer_called_twice_counts_once_on_all_its_items():
    model, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(6, 4)
    losses = LayerwiseLoss(model, "0", weight=1.0)
    a, b = model(x), model(x + 1)
    total = losses.add_to(a.sum() + b.sum())
    assert torch.equal(total, a.sum() + b.sum() + EMLoss().total(torch.cat([a, b])))


def test_channels_and_any_loss():
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3)), torch.randn(2, 3, 8, 8)
    energies = model(x)
    for loss, expected in (
        ("em", EMLoss().total(energies.movedim(1, -1))),
        ({"name": "em", "variance": 0.0}, EMLoss(variance=0.0).total(energies.movedim(1, -1))),
        ("variance", None),
        (EMLoss(free_energy=0.0), EMLoss(free_energy=0.0).total(energies.movedim(1, -1))),
        (lambda d: d.square().mean(), energies.square().mean()),
    ):
        losses = LayerwiseLoss(model, nn.Conv2d, loss, weight=1.0, dim=1)
        added = losses.add_to(model(x).sum()) - energies.sum()
        losses.remove()
        if expected is not None:
            torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [16, 128, 1024])
def test_automatic_weight_gives_every_width_the_same_share(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    losses = LayerwiseLoss(model, ["0", "1"], ratio=0.2)
    main = F.cross_entropy(model(x), y)
    total = losses.add_to(main)
    assert losses.weight_of("0") != losses.weight_of("1")
    for path, layer in (("0", model[:1]), ("1", model[:2])):
        leaf = layer(x).detach().requires_grad_()
        (of_main,) = torch.autograd.grad(F.cross_entropy(model[len(layer) :](leaf), y), leaf)
        (of_aux,) = torch.autograd.grad(losses.weight_of(path) * EMLoss().total(leaf), leaf)
        assert (of_aux.norm() / of_main.norm()).item() == pytest.approx(0.2, rel=1e-4)
    assert total != main
    state = copy.deepcopy(losses.state_dict())
    other = LayerwiseLoss(copy.deepcopy(model), ["0", "1"], ratio=0.2)
    other.load_state_dict(state)
    assert other.weight_of("0") == losses.weight_of("0") and other.step == 1
    with pytest.raises(ValueError, match=r"automatic weights for .*'0', '1'"):
        LayerwiseLoss(model, "0").load_state_dict(state)


def test_values_are_logged(tmp_path):
    trainer = users.trainer(tmp_path, 1, [LayerwiseEMLoss("encoder.1"), LayerwiseEMLoss("encoder.3", "variance", 0.1)])
    trainer.fit(users.MLP(), users.MLP.data())
    logged = {key for key in trainer.callback_metrics if key.startswith("em/")}
    assert logged == {
        *(f"em/encoder.1/{term}" for term in ("free_energy", "variance", "decorrelation", "weight")),
        *("em/encoder.3/variance", "em/encoder.3/weight"),
    }


def refuse(match, model, where="encoder.1", error=RuntimeError, **options):
    callback = LayerwiseEMLoss(where, **{"weight": 1.0, **options})
    trainer = users.trainer(".", 1, [callback])
    with pytest.raises(error, match=match):
        trainer.fit(model, users.MLP.data())
    inner = getattr(model, "_orig_mod", model)
    assert "training_step" not in vars(inner) and not any(
        m._forward_hooks for m in inner.modules()
    )  # after the error too


class Reentrant(users.MLP):
    def forward(self, x):
        return self.head(checkpoint(self.encoder, x.requires_grad_(), use_reentrant=True))


class Branches(users.MLP):
    def build(self):
        super().build()
        self.aux = nn.Linear(6, 16)


class Overwritten(users.MLP):
    def build(self):
        super().build()
        self.encoder[1] = nn.ReLU(inplace=True)


def test_losses_that_would_be_lost_are_refused():
    refuse(r"no loss .*layer\(s\) encoder.1: .*use_reentrant=False", Reentrant())
    refuse(r"no loss .*layer\(s\) aux: .*not called", Branches(), "aux")
    refuse("'encoder.0' .*in place.*inplace=False", Overwritten(), "encoder.0")
    refuse("where='decoder'", users.MLP(), "decoder", NoMatchError)
    refuse(r"no loss .*layer\(s\) aux", build(Branches, users.Manual), "aux")
    refuse("weight='auto' .*'side'", Side(), "side", weight="auto")
    attention = users.Transformer()
    with pytest.raises(ValueError, match="'encoder.layers.0.self_attn.out_proj' .*nn.MultiheadAttention"):
        LayerwiseLoss(attention, nn.Linear)
    with pytest.raises(NoMatchError, match="only functions"):
        LayerwiseLoss(attention, "*.activation")
    with pytest.raises(TypeError, match="output of '0' is dict"):
        odd = nn.Sequential(nn.Identity())
        LayerwiseLoss(odd, "0")
        odd({})


class Side(users.MLP):
    def build(self):
        super().build()
        self.side = nn.Linear(6, 4)

    def forward(self, x):
        self.side(x)
        return super().forward(x)


def test_hook_set_after_a_compiled_first_call_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(3, 4))
    losses = LayerwiseLoss(compiled, "0", weight=1.0)
    with pytest.raises(RuntimeError, match="compiled"):
        losses.add_to(compiled(torch.randn(3, 4)).sum())


def test_automatic_weight_under_a_compiled_head():
    torch.compiler.reset()  # earlier compilations in the process change which buffers a compiled backward frees
    head, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), head)
    found = []
    for last in (head, torch.compile(head, backend="aot_eager")):
        model[2] = last
        losses = LayerwiseLoss(model, "1")
        losses.add_to(model(x).square().sum()).backward()
        losses.remove()
        found.append(dataclasses.astuple(losses.norms["1"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": 0}, "weight=0 "),
        ({"weight": "much"}, "weight='much'"),
        ({"weight": {"encoder.1": 1.0}}, "weight={'encoder.1': 1.0}"),
        ({"every": 0}, "every=0"),
        ({"ratio": math.inf}, "ratio=inf"),
        ({"ratio": "large"}, "ratio='large'"),
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 0.2, "weight": 0.1}, "ratio=0.2.*weight=0.1"),
        ({"tap": "gradient"}, "tap='gradient'"),
        ({"loss": "emm"}, "'emm'"),
        ({"loss": nn.Linear(2, 1)}, "loss=Linear .*parameters"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        LayerwiseEMLoss("encoder.*", **options)


def test_bad_schedules():
    model = nn.Sequential(nn.Linear(4, 4))
    losses = LayerwiseLoss(model, "0", weight=1.0, schedule=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"schedule\(0\) returned -1.0"):
        losses.add_to(model(torch.randn(4, 4)).sum())


def test_pytorch_lightning_trainer(tmp_path):
    import pytorch_lightning

    from em_lightning.callbacks import SwapActivations

    class Theirs(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
            self.head = nn.Linear(16, 3)

        def configure_model(self):
            self.late = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

        def training_step(self, batch):
            return F.cross_entropy(self.head(self.late(self.encoder(batch[0]))), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Theirs()
    callbacks = [SwapActivations("signed", arguments={"learnable": True}), LayerwiseEMLoss(["encoder", "late"])]
    trainer = pytorch_lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        enable_model_summary=False,
    )
    trainer.fit(model, users.MLP.data())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.load(tmp_path / "model.ckpt")["em_lightning"]["surgery"][2]["path"] == "late.1"
    assert "em/late/free_energy" in trainer.callback_metrics


def test_units_of_feature_maps_are_their_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.ReLU())
    losses = LayerwiseLoss(net, nn.ReLU, weight=1.0)
    x = torch.randn(8, 2, 6, 6)
    maps = net[:3](x)
    vectors = net[3:](maps)
    losses.reset()
    losses.add_to(net(x).sum())
    for path, energies in (("2", maps.movedim(1, -1)), ("5", vectors)):
        for name, value in EMLoss()(energies).items():
            torch.testing.assert_close(losses.values[f"{path}/{name}"], value.detach())
    losses.remove()
    wrong = LayerwiseLoss(net, "5", weight=1.0, dim=5)
    with pytest.raises(ValueError, match=r"dim=5 .*'5'.*\(8, 6\)"):
        wrong.add_to(net(x).sum())


@pytest.mark.parametrize("options", [{"schedule": 3}, {"every": 1.5}])
def test_arguments_of_a_wrong_type_are_refused_at_once(options):
    ((name, value),) = options.items()
    with pytest.raises(TypeError, match=f"{name}={value} must be"):
        LayerwiseEMLoss("encoder", **options)
    with pytest.raises(TypeError, match=f"{name}={value} must be"):
        LayerwiseLoss(users.MLP(), "encoder.0", **options)
