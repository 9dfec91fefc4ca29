"""Surgery: selection, replacement, insertion, undo, checkpoints."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
import user_models as users
from torch import nn

from em_lightning.activations import ACTIVATIONS
from em_lightning.surgery import (
    LayerwiseLoss,
    NoMatchError,
    Surgery,
    Taps,
    apply_plan,
    find_modules,
    insert_after,
    insert_em_operators,
    recorded_plan,
    replace_modules,
    restore_surgery,
    surgery_by,
    swap_activations,
    wrap,
)
from em_lightning.surgery.select import MARKER

pytestmark = pytest.mark.filterwarnings("ignore:.*enable_nested_tensor", "ignore:`torch.jit")


class Scaled(nn.Module):
    """Activation with one random parameter."""

    def __init__(self, start=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(1) * start)

    def forward(self, x):
        return x.relu() * self.scale


def paths(*arguments):
    return [site.path for site in find_modules(*arguments)]


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))


def test_selection_by_class_name_predicate_and_list():
    model = net()
    assert paths(model, nn.ReLU) == ["1", "2.1"]
    assert paths(model, "2.*") == ["2.0", "2.1"]
    assert paths(model, "*") == ["0", "1", "2"]  # the outermost
    assert paths(model, ["2", "2.0"]) == ["2", "2.0"]  # each entry by itself
    assert paths(model, lambda path, module: path.endswith("1")) == ["1", "2.1"]
    assert paths(model, lambda module: isinstance(module, nn.Linear)) == ["0", "2.0"]
    assert paths(model, (nn.Linear, "1")) == ["0", "1", "2.0"]
    assert paths(model, nn.ReLU, "2.*") == ["2.1"]
    with pytest.raises(TypeError, match="where=3 must"):
        find_modules(model, 3)


def test_second_selection_accepts_a_list():
    assert paths(net(), nn.Linear, ["0", "2.*"]) == ["0", "2.0"]
    assert paths(net(), nn.Linear, ["1", lambda path, module: module.in_features == 8]) == ["2.0"]


def test_no_match_error_lists_the_modules():
    with pytest.raises(NoMatchError, match=r"where=GELU.*Linear: 0, 2.0; ReLU: 1, 2.1; Sequential: 2"):
        replace_modules(net(), nn.GELU, nn.Tanh)


def test_shared_instance_is_replaced_once_per_name():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    replace_modules(model, nn.ReLU, Scaled)
    assert model[1] is not model[3] and model[1].scale != model[3].scale
    model = nn.Sequential(act, nn.Sequential(act))
    replace_modules(model, nn.ReLU, Scaled).undo()
    assert model[0] is act and model[1][0] is act


def shared_net():
    act = nn.ReLU()
    return nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)


def test_modules_made_from_one_instance_have_hooks_of_their_own():
    model, x, seen = shared_net(), torch.randn(3, 4), []
    early = model[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    surgery = swap_activations(model, "signed")
    model(x)
    assert len(seen) == 2  # the old hook fires for both, as before
    early.remove()
    model[1].register_forward_hook(lambda module, *_: seen.append(module), always_call=True)
    model[3].register_forward_pre_hook(lambda module, inputs, kwargs: seen.append(module), with_kwargs=True)
    model(x)
    assert seen[2:] == [model[1], model[3]]
    surgery.undo()
    model(x)
    assert len(seen) == 4 and model[1] is model[3]


@pytest.mark.parametrize("where", ["1", "3"])
def test_a_hook_on_a_swapped_module_does_not_fire_for_the_instance_at_its_other_place(where):
    model, seen = shared_net(), []
    swap_activations(model, "signed", where=where)
    model[int(where)].register_forward_hook(lambda module, *_: seen.append(module))
    model(torch.randn(3, 4))
    assert seen == [model[int(where)]]


def test_calls_are_counted_per_name_of_a_shared_instance():
    model = shared_net()
    swap_activations(model, "signed", learnable=True)
    model(torch.randn(3, 4)).sum().backward()
    assert model[1].log_temperature_ratio.grad is not None
    assert model[3].log_temperature_ratio.grad is not None


def test_layer_losses_of_a_swapped_shared_activation_are_those_of_each_layer():
    model, x = shared_net(), torch.randn(5, 4)
    swap_activations(model, "signed")
    for path in ("1", "3"):
        losses = LayerwiseLoss(model, path, "variance", weight=1.0)
        losses.add_to(model(x).sum())
        losses.remove()
        first = copy.deepcopy(model[: int(path) + 1])
        alone = LayerwiseLoss(first, path, "variance", weight=1.0)
        alone.add_to(first(x).sum())
        torch.testing.assert_close(losses.values[f"{path}/variance"], alone.values[f"{path}/variance"])


def test_axes_of_a_shared_activation_are_those_of_each_place():
    act = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), act, nn.Flatten(), nn.Linear(8, 3), act)
    surgery = swap_activations(model, "softmax_gated")
    assert [change.new.dim for change in surgery.changes] == [1, -1]


@pytest.mark.parametrize(
    ("loss", "name"), [("free_energy", "free_energy"), ({"name": "decorrelation"}, "decorrelation"), (torch.sum, "em")]
)
def test_a_loss_of_one_term_is_logged_by_its_name(loss, name):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    losses = LayerwiseLoss(model, "0", loss, 0.1, verbose=False)
    losses.add_to(model(torch.randn(5, 4)).square().mean())
    assert set(losses.values) == {f"0/{name}", "0/weight"}


def test_automatic_weights_before_a_detached_layer_name_the_cause():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    losses, _ = LayerwiseLoss(model, "0", verbose=False), LayerwiseLoss(model, "1", detach=True, verbose=False)
    with pytest.raises(RuntimeError, match="weight='auto'.*'0'.*detach=True"):
        losses.add_to(model(torch.randn(5, 4)).square().mean())


def test_a_plan_with_two_operations_on_one_site_is_applied_in_order():
    model, x = net(), torch.randn(3, 4)
    replace_modules(model, "1", nn.Tanh)
    insert_after(model, "1", nn.Sigmoid)
    fresh = net()
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "em_surgery" not in key})
    surgery = apply_plan(fresh, recorded_plan(model), into=Surgery(fresh))
    assert torch.equal(fresh(x), model(x)) and recorded_plan(fresh) == recorded_plan(model)
    apply_plan(fresh, recorded_plan(model))  # already applied
    assert len(surgery.changes) == len(recorded_plan(fresh)) == 2


@pytest.mark.parametrize("on_root", [False, True])
def test_module_called_twice_requires_calls(on_root):
    model = users.ReusedMLP() if on_root else nn.Sequential(users.ReusedMLP())
    name, x = ("relu" if on_root else "0.relu"), torch.randn(3, 6)
    with replace_modules(model, nn.ReLU, Scaled):
        with pytest.raises(RuntimeError, match=f"'{name}' .*called more than 1 time.* calls='any'"):
            model(x)
    with replace_modules(model, nn.ReLU, Scaled, calls="any"):
        inner = model if on_root else model[0]
        hidden = inner.relu(inner.first(x))
        assert torch.equal(model(x), inner.head(inner.relu(inner.second(hidden))))
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    with replace_modules(model, nn.ReLU, Scaled, calls=2):
        model(x)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    replace_modules(model, nn.ReLU, nn.Tanh)  # no parameters, so the number of calls is not checked
    model(x)


def test_calls_in_a_list_are_counted_by_the_module_that_calls():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.acts = nn.ModuleList([nn.ReLU()])

        def forward(self, x):
            return self.acts[0](self.acts[0](x))

    model = nn.Sequential(Stack())
    replace_modules(model, nn.ReLU, Scaled)
    with pytest.raises(RuntimeError, match="'0.acts.0' .*called more than 1 time"):
        model(torch.randn(2))


def test_hooks_device_dtype_and_mode_are_kept():
    model = net().double().eval()
    model[2][1].train()
    seen = []
    early = model[1].register_forward_hook(lambda *_: seen.append("early"))
    surgery = replace_modules(model, nn.ReLU, Scaled)
    assert model[1].scale.dtype == torch.float64 and not model[1].training and model[2][1].training
    model(torch.randn(2, 4).double())
    early.remove()
    model[1].register_forward_hook(lambda *_: seen.append("late"))
    model(torch.randn(2, 4).double())
    surgery.undo()
    model(torch.randn(2, 4).double())
    assert seen == ["early", "late"]  # the late hook was on the new module
    with torch.device("meta"):
        empty = net()
    replace_modules(empty, nn.ReLU, Scaled)
    assert empty[1].scale.is_meta


def test_random_stream_is_untouched_and_every_rank_builds_the_same():
    built = []
    for seed in (1, 2):
        model = net()
        torch.manual_seed(seed)
        replace_modules(model, nn.ReLU, Scaled)
        built.append(model[1].scale.item())
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(after, torch.rand(1))
    assert built[0] == built[1]


def test_make_may_be_a_class_a_partial_a_prototype_or_a_function():
    model = net()
    replace_modules(model, "1", functools.partial(Scaled, start=0.0))
    assert model[1].scale == 0
    prototype = Scaled()
    replace_modules(model, "2.1", prototype)
    assert model[2][1] is not prototype and torch.equal(model[2][1].scale, prototype.scale)
    replace_modules(model, nn.Linear, lambda old: nn.Linear(old.in_features, old.out_features, bias=False))
    assert model[0].bias is None
    with pytest.raises(TypeError, match="make returned 3 for '0'"):
        replace_modules(model, "0", lambda old: 3)
    with pytest.raises(TypeError, match="make returned .* '0'"):
        replace_modules(model, "0", lambda old: old)


def test_report_names_what_changed():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    surgery = insert_after(model, "0", nn.LayerNorm(8))
    assert surgery.report.splitlines()[1].split() == ["0", "Linear", "Linear", "->", "LayerNorm", "16"]
    assert list(surgery.parameters()) == ["0.operator.weight", "0.operator.bias"] and len(surgery.changes) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_surgeries_are_undone_in_any_order(order):
    model, x = net(), torch.randn(3, 4)
    before, modules = model(x), [id(m) for m in model.modules()]
    surgeries = [
        replace_modules(model, nn.ReLU, Scaled),
        insert_after(model, ["1", "2"], Scaled),
        replace_modules(model, [Scaled, "1.layer"], nn.Tanh),
    ]
    for number in order:
        surgeries[number].undo()
        model(x)
    assert [id(m) for m in model.modules()] == modules
    assert torch.equal(model(x), before) and recorded_plan(model) == []


def test_wrappers_of_one_method_are_removed_in_any_order():
    class Greeter:
        def greet(self, name):
            return name

    for order in ((0, 1), (1, 0)):
        greeter = Greeter()
        handles = [wrap(greeter, "greet", lambda proceed, name, mark=m: proceed(name) + mark) for m in "ab"]
        assert greeter.greet("x") == "xab"
        for number in order:
            handles[number]()
        assert greeter.greet("x") == "x" and "greet" not in vars(greeter)
    other = Greeter()
    other.greet = lambda name: name.upper()  # patched by other code
    wrap(other, "greet", lambda proceed, name: proceed(name) + "!")()
    assert other.greet("x") == "X"


def test_operated_model_can_be_copied_and_pickled():
    model = users.MLP()
    replace_modules(model, nn.ReLU, Scaled)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.encoder[1] is not model.encoder[1]
        checkpoint = {}
        twin.on_save_checkpoint(checkpoint)
        assert [entry["path"] for entry in checkpoint["em_lightning"]["surgery"]] == ["encoder.1", "encoder.3"]
        assert twin.on_save_checkpoint.owner is twin
        twin(torch.randn(2, 6))


def test_a_copied_model_gets_a_surgery_of_its_own():
    model = net()
    before = set(vars(model))
    surgery = Surgery(model, by="SwapActivations(where=*)")
    other = Surgery(model, by="InsertEMOperator(where=0)")
    assert surgery_by(model, surgery.by) is surgery and surgery_by(model, other.by) is other
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = surgery_by(twin, surgery.by)
        assert own.model is twin and not own.changes and surgery_by(twin, surgery.by) is own
    surgery.undo()
    assert surgery_by(model, other.by) is other
    other.undo()
    assert set(vars(model)) == before


def test_a_swap_without_parameters_does_not_load_into_a_plain_model():
    model = net()
    plain = copy.deepcopy(model)
    replace_modules(model, nn.ReLU, nn.Tanh)
    with pytest.raises(RuntimeError, match="Unexpected key.*1.em_surgery"):
        plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("activation", ["relu", nn.ReLU()], ids=["function", "module"])
def test_transformer_in_eval_takes_the_swapped_activation(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2))
    x, padding = torch.randn(3, 5, 8), torch.arange(5) > torch.tensor([[4], [2], [3]])
    encoder = model[0]
    before = encoder.eval()(x, src_key_padding_mask=padding)
    assert encoder.use_nested_tensor
    first, second = swap_activations(model, where="*0.activation"), swap_activations(model, where="*1.activation")
    with torch.no_grad():
        fast, fast_padded = encoder.eval()(x), encoder(x, src_key_padding_mask=padding)
        slow, slow_padded = encoder.train()(x), encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_padded, slow_padded)
    assert not torch.allclose(before[~padding], slow_padded[~padding], atol=1e-2)
    first.undo()
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), encoder.train()(x))
    compiled = torch.compile(encoder.eval(), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), encoder(x))
    second.undo()
    assert encoder.use_nested_tensor and encoder.layers[0].activation_relu_or_gelu == 1
    assert (
        encoder.layers[0].activation is activation
        or encoder.layers[0].activation is F.relu
        or isinstance(encoder.layers[0].activation, nn.ReLU)
    )
    assert torch.equal(encoder.eval()(x, src_key_padding_mask=padding), before)


def test_submodules_of_attention_and_script_modules_raise():
    with pytest.raises(ValueError, match="'0.out_proj' .*nn.MultiheadAttention"):
        replace_modules(nn.Sequential(nn.MultiheadAttention(4, 2)), nn.Linear, nn.Identity)
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    with pytest.raises(ValueError, match="'0.1' .*ScriptModule"):
        replace_modules(model, nn.ReLU, nn.Tanh)


def test_operator_behind_an_attention_takes_the_first_of_its_outputs():
    model = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(2, 3, 4)
    before = model[0](x, x, x)
    insert_after(model, "0", nn.Tanh)
    after = model[0](x, x, x)
    assert torch.equal(after[0], before[0].tanh()) and torch.equal(after[1], before[1])
    assert model[0].batch_first and model[0].embed_dim == 4  # what code reads off the layer
    model = nn.Sequential(nn.LSTMCell(2, 2), nn.Flatten())
    insert_after(model, "0", nn.Tanh)
    model[0].layer.forward = lambda x: {"x": x}
    with pytest.raises(TypeError, match="LSTMCell is dict"):
        model[0](x)


def test_compiled_modules_keep_their_paths():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager"))
    assert paths(model, nn.ReLU) == ["0.1"] and paths(torch.compile(net()), nn.ReLU) == ["1", "2.1"]
    x = torch.randn(3, 2)
    model(x)
    surgery = replace_modules(model, nn.ReLU, nn.Tanh)
    assert torch.equal(model(x), model[0]._orig_mod[0](x).tanh())
    surgery.undo()
    assert torch.equal(model(x), model[0]._orig_mod[0](x).relu())


@pytest.mark.parametrize("calls", [None, "any"])
def test_operated_models_compile_whole(calls):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            x = self.relu(self.lin(x))
            return self.relu(self.lin(x)) if calls else x

    model = nn.Sequential(Block(), nn.Linear(4, 2))
    replace_modules(model, nn.ReLU, Scaled, calls=calls)
    insert_after(model, "1", Scaled)
    x = torch.randn(3, 4)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.filterwarnings("ignore:.*points of accuracy")
def test_dim_and_num_features_are_inferred():
    model = users.ResNet()
    surgery = swap_activations(model, "softmax_gated", calls="any")
    model(torch.randn(2, 3, 32, 32))
    assert {change.added.dim for change in surgery.changes} == {1}
    assert swap_activations(net(), "softmax_gated").changes[0].added.dim == -1
    inserted = insert_em_operators(
        users.ResNet(), ["layer2", "layer3.0.relu", "fc", "bn1"], 2, residual=False, calls="any"
    )
    inserted.model(torch.randn(2, 3, 32, 32))
    found = {change.path: change.added for change in inserted.changes}
    assert {path: (op.operator.num_features, op.dim) for path, op in found.items()} == {
        "layer2": (8, 1),
        "layer3.0.relu": (16, 1),
        "fc": (3, -1),
        "bn1": (4, 1),
    }
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert insert_em_operators(encoder, "0", 2).changes[0].added.operator.num_features == 8


def test_inserted_operator_is_the_identity_at_initialization():
    model, x = users.ResNet().eval(), torch.randn(2, 3, 32, 32)
    before = model(x)
    with insert_em_operators(model, ["layer1", "layer3"], 4):
        after = model(x)
        assert torch.equal(after, before)
        after.sum().backward()
        assert all(op.operator.gate.grad != 0 for op in (model.layer1, model.layer3))


def test_inserted_operator_keeps_the_dtype_of_mixed_precision():
    model, x = net().eval(), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = model[0](x)
        with insert_em_operators(model, ["0"], 2, set_dim=0):
            after = model[0](x)
    assert before.dtype == torch.bfloat16 and torch.equal(after, before) and after.dtype == before.dtype


def test_activation_arguments():
    model = net()
    swap_activations(model, {"name": "signed", "margin": 2.0}, where="1")
    swap_activations(model, "signed", where="2.1", margin=3.0)
    assert (model[1].margin, model[2][1].margin) == (2.0, 3.0)
    swap_activations(model, nn.GELU, target=type(model[1]), where="1")
    swap_activations(model, {"class_path": "torch.nn.SiLU"}, target=nn.GELU)
    assert isinstance(model[1], nn.SiLU)
    with pytest.raises(TypeError, match="activation=Tanh .*dim="):
        swap_activations(net(), nn.Tanh(), dim=1)
    with pytest.raises(ValueError, match="'singed'.*'signed'"):
        swap_activations(net(), "singed")
    with pytest.raises(TypeError, match="activation=3 must"):
        swap_activations(net(), 3)


class Functional(nn.Module):
    """Calls relu in every way there is."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        x = F.relu(self.inner(x) + 1)
        x = torch.relu(x - 0.5).sub(0.25).relu()
        x = F.relu(x - 0.1, inplace=True)
        x = x - 0.05
        x.relu_()
        return x


def test_calls_of_relu_are_swapped_where_that_is_asked_for():
    model, x = nn.Sequential(Functional(), nn.Linear(4, 2)), torch.randn(3, 4)
    before, keys = model(x), set(model.state_dict())
    with pytest.raises(NoMatchError, match="where='\\*' .*target=ReLU.*Functional: 0"):
        swap_activations(model, nn.Tanh)
    surgery = swap_activations(model, nn.Tanh, functional=True)
    y = (model[0].inner(x) + 1).tanh()
    y = ((((y - 0.5).tanh() - 0.25).tanh() - 0.1).tanh() - 0.05).tanh()
    expected = model[1](y)
    assert torch.equal(model(x), expected)
    assert set(model.state_dict()) - keys == {f"0.em_functional.{MARKER}"}
    model(x).sum().backward()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    surgery.undo()
    assert torch.equal(model(x), before) and set(model.state_dict()) == keys and "forward" not in vars(model[0])
    with replace_modules(model, "1", nn.Identity), pytest.raises(NoMatchError, match="where='1' .*relu"):
        swap_activations(model, nn.Tanh, where="1", functional=True)
    with (
        swap_activations(model, Scaled, functional=True),
        pytest.raises(RuntimeError, match="'0.em_functional' is called"),
    ):
        model(x)
    with swap_activations(model, Scaled, functional=True, calls="any") as surgery:
        assert "0.em_functional" in surgery.report
        model(x)


def test_calls_of_relu_in_the_root_and_in_a_checkpoint(tmp_path):
    class Net(users.MLP):
        def forward(self, x):
            return self.head(F.relu(self.encoder(x)))

    model, x = Net(), torch.randn(3, 6)
    swap_activations(model, "softmax_gated", functional=True)
    checkpoint = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    restored = restore_surgery(Net, tmp_path / "model.ckpt")
    assert torch.equal(restored(x), model(x)) and len(recorded_plan(restored)) == 3


class FunctionalConv(nn.Module):
    """Channels are axis 1 after a convolution or a sum, and the last axis after a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x)))
        h = torch.relu(h + self.conv(x))
        return F.relu(self.linear(h.mean((2, 3))))


def test_functional_relu_competes_over_channels():
    torch.manual_seed(0)
    net, x = FunctionalConv().eval(), torch.randn(2, 3, 6, 7)
    h = net.norm(net.conv(x))
    h = h * h.softmax(1)
    h = h + net.conv(x)
    h = h * h.softmax(1)
    h = net.linear(h.mean((2, 3)))
    swap_activations(net, "softmax_gated", functional=True)
    torch.testing.assert_close(net(x), h * h.softmax(-1))


def test_error_suggests_functional_if_forward_calls_relu():
    with pytest.raises(NoMatchError, match="relu .*functional=True"):
        swap_activations(FunctionalConv(), "signed")


@pytest.mark.parametrize("name", ["softmax_gated", "neg_log_softmin", "relu_gated", "log_softmax", "direction"])
def test_dim_out_of_range_raises(name):
    with pytest.raises(ValueError, match=r"dim=7.*\(3, 5\)"):
        ACTIVATIONS.build(name, dim=7)(torch.randn(3, 5))


def test_misspelt_arguments_are_named():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    with pytest.raises(TypeError, match="SignedActivation.*'margn'"):
        swap_activations(net, "signed", margn=2.0)
    with pytest.raises(TypeError, match="'num_iter'"):
        insert_em_operators(net, "0", num_iter=3)
    with pytest.raises(NoMatchError, match=r"target='ReLU' .*name pattern"):
        swap_activations(net, "signed", "ReLU")
    with pytest.raises(NoMatchError, match=r"target='nn.ReLU' .*name pattern"):
        swap_activations(net, "signed", "nn.ReLU")


def test_activation_instance_is_copied_to_every_site():
    built = ACTIVATIONS.build("signed", margin=0.5)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    x = torch.randn(3, 4)
    expected = built(model[2](built(model[0](x))))
    surgery = swap_activations(model, built)
    torch.testing.assert_close(model(x), expected)
    assert model[1] is not model[3] and type(model[1]) is type(built)
    surgery.undo()
    assert type(model[1]) is nn.ReLU
    for arguments in ({"dim": 1}, {"margin": 2.0}):
        with pytest.raises(TypeError, match="activation=SignedActivation .*dim="):
            swap_activations(model, built, **arguments)


class Reused(nn.Module):
    """Calls one activation behind each of its layers."""

    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.act = nn.ReLU()

    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return x


@pytest.mark.parametrize("key", ["signed", "grouped"])
def test_calls_give_each_call_a_module_of_its_own(key):
    torch.manual_seed(0)
    x, model, plain = torch.randn(5, 4), Reused(), Reused()
    plain.load_state_dict(model.state_dict())
    options = {"learnable": True} if key == "signed" else {"group_size": 2}
    surgery = swap_activations(model, key, calls=2, verbose=False, **options)
    first, second = model.act
    if key == "signed":
        with torch.no_grad():
            next(second.parameters()).mul_(3.0)
    expected = second(model.layers[1](first(model.layers[0](x))))
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

    again = apply_plan(Reused(), recorded_plan(model))
    again.model.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.model(x), expected)
    surgery.undo()
    torch.testing.assert_close(model(x), plain(x))


def test_wrong_numbers_of_calls_are_named():
    x = torch.randn(5, 4)
    with swap_activations(model := Reused(3), "signed", learnable=True, calls=2, verbose=False):
        with pytest.raises(RuntimeError, match="'act' is called more than 2 time.*calls=N .* calls='any'"):
            model(x)
    with swap_activations(model := Reused(3), "signed", learnable=True, calls=4, verbose=False):
        with pytest.raises(RuntimeError, match="'act' has 3 calls, not calls=4: set calls=3"):
            model(x)
    for calls in (0, -1, "all", 1.5):
        with pytest.raises(ValueError, match=f"calls={calls!r} must be"):
            swap_activations(Reused(), calls=calls)


class Masking(nn.Module):
    """A layer whose model sets attributes before each call."""

    def __init__(self):
        super().__init__()
        self.linear, self.mask, self.scale = nn.Linear(4, 4), None, nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.scale * self.linear(x)
        return x if self.mask is None else x.masked_fill(self.mask, 0.0)


def test_attributes_that_are_set_after_an_insertion_reach_the_layer():
    model, x = nn.Sequential(Masking(), nn.Dropout(0.5), nn.Linear(4, 4)), torch.randn(3, 5, 4)
    plain = copy.deepcopy(model)
    surgery = insert_em_operators(model, ["0", "1", "2"], 2, verbose=False)
    insert_em_operators(model, "0", 3, verbose=False)  # a second wrapper around the first
    for net in (plain, model):
        net[0].mask = torch.arange(5)[:, None] < 2
        net[0].scale = nn.Parameter(torch.full((4,), 3.0))
        net[1].p = 0.0
        net[2].bias = None
    assert torch.equal(model(x), plain(x)) and model.eval()[1].training is False
    assert model[0].layer.layer.mask is model[0].mask and "mask" not in vars(model[0])
    model[0].note = 1  # a name of neither
    assert "note" in vars(model[0])
    surgery.undo()
    assert model[1].p == 0.0


def test_a_layer_with_an_operator_does_not_look_like_a_wrapper_of_adapters():
    layer = nn.Linear(4, 4)
    layer.base_layer, layer.rank = nn.Linear(4, 4), 2
    model = nn.Sequential(layer)
    insert_em_operators(model, "0", 2, verbose=False)
    assert model[0].rank == 2 and not hasattr(model[0], "base_layer")


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_overflows_is_not_a_part_of_automatic_weights(bad):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(5, 4)
    losses = LayerwiseLoss(model, "0", verbose=False)
    losses.add_to(model(x).square().mean() * bad)
    losses.add_to(model(x).square().mean())
    other = LayerwiseLoss(model, "0", verbose=False)
    other.add_to(model(x).square().mean())
    assert losses.weight_of("0") == other.weight_of("0") > 0


def test_an_input_tap_takes_the_first_tensor_given_by_position_or_by_keyword():
    class Masked(nn.Module):
        def forward(self, mask, x, scale):
            return x * scale

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Masked()

        def forward(self, x):
            return self.layer(None, x=x, scale=torch.tensor(2.0))

    net, x = Net(), torch.ones(4, 3, requires_grad=True)
    taps = Taps(net, "layer", "input", dim=-1, detach=True, verbose=False)
    y = net(x)
    (captured,) = taps.take()["layer"]
    assert captured is x and not y.requires_grad  # the forward went on with a detached tensor
    torch.testing.assert_close(y, 2.0 * x.detach())


def test_a_plan_that_builds_too_much_raises_and_leaves_later_modules_unlimited():
    make = functools.partial(nn.Linear, in_features=3, out_features=3)
    plan = recorded_plan(replace_modules(nn.Sequential(nn.ReLU()), "0", make).model)
    plan[0]["init_args"] = {"in_features": 2**15, "out_features": 2**15, "device": "meta"}
    with pytest.raises(ValueError, match="268,435,456 elements"):
        apply_plan(nn.Sequential(nn.ReLU()), plan)
    assert nn.Linear(2**15, 2**15, device="meta").weight.numel() == 2**30
