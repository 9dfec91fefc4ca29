"""Surgery in models of other projects: axes, sets, padding, causal attention, functions, outputs of other types."""

import copy
import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from em_lightning import ACTIVATIONS
from em_lightning.surgery import (
    LayerwiseLoss,
    NoMatchError,
    UnitAxis,
    apply_plan,
    insert_em_operators,
    recorded_plan,
    swap_activations,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*enable_nested_tensor", "ignore:LSTM with projections")


def opened(model, where, *args, **options):
    """Insert operators with open gates."""
    torch.manual_seed(0)
    surgery = insert_em_operators(model, where, 2, *args, verbose=False, **options)
    for name, parameter in surgery.parameters().items():
        if name.endswith("gate"):
            parameter.data.fill_(1.0)
    return surgery


def change_of(model, x, place, seen, *args, **options):
    """Return the largest change of an output at ``seen`` if the input changes at ``place``."""
    other = x.clone()
    other[place] += 1
    return (model(x, *args, **options) - model(other, *args, **options))[seen].abs().max().item()


class Attention(nn.Module):
    """Self-attention of one head, written in three ways."""

    def __init__(self, way, width=8):
        super().__init__()
        self.way, self.qkv, self.out = way, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("later", torch.ones(16, 16, dtype=torch.bool).triu(1))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        n = x.shape[1]
        if self.way == "flag":
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        if self.way == "mask":
            return self.out(F.scaled_dot_product_attention(q, k, v, ~self.later[:n, :n]))
        scores = q @ k.mT / math.sqrt(x.shape[-1])
        if self.way == "softmax":
            scores = scores.masked_fill(self.later[:n, :n], -torch.inf)
        return self.out(scores.softmax(-1) @ v)


class Language(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.embedding, self.attention, self.mlp = nn.Linear(8, 8), Attention(way), nn.Linear(8, 8)

    def forward(self, x):
        x = self.embedding(x)
        x = x + self.attention(x)
        return x + self.mlp(x)


@pytest.mark.parametrize("way", ["flag", "mask", "softmax"])
@pytest.mark.parametrize("where", ["embedding", "attention.out", "mlp"])
def test_an_operator_that_would_see_later_positions_is_refused(way, where):
    model, x = Language(way), torch.randn(2, 6, 8)
    opened(model, where)
    for _ in range(2):  # also at the second try
        with pytest.raises(ValueError, match=f"'{where}' masks later .*causal=True"):
            model(x)


@pytest.mark.parametrize("way", ["flag", "softmax"])
def test_a_causal_operator_sees_only_earlier_positions(way):
    model, x = Language(way), torch.randn(2, 6, 8)
    opened(model, "mlp", causal=True)
    assert change_of(model, x, (slice(None), 4), (slice(None), slice(4))) < 1e-6
    assert change_of(model, x, (slice(None), 4), (slice(None), slice(4, None))) > 1e-3
    operator, items = model.mlp.operator, torch.randn(2, 5, 8)
    for t in range(5):  # each position as the last one of its own set
        alone = operator.reconstruct(items[:, : t + 1])[:, -1]
        torch.testing.assert_close(operator(items)[:, t] - items[:, t], alone, rtol=1e-4, atol=1e-5)


def test_masks_given_to_torch_layers_are_seen():
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 5, 8)
    opened(layer, "linear2")
    with pytest.raises(ValueError, match="causal=True"):
        layer(x, mask)
    decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)  # with attention to a memory as well
    opened(decoder, "linear1")
    with pytest.raises(ValueError, match="causal=True"):
        decoder(x, torch.randn(2, 7, 8), tgt_mask=mask)


def test_attention_to_all_positions_is_not_refused_and_keeps_its_numbers():
    for model in (Language("plain"), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)):
        x, plain = torch.randn(2, 5, 8), copy.deepcopy(model).eval()
        insert_em_operators(model.eval(), ["mlp" if hasattr(model, "mlp") else "linear2"], 2, verbose=False)
        with torch.no_grad():
            first, second = model(x), model(x)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, plain(x))


class LengthFirst(nn.Module):
    """A block in the layout (T, B, D) of nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x):
        return self.mlp(self.attention(x, x, x, need_weights=False)[0])


class First(nn.Module):
    """A recurrent layer without its state."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.filterwarnings("ignore:the operator behind 'layer' fits one mixture to all positions")
def test_sequences_of_a_batch_are_sets_of_their_own():
    others = (slice(None), slice(2))
    x = torch.randn(6, 3, 8)
    for model, where in (
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), "linear2"),
        (nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 2)), "0"),
        (First(nn.LSTM(8, 8)), "layer"),
        (First(nn.GRU(8, 4, bidirectional=True)), "layer"),
    ):
        opened(model, where)
        assert change_of(model, x, (slice(None), 2), others) == 0.0
        assert change_of(model, x, (slice(None), 2), (slice(None), 2)) > 0
    model = LengthFirst()
    opened(model, "mlp")
    with pytest.raises(ValueError, match=r"\(6, 3, 8\).*batch_first=False.*set_dim="):
        model(x)
    model = LengthFirst()
    opened(model, "mlp", set_dim=0)
    assert change_of(model, x, (slice(None), 2), others) == 0.0


def test_rows_and_images_of_a_batch_are_sets_of_their_own():
    rows = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    opened(rows, "0")
    assert change_of(rows, torch.randn(5, 4), 4, slice(4)) == 0.0
    maps = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    opened(maps, "1")
    assert change_of(maps, torch.randn(3, 3, 8, 8), 2, slice(2)) == 0.0
    batch = nn.Sequential(nn.Linear(4, 6))
    opened(batch, "0", set_dim=0)
    assert change_of(batch, torch.randn(5, 4), 4, slice(4)) > 1e-3
    with pytest.raises(ValueError, match="set_dim=1 .*dim=-1"):
        wrong = nn.Sequential(nn.Linear(4, 6))
        opened(wrong, "0", set_dim=1)
        wrong(torch.randn(5, 4))


class Padded(nn.Module):
    """Hands a mask with 1 at words to its inner module, as language models do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x, attention_mask=None):
        return self.inner(x)


def test_padding_takes_no_part_in_a_fit():
    padding = torch.arange(6) >= torch.tensor([[4], [6], [3]])
    words = ~padding
    x = torch.randn(3, 6, 8)
    first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    opened(first, "linear2")
    assert change_of(first, x, padding, words, src_key_padding_mask=padding) < 1e-6
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 1)
    opened(encoder, "layers.0.linear2")
    assert change_of(encoder, x.mT.mT.transpose(0, 1), padding.T, words.T, src_key_padding_mask=padding) < 1e-6
    own = Padded()
    opened(own, "inner.0")
    assert change_of(own, x, padding, words, attention_mask=words.long()) < 1e-6
    assert change_of(own, x, padding, words) > 1e-3  # without a mask


class ChannelsLast(nn.Module):
    """A block as in ConvNeXt: channels last inside, first outside."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear, self.act = nn.Conv2d(6, 6, 3, padding=1), Norm(), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        return self.act(self.linear(self.norm(self.conv(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Norm(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.act = nn.Conv2d(6, 10, 4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(self.proj(x).flatten(2).mT)


def test_axes_are_decided_by_the_first_batch(capsys):
    model = nn.Sequential(ChannelsLast(), Tokens())
    losses = LayerwiseLoss(model, ["0", "0.norm", "0.conv", "1", "1.act"], "free_energy", weight=1.0)
    swap_activations(model, "softmax_gated")
    insert_em_operators(model, ["0.norm", "1"], 2)
    assert losses.dims["0"] == "auto" and losses.dims["0.conv"] == 1
    losses.add_to(model(torch.randn(2, 6, 8, 8)).sum())
    assert losses.dims == {"0": 1, "0.norm": -1, "0.conv": 1, "1": -1, "1.act": -1}
    assert model[0].act.dim == model[1].layer.act.dim == -1
    lines = capsys.readouterr().out.splitlines()
    assert "0: output, shape (2, 6, 8, 8), axis 1 has 6 units, 128 items" in lines
    assert "1: SetRefinement, shape (2, 4, 10), axis -1 has 10 units, 2 sets of 4 items" in lines
    assert "0.act: SoftmaxGatedActivation, shape (2, 8, 8, 6), axis -1 has 6 units, 128 items" in lines
    assert len(lines) == 5 + 2 + 2
    model(torch.randn(2, 6, 8, 8))
    assert capsys.readouterr().out == ""


def test_the_axis_is_decided_again_after_a_plan_is_applied():
    for dim, given in (("auto", {}), (1, {"dim": 1})):
        model, fresh, x = Tokens(), Tokens(), torch.randn(2, 6, 8, 8)
        fresh.load_state_dict(model.state_dict())
        swap_activations(model, "softmax_gated", dim=dim, verbose=False)
        y = model(x)
        plan = recorded_plan(model)
        assert plan[0]["init_args"] == given
        for _ in range(2):  # the second time, it is the same surgery
            apply_plan(fresh, plan)
        assert torch.equal(fresh(x), y) and fresh.act.dim == model.act.dim == (1 if given else -1)
        assert len(recorded_plan(fresh)) == 1


class PreNorm(nn.Module):
    """A layer behind a norm that is declared after it."""

    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x):
        y = self.layer(self.norm(x))
        return y[0] if isinstance(y, tuple) else y


PRE_NORMS = {  # layer, norm, shape of the input for a length, axis of the output's units
    "linear": (lambda: nn.Linear(16, 32), lambda: nn.LayerNorm(16), lambda n: (2, n, 16), -1),
    "recurrent": (lambda: nn.GRU(16, 16, 1, True, True, 0.0, True), lambda: nn.LayerNorm(16), lambda n: (2, n, 16), -1),
    "convolution": (lambda: nn.Conv1d(16, 32, 1), lambda: nn.BatchNorm1d(16), lambda n: (2, 16, n), 1),
    "maps": (lambda: nn.Conv2d(16, 32, 1), lambda: nn.BatchNorm2d(16), lambda n: (2, 16, 4, n), 1),
}


@pytest.mark.parametrize("kind", PRE_NORMS)
def test_a_norm_declared_after_its_layer_never_makes_positions_the_units(kind):
    layer, norm, shape, expected = PRE_NORMS[kind]
    for length in (5, 16, 32):  # 16 is also the width of the norm, 32 that of the layer
        model = nn.Sequential(PreNorm(layer(), norm()))
        losses = LayerwiseLoss(model, "0", "free_energy", weight=1.0, verbose=False)
        try:
            losses.add_to(model(torch.randn(shape(length))).sum())
        except ValueError as error:
            assert length != 5 and "give dim=" in str(error)
        else:
            assert losses.dims["0"] == expected


@pytest.mark.parametrize("change", ["swap", "functions", "insert"])
def test_a_restored_model_keeps_the_axis_whatever_it_sees_first(change):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc, self.relu = nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU()

        def forward(self, x):
            x = self.fc(self.norm(x))
            return F.relu(x) if change == "functions" else self.relu(x)

    model, fresh = Model(), Model()
    if change == "insert":
        opened(model, "relu")
    else:
        swap_activations(model, "softmax_gated", functional=change == "functions", verbose=False)
    model(torch.randn(2, 4, 6))  # decides
    apply_plan(fresh, copy.deepcopy(recorded_plan(model)))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 6, 6)  # both axes have the width
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(ValueError, match="give dim="):
        undecided = Model()
        swap_activations(undecided, "softmax_gated", functional=change == "functions", verbose=False)
        undecided(x)


def test_layer_wise_losses_keep_their_axes_in_their_state():
    model = nn.Sequential(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)))
    first, second = (LayerwiseLoss(model, "0", "free_energy", weight=1.0, verbose=False) for _ in range(2))
    first.add_to(model(torch.randn(2, 4, 6)).sum())
    second.taps.clear()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.remove()
    second.add_to(model(torch.randn(2, 6, 6)).sum())
    assert second.dims == {"0": -1}


MAP, ROWS = nn.Conv1d(1, 1, 1), nn.Linear(1, 1)  # layers with units on axis 1 and on the last; widths stand beside them


@pytest.mark.parametrize(
    ("shape", "widths", "near", "in_order", "expected"),
    [
        ((2, 5, 7), [7], [], False, -1),  # no type: the width decides
        ((2, 5, 7), [7, 5], [], False, -1),  # the likelier width
        ((2, 5, 7), [3, 5], [(MAP, 5)], False, 1),  # the likeliest width that occurs; the type agrees
        ((2, 5, 7), [5], [(ROWS, 7)], True, None),  # the type contradicts
        ((2, 5, 7), [5, 7], [(MAP, 5), (ROWS, 7)], True, 1),  # both types: the order of the widths decides
        ((2, 5, 7), [5, 7], [(MAP, 5), (ROWS, 7)], False, None),  # unless it cannot be trusted
        ((2, 5, 5), [5], [(MAP, 5)], True, None),  # the width names both axes
        ((2, 5, 9, 7), [7, 5], [(MAP, 5)], True, 1),  # the width of an image equals that of a layer by chance
        ((2, 5, 9, 5), [5], [(MAP, 5)], False, 1),
        ((2, 5, 9, 7), [7], [(ROWS, 7)], False, -1),
        ((2, 5, 7), [3], [], True, None),
    ],
)
def test_widths_and_types_of_layers_decide_the_axis_together(shape, widths, near, in_order, expected):
    axis = UnitAxis("layer", widths, near=near, in_order=in_order)
    if expected is not None:
        assert axis(shape) == expected
    else:
        with pytest.raises(ValueError, match="dim='auto' needs one of axes 1 and -1 of 'layer'"):
            axis(shape)


def test_axes_that_widths_do_not_decide_are_refused():
    square, x = ChannelsLast(), torch.randn(2, 6, 6, 6)
    for surgery in (
        lambda model: swap_activations(model, "softmax_gated"),
        lambda model: insert_em_operators(model, "norm", 2),
        lambda model: LayerwiseLoss(model, "norm", weight=1.0),
    ):
        model = copy.deepcopy(square)
        surgery(model)
        with pytest.raises(ValueError, match=r"dim='auto' .*'(act|norm)'.*\(2, 6, 6, 6\).*6 units.*dim="):
            model(x)
    swap_activations(square, "softmax_gated", dim=-1)
    square(x)
    wide = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(-1, (2, 3)))
    LayerwiseLoss(wide, "1", weight=1.0)
    with pytest.raises(ValueError, match=r"'1'.*\(5, 2, 3\).* have 6 units.*dim="):
        wide(torch.randn(5, 4))


class Maps(nn.Module):
    """Two convolutions and a classifier, with the activations declared before or behind them."""

    def __init__(self, first):
        super().__init__()
        if first:
            self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(5), nn.Linear(400, 10)
        if not first:
            self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.head(self.pool(self.act2(self.conv2(self.act1(self.conv1(x))))).flatten(1))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("side", [6, 8, 16, 28, 32])
def test_the_order_of_declaration_does_not_decide_the_axis_of_maps(first, side):
    model = Maps(first)
    losses = LayerwiseLoss(model, ["act1", "act2"], weight=1.0)
    swap_activations(model, "softmax_gated")
    losses.add_to(model(torch.randn(2, 1, side, side)).sum())
    assert model.act1.dim == model.act2.dim == 1
    assert losses.dims == {"act1": 1, "act2": 1}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("side", [10, 20])  # of a map; 10 is also the number of classes
def test_maps_as_wide_as_a_classifier_are_refused(first, side):
    model = Maps(first)
    swap_activations(model, "softmax_gated")
    with pytest.raises(ValueError, match=r"dim='auto' .*, 10, 10\).*dim="):
        model(torch.randn(2, 1, side, side))


def test_elementwise_activations_need_no_axis_and_silence_is_kept(capsys):
    model = ChannelsLast()
    swap_activations(model, "signed")
    model(torch.randn(2, 6, 6, 6))
    assert capsys.readouterr().out == "act: SignedActivation, shape (2, 6, 6, 6), elementwise\n"
    quiet = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    swap_activations(quiet, "softmax_gated", verbose=False)
    insert_em_operators(quiet, "0", 2, verbose=False)
    LayerwiseLoss(quiet, "0", weight=1.0, verbose=False).add_to(quiet(torch.randn(5, 4)).sum())
    assert capsys.readouterr().out == ""


# Functions.


class Functions(nn.Module):
    def forward(self, x):
        return F.leaky_relu(F.silu(F.gelu(x)), 0.1) + torch.tanh(x) + x.tanh() + F.elu(x, 1.0) + F.relu(x)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (nn.GELU, lambda x, f: F.leaky_relu(F.silu(f(x)), 0.1) + 2 * x.tanh() + F.elu(x) + F.relu(x)),
        (nn.SiLU, lambda x, f: F.leaky_relu(f(F.gelu(x)), 0.1) + 2 * x.tanh() + F.elu(x) + F.relu(x)),
        (nn.LeakyReLU, lambda x, f: f(F.silu(F.gelu(x))) + 2 * x.tanh() + F.elu(x) + F.relu(x)),
        (nn.Tanh, lambda x, f: F.leaky_relu(F.silu(F.gelu(x)), 0.1) + 2 * f(x) + F.elu(x) + F.relu(x)),
        ([nn.ReLU, nn.ELU], lambda x, f: F.leaky_relu(F.silu(F.gelu(x)), 0.1) + 2 * x.tanh() + 2 * f(x)),
    ],
)
def test_only_calls_of_the_target_are_swapped(target, expected):
    model, x = nn.Sequential(Functions()), torch.randn(3, 4)
    swap_activations(model, "softmax_gated", target, functional=True, verbose=False)
    torch.testing.assert_close(model(x), expected(x, lambda x: x * x.softmax(-1)))


def test_functions_beside_a_module_of_the_target_stay():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x):
            return F.relu(self.act(x))

    model, x = Both(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="functional=True has no effect: .*gelu"):
        surgery = swap_activations(model, nn.Tanh, nn.GELU, functional=True)
    assert [change.path for change in surgery.changes] == ["act"]
    assert torch.equal(model(x), x.tanh().relu())


def block(x):
    return F.relu(x)


class Helpers(nn.Module):
    """Calls relu in a method of its own, in one of a base class's, and in a function of its module."""

    def forward(self, x):
        return self.first(x) + self.second(x)

    def first(self, x):
        return [F.relu(one) for one in (x,)][0]

    def second(self, x):
        return block(x)


class Inherited(Helpers):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("cls", [Helpers, Inherited])
def test_calls_in_helper_methods_are_swapped(cls):
    model, x = nn.Sequential(cls()), torch.randn(3, 4)
    surgery = swap_activations(model, "softmax_gated", functional=True, verbose=False)
    swapped = x * x.softmax(-1)
    torch.testing.assert_close(model(x), 2 * swapped)
    torch.testing.assert_close(model[0].first(x), swapped)  # as a training_step may call it
    surgery.undo()
    assert torch.equal(model(x), 2 * x.relu())


class Children(nn.Module):
    """Calls modules that are named like the function."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.block = nn.ModuleDict({"tanh": nn.Tanh()})
        self.block.relu = self.relu

    def forward(self, x):
        return [self.relu(one) + self.block.relu(one) for one in (x,)][0]


class ChildrenAndCalls(Children):
    def forward(self, x):
        return super().forward(x) + x.relu()


def test_children_named_like_the_function_are_no_calls():
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="functional=True has no effect: .*relu"):
        surgery = swap_activations(nn.Sequential(Children()), nn.Tanh, calls="any", functional=True)
    assert not any("em_functional" in change.path for change in surgery.changes)
    model = nn.Sequential(ChildrenAndCalls())
    surgery = swap_activations(model, nn.Tanh, calls="any", functional=True, verbose=False)
    assert surgery.changes[-1].path == "0.em_functional"
    torch.testing.assert_close(model(x), 3 * x.tanh())


def test_functions_inside_an_operator_are_not_swapped_again():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Helpers()

        def forward(self, x):
            return F.relu(self.inner(x))

    model, x = Outer(), torch.randn(3, 4)
    swap_activations(model, "relu_gated", functional=True, verbose=False)
    gated = ACTIVATIONS.build("relu_gated")
    torch.testing.assert_close(model(x), gated(2 * gated(x)))


def test_a_given_axis_is_kept_in_calls():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            x = self.layer(x)
            return F.relu(self.norm(x.flatten(0, 1)).view_as(x))

    model, x = Graph().eval(), torch.randn(2, 5, 4)
    plain = model.norm(model.layer(x).flatten(0, 1)).view(2, 5, 6)
    for dim, expected in ((-1, -1), (1, 1), ("auto", -1)):
        with swap_activations(model, "softmax_gated", functional=True, dim=dim, verbose=False):
            torch.testing.assert_close(model(x), plain * plain.softmax(expected))


# Outputs of other types, widths, empty batches.


class Pair(NamedTuple):
    y: torch.Tensor
    h: torch.Tensor


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Typed(nn.Linear):
    def __init__(self, make):
        super().__init__(4, 3)
        self.make = make

    def forward(self, x):
        return self.make(super().forward(x))


def test_outputs_keep_their_type():
    x = torch.randn(2, 5, 4)
    for make, read in (
        (lambda y: Pair(y, y), lambda out: out.y),
        (lambda y: Output(None, y), lambda out: out.logits),
        (lambda y: [y, 3], lambda out: out[0]),
        (lambda y: (Pair(y, y), y), lambda out: out[0].y),
    ):
        model = nn.Sequential(Typed(make))
        plain = model(x)
        opened(model, "0")
        out = model(x)
        assert type(out) is type(plain) and not torch.allclose(read(out), read(plain))
        losses = LayerwiseLoss(model, "0", lambda d: d.square().mean(), weight=1.0)
        total = losses.add_to(read(model(x)).sum())
        torch.testing.assert_close(total, read(out).sum() + read(out).square().mean())


@pytest.mark.filterwarnings("ignore:the operator behind '1' fits one mixture to all positions")
@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (nn.LSTM(10, 6, batch_first=True), 6),
        (nn.GRU(10, 6, batch_first=True, bidirectional=True), 12),
        (nn.LSTM(10, 6, batch_first=True, proj_size=5), 5),
        (nn.RNN(10, 6, batch_first=True), 6),
    ],
)
def test_widths_of_recurrent_layers(layer, width):
    model = nn.Sequential(nn.Linear(4, 10), layer)
    surgery = opened(model, "1")
    assert model(torch.randn(2, 5, 4))[0].shape[-1] == surgery.changes[0].added.operator.num_features == width


def test_layers_without_items_pass_and_keep_zero_gradients():
    class Experts(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.a, self.b = make(), make()

        def forward(self, x):
            return torch.cat([self.a(x[x[:, 0, 0] > 0]), self.b(x[x[:, 0, 0] <= 0])])

    model = Experts(lambda: nn.Linear(4, 3))
    surgery = opened(model, ["a", "b"])
    model(torch.rand(6, 5, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in surgery.parameters().values())
    assert all((p.grad == 0).all() for name, p in surgery.parameters().items() if name.startswith("b"))
    tokens = Experts(lambda: nn.Linear(4, 3))
    opened(tokens, "b", set_dim=0)
    tokens(torch.rand(6, 5, 4))


# Selections and names.


def test_a_typo_in_a_list_is_named():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    for surgery in (
        lambda: insert_em_operators(model, ["0", "fc9"], 2),
        lambda: swap_activations(model, where=["1", "fc9"]),
        lambda: swap_activations(model, where=["1", "fc9"], functional=True),
        lambda: LayerwiseLoss(model, [nn.ReLU, "fc9"], weight=1.0),
        lambda: swap_activations(model, target=[nn.ReLU, "fc9"]),
    ):
        with pytest.raises(NoMatchError, match="nothing matches 'fc9' in (where|target)=.*Linear: 0"):
            surgery()
    assert not recorded_plan(model)
    assert len(swap_activations(model, target=[nn.ReLU, nn.GELU]).changes) == 1  # classes are alternatives


class GELU(nn.Module):
    def forward(self, x):
        return F.gelu(x)


def test_classes_of_one_name_are_told_apart():
    with pytest.raises(NoMatchError, match=r"target=GELU .*test_surgery_layouts.GELU: 0"):
        swap_activations(nn.Sequential(GELU()), target=nn.GELU)
    with pytest.raises(NoMatchError, match=r"target=test_surgery_layouts.GELU .* GELU: 0"):
        swap_activations(nn.Sequential(nn.GELU()), target=GELU)
    report = swap_activations(nn.Sequential(GELU()), nn.GELU, target=GELU).report
    assert report.splitlines()[1].split() == ["0", "test_surgery_layouts.GELU", "GELU", "0"]


def test_selections_stay_out_of_inserted_operators():
    model = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 6))
    opened(model, "0")
    assert [change.path for change in swap_activations(model, "signed", nn.SiLU, verbose=False).changes] == ["1"]
    with pytest.raises(NoMatchError, match="target=SiLU"):  # those of the operator's correction
        swap_activations(model, "signed", nn.SiLU)
    linear = LayerwiseLoss(model, nn.Linear, weight=1.0, verbose=False)
    assert list(linear.losses) == ["0.layer", "2"]
    linear.remove()
    assert list(LayerwiseLoss(model, "0.operator.operator", weight=1.0, verbose=False).losses) == [
        "0.operator.operator"
    ]


@pytest.mark.parametrize("key, lost", [("direction", 65.0), ("softmax_gated", 7.3), ("sparsemin", 6.0)])
@pytest.mark.parametrize("functional", [False, True])
def test_swaps_that_ruin_wide_layers_warn(key, lost, functional):
    class Network(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer, self.act = nn.Linear(4, width), nn.ReLU()

        def forward(self, x):
            return F.relu(self.layer(x)) if functional else self.act(self.layer(x))

    x = torch.randn(3, 4)
    wide, narrow = Network(32), Network(31)
    swap_activations(wide, key, functional=functional, verbose=False)
    swap_activations(narrow, key, functional=functional, verbose=False)
    with pytest.warns(UserWarning, match=f"over the 32 units of .* it lost {lost} points .*'signed' and 'grouped'"):
        wide(x)
    narrow(x)  # any warning is an error in this suite


class Decides(nn.Module):
    """Has an output whose width is not that of its last layer."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(7, 32), nn.Linear(7, 4)

    def forward(self, x):
        return self.wide(x) + self.narrow(x).sum(-1, keepdim=True)


@pytest.mark.parametrize("make, width", [(Decides, 32), (nn.Flatten, 7)])
def test_an_operator_takes_the_width_that_it_sees(make, width):
    x = torch.randn(5, 7)
    model = nn.Sequential(make(), nn.Identity())
    insert_em_operators(model, "0", set_dim=0, verbose=False)
    assert torch.equal(model(x), model[0].layer(x)) and model[0].operator.operator.num_features == width
    refused = nn.Sequential(make(), nn.Identity())
    insert_em_operators(refused, "0", residual=True, verbose=False)
    with pytest.raises(ValueError, match=f"give num_features={width}"):
        refused(x)


def test_a_given_width_is_kept():
    model = nn.Sequential(nn.Linear(3, 16), nn.Identity())
    insert_em_operators(model, "0", num_features=7, verbose=False)
    with pytest.raises(ValueError, match=r"must be \(B, N, 7\)"):
        model(torch.randn(5, 3))


@pytest.mark.parametrize("value, error", [(2.5, TypeError), ("4", TypeError), (0, ValueError), (-1, ValueError)])
def test_numbers_of_components_are_checked_when_operators_are_inserted(value, error):
    with pytest.raises(error, match=f"num_components={value!r} must be"):
        insert_em_operators(nn.Sequential(nn.Linear(3, 4)), "0", value)


def test_an_inserted_operator_learns_nothing_but_its_gate_and_is_cheap_in_many_features():
    model = nn.Sequential(nn.Linear(8, 2048))
    surgery = insert_em_operators(model, "0", verbose=False)
    assert [name for name, _ in model.named_parameters() if "operator" in name] == ["0.operator.gate"]
    model(torch.randn(4, 16, 8)).sum().backward()  # corrections would take gigabytes
    surgery.undo()


def test_modules_that_are_none_are_passed():
    model = nn.Sequential(nn.Linear(3, 4))
    model.register_module("norm", None)
    model.add_module("act", nn.ReLU())
    swap_activations(model, verbose=False)
    assert isinstance(model.act, ACTIVATIONS["signed"])


@pytest.mark.parametrize("between", [nn.Dropout2d(), nn.Identity(), nn.GELU()])
def test_layers_that_keep_axes_do_not_hide_the_layer_before(between):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), between, nn.ReLU())
    surgery = swap_activations(model, "grouped", verbose=False)
    model(torch.randn(2, 3, 8, 8))  # axes 1 and -1 both have 8 units
    assert surgery.changes[0].added.dim == 1


# A wrong axis.


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 8), torch.randn(5, 4)),
        (nn.Linear(4, 8), torch.randn(5, 3, 4)),
        (nn.Conv1d(4, 8, 1), torch.randn(5, 4, 3)),
    ],
)
def test_the_axis_of_the_batch_is_refused_as_that_of_the_units(layer, x):
    for dim in (0, -x.ndim):
        uses = (
            lambda net, dim=dim: swap_activations(net, "softmax_gated", dim=dim, verbose=False),
            lambda net, dim=dim: LayerwiseLoss(net, "1", weight=1.0, dim=dim, verbose=False),
            lambda net, dim=dim: insert_em_operators(net, "0", 2, dim=dim, verbose=False),
        )
        for use in uses:
            net = nn.Sequential(copy.deepcopy(layer), nn.ReLU())
            use(net)
            with pytest.raises(ValueError, match=rf"dim={dim} must be the axis of the units of '.', not of items"):
                net(x)


def test_units_on_axis_0_of_a_map_without_a_batch_are_accepted():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    swap_activations(net, "softmax_gated", dim=0, verbose=False)
    x = torch.randn(3, 5, 5)
    expected = ACTIVATIONS.build("softmax_gated", dim=0)(net[0](x))
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("result", ["detached", "vector", "number", "none"])
def test_losses_that_could_not_train_a_layer_are_refused(result):
    def loss(energies):
        value = energies.square()
        return {"detached": value.detach().mean(), "vector": value.mean(-1), "number": 1.0, "none": None}[result]

    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    losses = LayerwiseLoss(model, "1", loss, weight=1.0, verbose=False)
    with pytest.raises(TypeError, match="the loss of '1' must be a scalar tensor with a gradient"):
        losses.add_to(model(torch.randn(5, 4)).sum())


@pytest.mark.parametrize("target", [F.gelu, torch.relu, [nn.ReLU, F.silu]])
def test_functions_are_no_targets_and_the_message_names_the_class(target):
    with pytest.raises(TypeError, match=r"target=.* must be a class.*; give the class, (GELU|ReLU|SiLU)"):
        swap_activations(nn.Sequential(nn.Linear(4, 3), nn.GELU()), target=target, functional=True, verbose=False)


class Affine(nn.Module):
    """A linear layer of its own class, whose weight is (inputs, outputs) and without attributes that name sizes."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("where", ["0", "1"])
def test_a_bias_tells_the_width_of_a_layer_of_an_unknown_class(where):
    model = nn.Sequential(Affine(8, 32), nn.GELU(), Affine(32, 8))
    losses = LayerwiseLoss(model, where, weight=0.1, verbose=False)
    losses.add_to(model(torch.randn(4, 12, 8)).square().mean())
    assert losses.dims == {where: -1}
    swap_activations(model, "grouped", target=nn.GELU, verbose=False)
    assert model(torch.randn(4, 12, 8)).shape == (4, 12, 8)
    surgery = opened(nn.Sequential(Affine(8, 32), nn.Conv1d(12, 3, 1)), "0")
    assert surgery.model(torch.randn(4, 12, 8)).shape == (4, 3, 32)
