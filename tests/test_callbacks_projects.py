"""Callbacks in trainings of other projects: several optimizers, frozen layers, copies of modules, and messages."""

import contextlib
import copy

import lightning
import pytest
import torch
import user_models as users
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from user_models import fit

from em_lightning.callbacks import (
    InsertEMOperator,
    LayerwiseEMLoss,
    RestoreSurgery,
    SwapActivations,
    TemperatureSchedule,
)
from em_lightning.losses import EMLoss
from em_lightning.surgery import LayerwiseLoss, NoMatchError, restore_surgery, set_temperature

pytestmark = users.QUIET


class Gan(lightning.LightningModule):
    """A generator and a discriminator; keeps the gradients that each optimizer steps with."""

    def __init__(self, toggle=True, lr=0.0):
        super().__init__()
        self.automatic_optimization = False
        self.toggle, self.lr = toggle, lr
        torch.manual_seed(0)
        self.generator = nn.Linear(6, 6)
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.kept = []

    def phase(self, optimizer, loss, module):
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        self.kept.append([p.grad.clone() for p in module.parameters()])
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch):
        first, second = self.optimizers()
        x = batch[0]
        self.phase(first, lambda: -self.critic(self.generator(x)).mean(), self.generator)
        self.phase(second, lambda: self.critic(self.generator(x).detach()).mean() - self.critic(x).mean(), self.critic)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), self.lr) for part in (self.generator, self.critic)]


class Reversed(Gan):
    """Trains the critic first."""

    def training_step(self, batch):
        first, second = self.optimizers()
        x = batch[0]
        self.phase(second, lambda: self.critic(self.generator(x).detach()).mean() - self.critic(x).mean(), self.critic)
        self.phase(first, lambda: -self.critic(self.generator(x)).mean(), self.generator)


def gradients(folder, model, **options):
    fit(folder, model, LayerwiseEMLoss("critic.0", **{"weight": 0.1, "verbose": False, **options}))
    return model.kept


def by_hand(x, critic, generator):
    """Return the gradients of the critic with the loss written by hand."""
    fake, real = critic[0](generator(x).detach()), critic[0](x)
    loss = critic[1:](fake).mean() - critic[1:](real).mean() + 0.1 * EMLoss().total(torch.cat([fake, real]))
    return torch.autograd.grad(loss, list(critic.parameters()))


@pytest.mark.parametrize("toggle", [True, False])
def test_the_loss_of_a_layer_belongs_to_its_optimizer(toggle, tmp_path):
    plain = Gan(toggle)
    fit(tmp_path, plain)
    model = Gan(toggle)
    kept = gradients(tmp_path, model)
    for batch, (x, _) in enumerate(users.MLP.data()):
        for found, expected in zip(
            kept[2 * batch], plain.kept[2 * batch], strict=True
        ):  # the generator: as without the loss
            assert torch.equal(found, expected)
        for found, expected in zip(kept[2 * batch + 1], by_hand(x, model.critic, model.generator), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [Gan, Reversed])
def test_every_counts_batches(cls, tmp_path):
    plain = cls()
    fit(tmp_path, plain)
    kept = gradients(tmp_path, cls(), every=2)
    critic = [i for i, grads in enumerate(kept) if len(grads) == 4]
    differs = [not torch.equal(kept[i][0], plain.kept[i][0]) for i in critic]
    assert differs == [True, False, True]


@pytest.mark.parametrize("toggle", [True, False])
@pytest.mark.parametrize("cls", [Gan, Reversed])
def test_automatic_weights_are_measured_on_the_loss_of_the_owner(cls, toggle, tmp_path):
    model = cls(toggle)
    callback = LayerwiseEMLoss("critic.0", verbose=False)
    fit(tmp_path, model, callback, limit_train_batches=1)
    x = next(iter(users.MLP.data()))[0]
    taps = torch.cat([model.critic[0](model.generator(x).detach()), model.critic[0](x)]).detach().requires_grad_()
    fake, real = model.critic[1:](taps).chunk(2)
    (main,) = torch.autograd.grad(fake.mean() - real.mean(), taps)
    (own,) = torch.autograd.grad(EMLoss().total(taps), taps)
    averages = callback._state["norms"]["critic.0"]
    if cls is Gan or toggle:
        assert averages["main"] / averages["em"] == pytest.approx((main.norm() / own.norm()).item(), rel=1e-4)


class Joint(Gan):
    """Two optimizers in one loss, without detaching."""

    def training_step(self, batch):
        loss = self.critic(self.generator(batch[0])).square().mean()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.kept.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters()])
        for optimizer in self.optimizers():
            optimizer.step()


def test_a_loss_trains_nothing_of_other_optimizers(tmp_path):
    plain, model, named = Joint(), Joint(), Joint()
    fit(tmp_path, plain)
    kept = gradients(tmp_path, model)
    for found, expected in zip(kept, plain.kept, strict=True):
        assert torch.equal(found[0], expected[0]) and not torch.equal(found[2], expected[2])
    kept = gradients(tmp_path, named, optimizer=0)  # the loss is assigned to the generator's optimizer
    for found, expected in zip(kept, plain.kept, strict=True):
        assert not torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


def test_ambiguous_optimizers_and_unused_losses_raise(tmp_path):
    class Flat(Gan):
        def __init__(self):
            super().__init__()
            self.act = nn.Tanh()

    with pytest.raises(ValueError, match="2 optimizers .*'act'.*optimizer="):
        fit(tmp_path, Flat(), LayerwiseEMLoss("act"))

    class Unused(Gan):
        def __init__(self):
            super().__init__()
            self.critic.append(nn.Linear(1, 1))

        def training_step(self, batch):
            first, second = self.optimizers()
            self.phase(first, lambda: self.generator(batch[0]).mean(), self.generator)

    with pytest.raises(RuntimeError, match=r"no loss .*critic.0"):
        fit(tmp_path, Unused(), LayerwiseEMLoss("critic.0", verbose=False))


# Layers without gradients.


class Acting(users.MLP):
    """Runs the encoder under no_grad first, as agents and pseudo-labels do."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.encoder(torch.full_like(batch[0], 1e3))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("weight", ["auto", 0.01])
def test_calls_under_no_grad_do_not_count(weight, tmp_path):
    states = []
    for cls in (users.MLP, Acting):
        torch.manual_seed(3)
        model = cls()
        fit(tmp_path, model, LayerwiseEMLoss("encoder.1", weight=weight, verbose=False))
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


class Frozen(users.MLP):
    @property
    def backbone(self):
        return self.encoder

    lr = 0.01

    def configure_optimizers(self):
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), 0.1)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen")
@pytest.mark.parametrize("weight", ["auto", 0.01])
def test_the_loss_of_a_frozen_layer_is_omitted_with_one_warning(weight, tmp_path):
    class Backbone(Frozen):
        def build(self):
            super().build()
            self.backbone_ = self.encoder

    model = Backbone()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    finetuning.freeze_before_training = lambda module: finetuning.freeze(module.encoder)
    logged = []

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append("em/encoder.1/weight" in trainer.callback_metrics)

    callbacks = [LayerwiseEMLoss("encoder.1", weight=weight, verbose=False), finetuning, Keep()]
    with pytest.warns(UserWarning, match=r"encoder.1 wait") as caught:
        users.trainer(tmp_path, 2, callbacks).fit(model, users.MLP.data())
    assert sum("wait" in str(one.message) for one in caught) == 1
    assert logged == [False] * 3 + [True] * 3


def test_a_partly_frozen_model_trains_the_losses_that_it_can(tmp_path):
    model = Frozen()
    model.encoder[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="encoder.1 wait"):
        trainer = fit(tmp_path, model, LayerwiseEMLoss(["encoder.1", "encoder.3"], verbose=False))
    assert {key for key in trainer.callback_metrics if key.endswith("weight")} == {"em/encoder.3/weight"}


def test_a_detached_layer_is_trained_by_its_own_loss_alone(tmp_path):
    x, model = torch.randn(16, 6), users.MLP()
    losses = LayerwiseLoss(model, "encoder.2", "variance", detach=True, verbose=False)
    main = model(x).square().mean()
    losses.add_to(main).backward()
    found = [model.encoder[2].weight.grad.clone(), model.head.weight.grad.clone()]
    losses.remove()
    model.zero_grad()
    own = EMLoss(free_energy=0.0, variance=1.0, decorrelation=0.0).total(model.encoder[:3](x))
    torch.testing.assert_close(found[0], torch.autograd.grad(own, model.encoder[2].weight)[0])
    torch.testing.assert_close(found[1], torch.autograd.grad(model(x).square().mean(), model.head.weight)[0])
    inputs = LayerwiseLoss(model, "encoder.3", "variance", tap="input", detach=True, verbose=False)
    inputs.add_to(model(x).square().mean()).backward()
    torch.testing.assert_close(model.encoder[2].weight.grad, found[0])
    inputs.remove()
    for path in ("generator", "critic.0"):
        manual, plain = Joint(), Joint()
        fit(tmp_path, plain)
        fit(tmp_path, manual, LayerwiseEMLoss(path, weight=0.1, detach=True, verbose=False))
        data = next(iter(users.MLP.data()))[0]
        first = manual.generator(data) if path == "generator" else manual.critic[0](manual.generator(data))
        layer = manual.get_submodule(path)
        (expected,) = torch.autograd.grad(0.1 * EMLoss().total(first), layer.weight)
        torch.testing.assert_close(manual.kept[0][0 if path == "generator" else 2], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(manual.kept[0][4], plain.kept[0][4])  # the last layer's


# Copies of modules.


class Target(users.MLP):
    """Loads the weights of its encoder into a copy at each step, as DQN does."""

    def build(self):
        super().build()
        self.target = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())

    def update(self):
        self.target.load_state_dict(self.encoder.state_dict())

    def training_step(self, batch, batch_idx):
        self.update()
        return super().training_step(batch, batch_idx) + 0 * self.target(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD([*self.encoder.parameters(), *self.head.parameters()], lr=0.1)


class Momentum(Target):
    """Averages the parameters into a copy without gradients, as BYOL and MoCo do."""

    def build(self):
        super().build()
        self.target.requires_grad_(False)

    @torch.no_grad()
    def update(self):
        for mine, other in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            mine.lerp_(other, 0.5)


class Silent(Target):
    """Loads the weights of its encoder with ``strict=False``."""

    def update(self):
        self.target.load_state_dict(self.encoder.state_dict(), strict=False)


@pytest.mark.parametrize("cls", [Target, Momentum, Silent])
@pytest.mark.parametrize(
    "make", [InsertEMOperator, lambda where, **k: SwapActivations(where=where, arguments={"learnable": True}, **k)]
)
def test_target_networks_are_changed_with_their_originals(cls, make, tmp_path):
    inserted = make is InsertEMOperator
    both = ["encoder.0", "target.0"] if inserted else ["encoder.1", "target.1"]
    model = cls()
    fit(tmp_path, model, make(both, verbose=False))
    original, copy = (model.get_submodule(path) for path in both)
    assert type(original) is type(copy)
    assert [p.shape for p in original.parameters()] == [p.shape for p in copy.parameters()]
    if cls is not Momentum:
        with pytest.raises(ValueError, match=f"'{both[0]}'.* loaded .*'{both[1]}'"):
            fit(tmp_path, cls(), make([both[0]], verbose=False))


def test_an_untrained_layer_beside_a_trained_one_of_equal_shape_is_named(tmp_path):
    class Forgetful(users.MLP):
        def configure_optimizers(self):
            layers = [self.encoder[0], self.encoder[1], self.encoder[2], self.head]
            return torch.optim.SGD([{"params": layer.parameters()} for layer in layers], lr=0.1)

    with pytest.raises(ValueError, match="no optimizer trains encoder.3.log_temperature_ratio:"):
        fit(tmp_path, Forgetful(), SwapActivations(arguments={"learnable": True}))


# Messages and state.


def test_another_callback_of_the_same_settings_has_the_surgery(tmp_path):
    model, first, second = users.MLP(), SwapActivations(), SwapActivations()
    fit(tmp_path, model, first)
    fit(tmp_path, model, second)
    assert second.surgery is first.surgery and "encoder.3" in second.surgery.report
    users.trainer(tmp_path, 1, [third := SwapActivations()]).test(model, users.MLP.data(), verbose=False)
    third.surgery.undo()
    assert isinstance(model.encoder[1], nn.ReLU)


def test_callbacks_with_other_functions_or_classes_have_other_keys(tmp_path):
    class ReLU(nn.ReLU):
        pass

    one, other = SwapActivations(where=lambda path, _: "1" in path), SwapActivations(where=lambda path, _: "3" in path)
    model = users.MLP()
    fit(tmp_path, model, one, other)
    assert len(one.surgery.changes) == len(other.surgery.changes) == 1
    assert SwapActivations(target=ReLU).state_key != SwapActivations(target=nn.ReLU).state_key
    assert SwapActivations(where=lambda module: True).state_key == SwapActivations(where=lambda module: True).state_key


def test_two_schedules_of_the_same_modules_are_refused(tmp_path):
    schedules = TemperatureSchedule(2.0, 1.0, 5), TemperatureSchedule(4.0, 1.0, 5)
    with pytest.raises(RuntimeError, match="TemperatureSchedule"):
        fit(tmp_path, users.MLP(), SwapActivations("signed"), *schedules)


def test_a_temperature_without_a_swap_says_to_swap_first(tmp_path):
    with pytest.raises(NoMatchError, match="swap first.*SwapActivations before TemperatureSchedule"):
        fit(tmp_path, users.MLP(), TemperatureSchedule(2.0, 1.0, 5))


def test_a_checkpoint_with_surgery_names_what_loads_it(tmp_path):
    path = str(tmp_path / "swapped.ckpt")
    fit(tmp_path, users.MLP(), SwapActivations()).save_checkpoint(path)
    for load in (
        lambda: users.MLP.load_from_checkpoint(path),
        lambda: users.MLP().load_state_dict(torch.load(path)["state_dict"]),
        lambda: users.trainer(tmp_path).test(users.MLP(), users.MLP.data(), ckpt_path=path, verbose=False),
    ):
        with pytest.raises(RuntimeError, match="RestoreSurgery_or_restore_surgery"):
            load()
    with pytest.warns(UserWarning, match="RestoreSurgery.or.restore_surgery"):
        users.MLP.load_from_checkpoint(path, strict=False)
    assert type(restore_surgery(users.MLP, path).encoder[1]) is not nn.ReLU
    users.trainer(tmp_path, 1, [RestoreSurgery(path)]).test(
        users.MLP(), users.MLP.data(), ckpt_path=path, verbose=False
    )


def test_fine_tuning_from_a_plain_checkpoint_gets_advice_that_works(tmp_path):
    path = str(tmp_path / "plain.ckpt")
    fit(tmp_path, users.MLP()).save_checkpoint(path)
    trainer = users.trainer(tmp_path, 2, [SwapActivations()])
    with pytest.raises(ValueError, match=r"without surgery.*load_state_dict\(torch.load\(path\)\['state_dict'\]\)"):
        trainer.fit(users.MLP(), users.MLP.data(), ckpt_path=path, weights_only=True)
    model = users.MLP()
    model.load_state_dict(torch.load(path)["state_dict"])
    fit(tmp_path, model, SwapActivations())


def test_a_repeated_argument_is_named():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'dim'"):
        SwapActivations("softmax_gated", arguments={"dim": 1})


@pytest.mark.parametrize("make", [SwapActivations, lambda: InsertEMOperator("encoder.2", verbose=False)])
def test_a_plain_load_that_drops_a_surgery_warns(make, tmp_path):
    trainer = fit(tmp_path, model := users.MLP(), make())
    trainer.save_checkpoint(tmp_path / "changed.ckpt")
    state = torch.load(tmp_path / "changed.ckpt")["state_dict"]
    message = "strict=False drops the surgery at encoder.*RestoreSurgery or restore_surgery"
    with pytest.warns(UserWarning, match=message):
        users.MLP().load_state_dict(state, strict=False)
    model.load_state_dict(state, strict=False)  # no warning for a model with the surgery


class Holder(lightning.LightningModule):
    """Trains layers that other LightningModules may hold too, and never calls its head."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(4, 4)

    def training_step(self, batch, index):
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows():
    data = torch.utils.data.TensorDataset(torch.randn(8, 4))
    return torch.utils.data.DataLoader(data, batch_size=4)


def test_layers_that_another_model_changed_are_not_changed_again(tmp_path):
    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    insert = InsertEMOperator("body.0", verbose=False)
    first = Holder(body)
    users.trainer(tmp_path, 1, [insert]).fit(first, rows())
    again = users.trainer(tmp_path, 1, [InsertEMOperator("body.0", verbose=False)])
    with pytest.raises(ValueError, match=r"'body.0' has an operator from an earlier surgery .* undo\(\)"):
        again.fit(Holder(body), rows())
    insert.surgery.undo()
    users.trainer(tmp_path, 1, [InsertEMOperator("body.0", verbose=False)]).fit(Holder(body), rows())
    assert type(body[0].layer) is nn.Linear


@pytest.mark.parametrize(
    "make, path",
    [
        (lambda: InsertEMOperator("head", verbose=False), "head"),
        (lambda: SwapActivations("grouped", target=nn.Linear, where="head", verbose=False), "head"),
    ],
)
def test_changes_that_no_batch_reaches_are_named(make, path, tmp_path):
    model = Holder(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.warns(UserWarning, match=f"changed {path}, but no batch of the epoch called the forward there"):
        users.trainer(tmp_path, 2, [make()]).fit(model, rows())
    fit(tmp_path, users.MLP(), SwapActivations(verbose=False))  # a warning is an error in this suite


def test_a_second_name_of_a_called_layer_is_not_reported_as_uncalled(tmp_path):
    class Named(Holder):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()))
            self.body[3] = self.activation = self.body[1]

    users.trainer(tmp_path, 1, [callback := SwapActivations(verbose=False)]).fit(Named(), rows())
    assert {change.path for change in callback.surgery.changes} == {"activation", "body.1", "body.3"}


def test_the_warning_of_an_uncalled_layer_gives_its_other_names(tmp_path):
    class Named(Holder):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
            self.first = self.body[0]

    with pytest.warns(UserWarning, match="changed first, but .* select the same layers by body.0"):
        users.trainer(tmp_path, 1, [InsertEMOperator("first", verbose=False)]).fit(Named(), rows())


@pytest.mark.parametrize(
    "make, other",
    [
        (lambda: nn.LeakyReLU(0.5), lambda: nn.LeakyReLU(0.1)),
        (lambda: nn.GELU(approximate="tanh"), lambda: nn.GELU()),
        (lambda: nn.Sequential(nn.Tanh()), lambda: nn.Sequential(nn.Tanhshrink())),
    ],
)
def test_checkpoints_tell_activations_apart_that_are_given_as_instances(make, other, tmp_path):
    trainer = fit(tmp_path, users.MLP(), SwapActivations(make(), verbose=False))
    trainer.save_checkpoint(tmp_path / "swapped.ckpt")
    for again, error in ((make, None), (other, ValueError)):
        tester = users.trainer(tmp_path, 1, [SwapActivations(again(), verbose=False)])
        with pytest.raises(error, match="another surgery") if error else contextlib.nullcontext():
            tester.validate(users.MLP(), users.MLP.data(), ckpt_path=tmp_path / "swapped.ckpt", verbose=False)


class Averaged(users.MLP):
    """Keeps an average of its encoder, which only predictions use."""

    def build(self):
        super().build()
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)

    def predict_step(self, batch, batch_idx):
        return self.head(self.average(batch[0]))


@pytest.mark.parametrize(
    "callback",
    [
        lambda: SwapActivations(verbose=False),
        lambda: InsertEMOperator(["encoder.2", "average.2"], 2, verbose=False),
    ],
)
def test_changes_of_frozen_averages_need_not_be_called_in_training(callback, tmp_path):
    fit(tmp_path, Averaged(), callback())  # a warning is an error in this suite


class OwnLoader(users.MLP):
    """Decides about ``weights_only`` itself, as some projects do."""

    @classmethod
    def load_from_checkpoint(cls, path, map_location=None, **arguments):
        return super().load_from_checkpoint(path, map_location, weights_only=False, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"weights_only": False}])
def test_classes_with_a_loader_of_their_own_are_restored(arguments, tmp_path):
    trainer = fit(tmp_path, model := OwnLoader(), SwapActivations("grouped", verbose=False))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    restored = restore_surgery(OwnLoader, tmp_path / "own.ckpt", **arguments)
    x = next(iter(users.MLP.data()))[0]
    assert type(restored) is OwnLoader and torch.equal(restored(x), model(x))


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model_state_dict": state}])
def test_weights_without_a_plan_are_told_from_an_unchanged_model(wrap, tmp_path):
    fit(tmp_path, model := users.MLP(), SwapActivations(verbose=False))
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights of a changed model, but no plan.* call load_state_dict"):
        restore_surgery(users.MLP, tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "where", ["encoder.*", ["encoder.1", "encoder.3"], nn.ReLU, lambda path, _: path == "encoder.1"]
)
def test_plain_activations_have_no_temperature_to_set(where, tmp_path):
    with pytest.raises(NoMatchError, match="swap first.*SwapActivations before TemperatureSchedule"):
        fit(tmp_path, users.MLP(), TemperatureSchedule(2.0, 1.0, 5, where=where))
    with pytest.raises(NoMatchError, match="swap first.*with swap_activations"):
        set_temperature(users.MLP(), 2.0, where)
    with pytest.raises(NoMatchError, match="swap first"):  # the schedule before the swap is right, another layer is not
        fit(tmp_path, users.MLP(), SwapActivations(where="encoder.3"), TemperatureSchedule(2.0, 1.0, 5, where="head"))


CHANGES = [
    lambda: InsertEMOperator("encoder.2", 2, verbose=False),
    lambda: InsertEMOperator(["encoder.0", "encoder.2"], 3, set_dim=0, verbose=False),
    lambda: SwapActivations("softmax_gated", where="encoder.1", arguments={"learnable": True}, verbose=False),
]


@pytest.mark.parametrize("make", CHANGES)
def test_every_callback_of_the_same_settings_has_the_surgery(make, tmp_path):
    model, first, second = users.MLP(), make(), make()
    fit(tmp_path, model, first)
    fit(tmp_path, model, second)
    assert second.surgery is first.surgery and len(second.surgery.changes) > 0
    users.trainer(tmp_path, 1, [third := make()]).test(model, users.MLP.data(), verbose=False)
    third.surgery.undo()
    assert [type(module) for module in model.modules()] == [type(module) for module in users.MLP().modules()]


@pytest.mark.parametrize("make", CHANGES)
def test_any_change_of_a_model_from_a_plain_checkpoint_gets_that_advice(make, tmp_path):
    path = str(tmp_path / "plain.ckpt")
    fit(tmp_path, users.MLP()).save_checkpoint(path)
    with pytest.raises(ValueError, match=r"load_state_dict\(torch.load\(path\)\['state_dict'\]\).*without ckpt_path"):
        users.trainer(tmp_path, 2, [make()]).fit(users.MLP(), users.MLP.data(), ckpt_path=path, weights_only=True)
    model = users.MLP()
    model.load_state_dict(torch.load(path)["state_dict"])
    fit(tmp_path, model, make())
