"""Situations of other people's models: shared activations, sequences, functions, plain containers, target networks."""

import copy
import functools
import math

import lightning
import pytest
import torch
import torch.nn.functional as F
import user_models as users
from torch import nn
from user_models import fit

from em_lightning import audit
from em_lightning.callbacks import (
    EMAudit,
    InsertEMOperator,
    LayerwiseEMLoss,
    PosteriorMonitor,
    RestoreSurgery,
    StepSeeds,
    SwapActivations,
    TemperatureSchedule,
)
from em_lightning.surgery import (
    LayerwiseLoss,
    NoMatchError,
    Taps,
    find_modules,
    insert_em_operators,
    recorded_plan,
    restore_surgery,
    swap_activations,
)
from em_lightning.surgery.owners import owners_of

pytestmark = [
    users.QUIET,
    pytest.mark.filterwarnings(
        "ignore:`training_step` returned `None`",
    ),
]


class OneUnit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch):
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


# A shared activation is one layer of several places.


class Reused(nn.Module):
    """Uses one activation at two places, behind layers of given widths."""

    def __init__(self, first=8, second=8, act=None):
        super().__init__()
        self.a, self.b = nn.Linear(6, first), nn.Linear(first, second)
        self.act = nn.ReLU() if act is None else act

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


class Parallel(Reused):
    def forward(self, x):
        return self.act(self.a(x)) + self.act(self.a(-x))


def shared_names():
    act = nn.ReLU()
    return nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 8), act)


def shared_blocks():
    act = nn.Tanh()
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), act), nn.Sequential(nn.Linear(8, 8), act))


@pytest.mark.parametrize(
    ("make", "where"), [(Reused, "act"), (Parallel, "act"), (shared_names, "1"), (shared_blocks, "0.1")]
)
def test_a_tap_on_an_activation_of_several_places_says_so_once(make, where):
    with pytest.warns(UserWarning, match=f"'{where}' .*joins all places .*activation of its own") as caught:
        losses = LayerwiseLoss(make(), where, weight=1.0, verbose=False)
        model = next(site for site in losses.taps.sites).ancestors[0]
        for _ in range(3):
            losses.add_to(model(torch.randn(4, 6)).sum())
    assert len(caught) == 1


def test_weights_that_serve_several_places_are_one_layer():
    """Recurrent and tied layers share weights, so that their calls belong together."""
    losses = LayerwiseLoss(Reused(6, 6, nn.Linear(6, 6)), "act", weight=1.0, verbose=False)
    losses.add_to(losses.taps.sites[0].parent(torch.randn(4, 6)).sum())


@pytest.mark.filterwarnings("ignore:.*joins all places")
def test_places_of_different_widths_cannot_be_joined():
    model = Reused(8, 4)
    losses = LayerwiseLoss(model, "act", weight=1.0, verbose=False)
    with pytest.raises(ValueError, match="'act' was called with 4 and 8 units"):
        losses.add_to(model(torch.randn(4, 6)).sum())


class Decoder(nn.Module):
    """One activation behind a linear layer and behind a convolution."""

    def __init__(self, act):
        super().__init__()
        self.fc, self.conv, self.act = nn.Linear(4, 32), nn.Conv2d(2, 6, 3, padding=1), act

    def forward(self, x):
        return self.act(self.conv(self.act(self.fc(x)).view(-1, 2, 4, 4)))


class FunctionalDecoder(Decoder):
    def forward(self, x):
        return F.relu(self.conv(F.relu(self.fc(x)).view(-1, 2, 4, 4)))


@pytest.mark.filterwarnings("ignore:LogSoftmaxActivation over the 32 units")
@pytest.mark.parametrize("cls", [Decoder, FunctionalDecoder])
def test_an_activation_has_an_axis_for_each_number_of_axes(cls, capsys):
    model = cls(nn.ReLU() if cls is Decoder else nn.Identity())
    surgery = swap_activations(model, "log_softmax", functional=cls is FunctionalDecoder)
    for _ in range(2):
        out = model(torch.randn(3, 4))
        torch.testing.assert_close(out.exp().sum(1), torch.ones(3, 4, 4))
    printed = capsys.readouterr().out
    path = surgery.changes[0].path
    assert printed.count(f"{path}: ") == 2 and "axis 1 has 6 units" in printed and "axis -1 has 32 units" in printed


def test_a_layer_of_one_unit_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"'body\.2' has 1 unit"):
        fit(tmp_path, OneUnit(), LayerwiseEMLoss("body.2", weight=0.1, verbose=False))


# Sequences: no position may see a later one where the model does not let it.


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.layer(x)[0])


class CausalConv(nn.Conv1d):
    """Pads on the left only."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class PadModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(6, 6, 3))

    def forward(self, x):
        return self.conv(x)


class Trimmed(nn.Module):
    """Pads on both sides and removes the right end, as in temporal convolutional networks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=2)

    def forward(self, x):
        return self.conv(x)[:, :, :-2]


class Scan(nn.Module):
    """A layer behind a function in which positions depend on earlier ones, as in linear attention."""

    def __init__(self, scan):
        super().__init__()
        self.scan = scan
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.scan(x))


SEQUENCES = {
    "cumulative sum": (lambda: Scan(lambda x: x.cumsum(1)), "layer", 1),
    "running maximum": (lambda: Scan(lambda x: torch.cummax(x, dim=1).values), "layer", 1),
    "linear attention": (lambda: Scan(lambda x: (x @ x.mT).tril() @ x), "layer", 1),
    "decay": (lambda: Scan(lambda x: torch.ones(6, 6).tril().matmul(x)), "layer", 1),
    "lstm": (lambda: Recurrent(nn.LSTM(6, 6, batch_first=True)), "layer", 1),
    "gru, length first": (lambda: Recurrent(nn.GRU(6, 6)), "layer", 0),
    "behind an rnn": (lambda: Recurrent(nn.RNN(6, 6, batch_first=True)), "norm", 1),
    "left padding": (lambda: nn.Sequential(CausalConv(6, 6, 3)), "0", 2),
    "padding module": (PadModule, "conv.1", 2),
    "trimmed": (Trimmed, "conv", 2),
}


def leak(model, axis):
    """Return the largest change of all positions but the last when the last position of the input changes."""
    x = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other.select(axis, 5).add_(3.0)
    return (model(x) - model(other)).narrow(axis, 0, 5).abs().max().item()


def opened(model, where, **options):
    surgery = insert_em_operators(model, where, 2, verbose=False, **options)
    for parameter in surgery.parameters().values():
        nn.init.ones_(parameter)
    return model


@pytest.mark.parametrize("key", SEQUENCES)
def test_recurrent_and_convolutional_layers_stay_causal(key):
    make, where, axis = SEQUENCES[key]
    torch.manual_seed(0)
    assert leak(make(), axis) == 0.0
    assert leak(opened(make(), where, causal=True), axis) < 1e-6
    model = opened(make(), where)
    with pytest.warns(UserWarning, match=f"'{where}' fits one mixture to all positions .*causal=True") as caught:
        assert leak(model, axis) > 1e-3
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("model", "where", "shape"),
    [
        (Recurrent(nn.GRU(6, 3, batch_first=True, bidirectional=True)), "norm", (2, 5, 6)),
        (nn.Sequential(nn.Conv1d(6, 6, 3, padding=1)), "0", (2, 6, 5)),
        (nn.Sequential(nn.ZeroPad1d(1), nn.Conv1d(6, 6, 3)), "1", (2, 6, 5)),
        (nn.Sequential(nn.Conv2d(6, 6, 3, padding=1)), "0", (2, 6, 5, 5)),
        (Scan(lambda x: (x @ x.mT) @ x), "layer", (2, 5, 6)),
        (Scan(lambda x: torch.eye(5) @ x), "layer", (2, 5, 6)),
        (Scan(lambda x: x * x[:, 0].cumsum(-1).unsqueeze(1)), "layer", (2, 5, 6)),
    ],
)
def test_layers_that_see_both_sides_do_not_warn(model, where, shape):
    opened(model, where)(torch.randn(shape))


# Calls of functions.


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return F.relu(self.layer(x))


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x):
        return self.layer(x).clamp(min=0)


class Table(Clamped):
    acts = {"relu": F.relu}

    def forward(self, x):
        return self.acts["relu"](self.layer(x))


@pytest.mark.parametrize("encoder", [Clamped, Table])
def test_functional_swaps_say_what_they_found_and_what_not(encoder, capsys):
    swap_activations(nn.Sequential(encoder(), Head()), functional=True)
    assert "changes 1.em_functional, and finds nothing in 0" in " ".join(capsys.readouterr().out.split())
    swap_activations(nn.Sequential(Head(), Head()), functional=True)
    assert capsys.readouterr().out.split() == "functional=True changes 0.em_functional, 1.em_functional".split()
    swap_activations(nn.Sequential(encoder(), Head()), functional=True, verbose=False)
    assert not capsys.readouterr().out


class Functions(nn.Module):
    def forward(self, x):
        return F.softplus(x) + 2 * F.relu6(x) + 4 * F.mish(x) + 8 * F.selu(x) + 16 * F.hardswish(x)


def test_more_functions_are_swapped():
    x = torch.randn(3, 4)
    weights = {nn.Softplus: 1, nn.ReLU6: 2, nn.Mish: 4, nn.SELU: 8, nn.Hardswish: 16}
    for kind, weight in weights.items():
        model = nn.Sequential(Functions())
        expected = model(x) + weight * (x.tanh() - kind()(x))
        swap_activations(model, nn.Tanh, kind, functional=True, verbose=False)
        torch.testing.assert_close(model(x), expected)


def shifted_softplus(x):
    return F.softplus(x) - math.log(2.0)


class Stores(nn.Linear):
    """A dense layer that stores its activation, as atomistic networks do."""

    def __init__(self, activation):
        super().__init__(4, 4)
        self.activation = activation

    def forward(self, x):
        return self.activation(super().forward(x))


@pytest.mark.parametrize(
    "activation, shift",
    [
        (shifted_softplus, math.log(2.0)),
        (functools.partial(shifted_softplus), math.log(2.0)),
        (functools.partial(F.softplus, beta=2.0), 0.0),
        (functools.partial(F.leaky_relu, negative_slope=0.3), 0.0),
        (lambda x: torch.sigmoid(x), 0.0),
    ],
)
def test_functions_that_a_module_stores_are_swapped(activation, shift):
    model, x = nn.Sequential(Stores(activation)), torch.randn(3, 4)
    plain, scores = model(x), F.linear(x, model[0].weight, model[0].bias)
    kinds = [nn.Softplus, nn.LeakyReLU, nn.Sigmoid]
    surgery = swap_activations(model, nn.Tanh, kinds, functional=True, verbose=False)
    torch.testing.assert_close(model(x), scores.tanh() - shift)
    surgery.undo()
    assert torch.equal(model(x), plain)


def test_targets_without_a_function_form_are_named():
    with pytest.raises(NoMatchError, match="target=PReLU has no function form.*ReLU6"):
        swap_activations(nn.Sequential(Head()), target=nn.PReLU, functional=True)


# Selections.


@pytest.mark.parametrize("argument", ["target", "where"])
def test_instances_and_names_of_classes_are_no_selections(argument):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(TypeError, match=rf"{argument}=ReLU\(\) must be a class.*give the class, ReLU"):
        swap_activations(model, **{argument: nn.ReLU()})
    with pytest.raises(TypeError, match=rf"{argument}=\[.*ReLU|{argument}=ReLU"):
        swap_activations(model, **{argument: [nn.ReLU()]})
    with pytest.raises(NoMatchError, match=f"{argument}='ReLU'.*'ReLU' is the name of a class: give the class itself"):
        swap_activations(model, **{argument: "ReLU"})
    with pytest.raises(TypeError, match=f"{argument}=3 must be"):
        swap_activations(model, **{argument: 3})


class PlainContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.registered = nn.ReLU()
        self.experts = [nn.ReLU(), self.registered]
        self.heads = {"a": nn.ReLU(), "width": 3, "block": nn.Sequential(nn.ReLU())}


def test_modules_in_plain_containers_are_named():
    with pytest.warns(UserWarning) as caught:
        report = swap_activations(nn.Sequential(PlainContainers())).report
    assert [line.split()[0] for line in report.splitlines()[1:]] == ["0.registered"]
    assert len(caught) == 1
    paths = "0.experts[0], 0.heads['a'], 0.heads['block'].0 stay as they are"
    assert str(caught[0].message).startswith(paths) and "nn.ModuleList" in str(caught[0].message)
    assert [site.path for site in find_modules(PlainContainers(), nn.ReLU, inserted=True)] == ["registered"]


# Target networks.


class Teacher(lightning.LightningModule):
    """A student that is pulled towards a teacher, whose weights follow it by a vector of all parameters."""

    def __init__(self, trained=False, fresh=False, frozen=False):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.teacher = copy.deepcopy(self.student).requires_grad_(not frozen)
        self.frozen = frozen
        if fresh:
            nn.init.ones_(self.teacher[0].weight)
        self.trained = trained

    def training_step(self, batch):
        target = self.teacher(batch[0])
        return (self.student(batch[0]) - (target if self.trained else target.detach()) - 1).square().mean()

    def configure_optimizers(self):
        everything = self.trained or self.frozen  # frozen parameters are often given to the optimizer, too
        return torch.optim.SGD((self if everything else self.student).parameters(), 0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda where: SwapActivations(where=where, target=nn.ReLU, verbose=False),
        lambda where: InsertEMOperator(where, 2, verbose=False),
    ],
)
def test_target_networks_without_the_change_are_named(make, tmp_path):
    with pytest.warns(UserWarning, match=r"changed 'student.1', but not 'teacher.1' of an untrained copy: add it"):
        fit(tmp_path, Teacher(), make("student.1"))
    fit(tmp_path, Teacher(), make(["student.1", "teacher.1"]))
    with pytest.warns(UserWarning, match=r"not 'teacher.1' of an untrained copy.*teachers do"):
        fit(tmp_path, Teacher(frozen=True), make("student.1"))
    fit(tmp_path, Teacher(frozen=True), make(["student.1", "teacher.1"]))
    fit(tmp_path, Teacher(trained=True), make("student.1"))  # two towers
    fit(tmp_path, Teacher(fresh=True), make("student.1"))  # another network of the same shape


@pytest.mark.parametrize("change", [swap_activations, functools.partial(insert_em_operators, num_components=2)])
def test_frozen_copies_without_the_change_are_named_by_the_functions_too(change):
    with pytest.warns(UserWarning, match=r"changed 'student.1', but not 'teacher.1' of an untrained copy"):
        change(Teacher(frozen=True), where="student.1").undo()
    change(Teacher(frozen=True), where=["student.1", "teacher.1"])
    change(Teacher(), where="student.1")  # an optimizer may train both
    change(Teacher(fresh=True, frozen=True), where="student.1")  # another network of the same shape


def test_layers_that_are_not_initialized_yet_are_changed(tmp_path):
    class Lazy(OneUnit):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(8), nn.ReLU())

        def setup(self, stage):
            self.body(torch.randn(2, 6))

    model = nn.Sequential(nn.Sequential(nn.LazyLinear(8)), nn.Sequential(nn.LazyLinear(8)))
    insert_em_operators(model, "0.0", 2, verbose=False)
    assert model(torch.randn(3, 6)).shape == (3, 8)
    fit(tmp_path, Lazy(), LayerwiseEMLoss("body.0", weight=0.1, verbose=False))


# Several callbacks, and audits.


def test_equal_layer_losses_add_up_and_resume(tmp_path):
    def callbacks():
        return [LayerwiseEMLoss("body.0", weight=weight, verbose=False) for weight in (0.1, 0.2)]

    def run(more, epochs, path=None):
        torch.manual_seed(0)
        model = OneUnit()
        trainer = users.trainer(tmp_path, epochs, more)
        trainer.fit(model, users.MLP.data(), ckpt_path=path)
        return model, trainer

    twice, trainer = run(callbacks(), 1)
    once, _ = run([LayerwiseEMLoss("body.0", weight=0.1 + 0.2, verbose=False)], 1)
    torch.testing.assert_close(twice.state_dict(), once.state_dict())
    assert {"em/body.0/weight", "em/body.0/weight_2"} <= set(trainer.callback_metrics)
    path = tmp_path / "twice.ckpt"
    trainer.save_checkpoint(path)
    resumed = callbacks()
    run(resumed, 2, path)
    steps = 2 * len(users.MLP.data())
    assert [callback._state["step"] for callback in resumed] == [steps, steps]
    with pytest.warns(UserWarning, match=r"add the following callbacks.*LayerwiseEMLoss\(where='body.0'"):
        run([LayerwiseEMLoss("body.1", weight=0.1, verbose=False)], 2, path)
    with pytest.warns(UserWarning, match=r"no state of LayerwiseEMLoss\(where='body.0'.*_3, which starts anew"):
        run([*callbacks(), *callbacks()[:1]], 2, path)


def test_two_schedules_of_the_same_temperatures_are_refused(tmp_path):
    schedules = [TemperatureSchedule(start, 1.0, 3) for start in (2.0, 3.0)]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `TemperatureSchedule`"):
        fit(tmp_path, OneUnit(), SwapActivations(verbose=False), *schedules)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LayerwiseEMLoss("body.0", detach=True, verbose=False),
        lambda: LayerwiseEMLoss(lambda path, module: path == "body.0", weight=0.1, verbose=False),
        lambda: TemperatureSchedule(4.0, 1.0, 5),
        lambda: TemperatureSchedule(4.0, 1.0, 5, where=lambda path, module: path == "body.1"),
        lambda: StepSeeds(3),
    ],
)
def test_a_resume_without_a_callback_that_changes_training_is_named(make, tmp_path):
    def run(callbacks, path=None):
        trainer = users.trainer(tmp_path, 1 if path is None else 2, [SwapActivations(verbose=False), *callbacks])
        trainer.fit(OneUnit(), users.MLP.data(), ckpt_path=path)
        return trainer

    callback, path = make(), tmp_path / "last.ckpt"
    run([callback]).save_checkpoint(path)
    with pytest.warns(UserWarning, match=f"need to be provided.*{type(callback).__name__}"):
        run([], path)
    run([make()], path)  # without a warning


def test_a_class_not_an_instance_is_restored(tmp_path):
    path = tmp_path / "swapped.ckpt"
    fit(tmp_path, OneUnit(), SwapActivations(verbose=False)).save_checkpoint(path)
    for wrong, name in ((OneUnit(), "OneUnit"), (nn.Linear, "Linear"), (path, "Path")):
        got = f"{'' if wrong is nn.Linear else 'an instance of '}.*{name}"
        with pytest.raises(TypeError, match=f"cls must be the class of a LightningModule, got {got}"):
            restore_surgery(wrong, path)


def test_a_fit_from_a_restored_surgery_says_that_it_has_new_weights(tmp_path):
    path = tmp_path / "swapped.ckpt"
    fit(tmp_path, OneUnit(), SwapActivations(verbose=False)).save_checkpoint(path)
    with pytest.warns(UserWarning, match="without its weights.*ckpt_path="):
        fit(tmp_path, OneUnit(), RestoreSurgery(path))
    trainer = users.trainer(tmp_path, 2, [RestoreSurgery(path)])
    trainer.fit(OneUnit(), users.MLP.data(), ckpt_path=path)


def test_an_audit_neither_prints_nor_is_measured(tmp_path, capsys):
    class Counting(PosteriorMonitor):
        calls = 0

        def _measure(self, path, tensor):
            self.calls += 1
            super()._measure(path, tensor)

    monitor = Counting("body.0", every_n_steps=1)
    callbacks = [SwapActivations("signed"), LayerwiseEMLoss("body.0", weight=0.1), monitor, EMAudit(printed=False)]
    fit(tmp_path, OneUnit(), *callbacks)
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("body.1: SignedActivation") for line in printed) == 1
    assert sum(line.startswith("body.0: output") for line in printed) == 2  # the loss and the monitor
    assert monitor.calls == len(users.MLP.data())
    model = OneUnit()
    taps = Taps(model, "body.0", verbose=False)
    audit(model, [torch.randn(4, 6)])
    assert not taps.take()
    model.body(torch.randn(4, 6))
    assert list(taps.take()) == ["body.0"]


class NeedsTrainer(OneUnit):
    def training_step(self, batch):
        return super().training_step(batch) * self.trainer.max_epochs


def test_an_audit_that_needs_a_trainer_says_how():
    model = NeedsTrainer()
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`.*EMAudit.*run="):
        audit(model, [torch.randn(4, 6)])
    assert len(audit(model, None, run=lambda: model.body(torch.randn(4, 6)))) == 3


def test_an_audit_in_a_fit_has_the_trainer(tmp_path):
    watcher = EMAudit(printed=False)
    fit(tmp_path, NeedsTrainer(), watcher)
    assert watcher.audit


# Networks that are hyperparameters, and networks that are changed before the LightningModule is built.


class Task(lightning.LightningModule):
    """Saves its network as a hyperparameter, so that checkpoints pickle it with its hooks."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.save_hyperparameters()

    def training_step(self, batch):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def act_and_layers():
    return nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), Stores(F.relu))


HYPERPARAMETERS = pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")


@HYPERPARAMETERS
@pytest.mark.parametrize(
    "make",
    [
        lambda: LayerwiseEMLoss(["net.0", "net.1.0"], weight=0.1),
        lambda: LayerwiseEMLoss("net.1", tap="input", weight=0.1),
        lambda: PosteriorMonitor("net.0", every_n_steps=1, verbose=False),
        lambda: LayerwiseEMLoss("net.act", weight=0.1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*needs? a TensorBoardLogger", "ignore:.*its tap joins all places")
def test_a_tapped_network_can_be_a_hyperparameter(make, tmp_path):
    callback = make()
    net = Reused() if callback.where == "net.act" else act_and_layers()

    class Saver(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "tapped.ckpt")

    trainer = fit(tmp_path, Task(net), callback, Saver())
    loaded = Task.load_from_checkpoint(tmp_path / "tapped.ckpt", weights_only=False)
    x = users.normal(3, 6)
    assert torch.equal(loaded.net(x), trainer.lightning_module.net(x))


def test_a_copy_of_a_tapped_network_is_not_tapped():
    net = act_and_layers()
    taps = Taps(net, ["0", "1"], verbose=False)
    teacher = copy.deepcopy(net)
    teacher(torch.randn(2, 6))
    assert not taps.captured
    net(torch.randn(2, 6))
    assert set(taps.take()) == {"0", "1"}


@HYPERPARAMETERS
@pytest.mark.parametrize(
    "swaps, where",
    [
        ({"where": "net.1.0"}, "net.1"),  # the swapped activation lies inside the layer with the operator
        ({"where": "net.2", "functional": True}, "net.2"),
        ({"where": "net.1.0"}, "net.1.0"),
        ({"where": ["net.1.0", "net.2*"]}, ["net.1", "net.2"]),
    ],
)
def test_a_changed_network_that_is_a_hyperparameter_is_restored(swaps, where, tmp_path):
    callbacks = [SwapActivations(**swaps, verbose=False), InsertEMOperator(where, 2, verbose=False, set_dim=0)]
    trained = fit(tmp_path, Task(act_and_layers()), *callbacks)
    trained.save_checkpoint(tmp_path / "changed.ckpt")
    restored = restore_surgery(Task, tmp_path / "changed.ckpt", weights_only=False)
    x = users.normal(5, 6)
    assert torch.equal(restored.net(x), trained.lightning_module.net(x))
    assert recorded_plan(restored) == recorded_plan(trained.lightning_module)


class Wrapped(Task):
    def __init__(self, net):
        lightning.LightningModule.__init__(self)
        self.net = net


@pytest.mark.parametrize(
    "change",
    [
        lambda net: swap_activations(net, "signed", verbose=False),
        lambda net: insert_em_operators(net, "0", 2, set_dim=0, verbose=False),
        lambda net: swap_activations(net[1], "gated", verbose=False),
    ],
)
def test_a_checkpoint_of_a_network_that_was_changed_before_says_so(change, tmp_path):
    net = act_and_layers()
    change(net)
    path = tmp_path / "part.ckpt"
    fit(tmp_path, Wrapped(net)).save_checkpoint(path)
    message = "weights of a changed model, but no plan.*repeat the surgery on a new model"
    with pytest.raises(ValueError, match=message):
        restore_surgery(Wrapped, path, net=act_and_layers())
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Wrapped(act_and_layers()), RestoreSurgery(path))
    again = act_and_layers()
    change(again)
    Wrapped(again).load_state_dict(torch.load(path)["state_dict"])


@pytest.mark.parametrize("index", [-1, 2, 5])
def test_a_wrong_number_of_an_optimizer_is_named(index):
    net = act_and_layers()
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (net[0], net[2])]
    with pytest.raises(ValueError, match=f"optimizer={index} must be one of the numbers 0 to 1"):
        owners_of(find_modules(net, "0"), optimizers, index)


class Router(users.MLP):
    """Sends all rows to the first expert."""

    def build(self):
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x):
        return self.experts[0](x) + self.experts[1](x[:0]).sum()


@pytest.mark.filterwarnings("ignore:.*needs? a TensorBoardLogger")
def test_a_monitor_does_not_measure_an_expert_without_rows(tmp_path, recwarn):
    monitor = PosteriorMonitor("experts.*", every_n_steps=1, verbose=False)
    measured = {key.split("/")[1] for key in fit(tmp_path, Router(), monitor).callback_metrics if key[:3] == "em/"}
    assert measured == {"experts.0"} and not [one for one in recwarn if "skips" in str(one.message)]


def test_modules_that_fabric_has_set_up_are_changed_and_restored():
    """A Fabric module passes the attributes that are set on it to the module inside."""
    from lightning.fabric import Fabric

    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    x, keys, attributes = torch.randn(5, 3, 6), list(net.state_dict()), set(vars(net))
    expected = net(x)
    wrapped = Fabric(accelerator="cpu", devices=1).setup_module(net)
    own = set(vars(wrapped))
    inserted = insert_em_operators(wrapped, "_forward_module.0", 2, verbose=False)
    swapped = swap_activations(wrapped, "signed", verbose=False)
    losses = LayerwiseLoss(wrapped, "*.2", weight=0.1, verbose=False)
    losses.add_to(wrapped(x).square().mean()).backward()
    assert losses.values
    losses.remove()
    swapped.undo()
    inserted.undo()
    assert torch.equal(wrapped(x), expected)
    assert (list(net.state_dict()), set(vars(net)), set(vars(wrapped))) == (keys, attributes, own)
