"""Masks of padding behind inserted operators: of the layer itself, their axes and their values."""

import warnings

import pytest
import torch
from torch import nn

from em_lightning.surgery import insert_em_operators

pytestmark = pytest.mark.filterwarnings("ignore:.*enable_nested_tensor", "ignore:.*nested tensors")
PADDING = torch.arange(6) >= torch.tensor([[4], [6], [3]])


def opened(model, where, **options):
    surgery = insert_em_operators(model, where, 2, verbose=False, **options)
    for parameter in surgery.parameters().values():
        parameter.data.fill_(0.8)
    return model


def leak(model, x, *args, at=PADDING, **kwargs):
    """Return the largest change of the output at items if the padding of x changes."""
    torch.manual_seed(1)
    other = torch.where(at[..., None], x + torch.randn_like(x), x)
    return (model(x, *args, **kwargs) - model(other, *args, **kwargs))[~at].abs().max().item()


class Block(nn.Module):
    """A block of one's own that receives a mask under any name."""

    def __init__(self, name, heads=0):
        super().__init__()
        self.name, self.heads, self.layer = name, heads, nn.Linear(8, 8)

    def forward(self, x, key_padding_mask=None, padding_mask=None, attention_mask=None):
        y = self.layer(x)
        return y.unflatten(-1, (self.heads, -1)) if self.heads else y


class Call(nn.Module):
    """Calls its block without a mask of its own name."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **kwargs):
        return self.block(x, **{self.block.name: kwargs["hidden"]})


@pytest.mark.parametrize("name", ["key_padding_mask", "padding_mask", "attention_mask"])
@pytest.mark.parametrize("twice", [False, True])
def test_a_mask_that_only_the_changed_layer_receives_is_used(name, twice):
    model = opened(Call(Block(name)), "block")
    if twice:
        opened(model, "block")
    mask = ~PADDING if name == "attention_mask" else PADDING
    assert leak(model, torch.randn(3, 6, 8), hidden=mask) < 1e-5


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("as_float", [False, True])
def test_masks_of_an_encoder_itself(batch_first, mode, as_float):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    model = getattr(opened(nn.Sequential(nn.TransformerEncoder(layer, 1)), "0"), mode)()[0]
    mask = torch.zeros(3, 6).masked_fill(PADDING, -torch.inf) if as_float else PADDING
    x, at = torch.randn(3, 6, 8), PADDING if batch_first else PADDING.T
    with torch.set_grad_enabled(mode == "train"):
        assert leak(model, x if batch_first else x.transpose(0, 1), src_key_padding_mask=mask, at=at) < 1e-5


@pytest.mark.parametrize("options", [{}, {"set_dim": 1}, {"set_dim": 2}, {"set_dim": 1, "causal": True}])
def test_a_mask_of_sequences_is_used_behind_outputs_of_heads(options):
    model = opened(Call(Block("padding_mask", heads=2)), "block", dim=-1, num_features=4, **options)
    assert leak(model, torch.randn(3, 6, 8), hidden=PADDING) < 1e-5


class Swapped(nn.Module):
    """Heads before positions, as in (B, H, N, D)."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(4)

    def forward(self, x, padding_mask):
        return self.norm(self.layer(x).unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("options", [{}, {"set_dim": 2}, {"set_dim": -2}])
def test_the_axis_of_positions_is_found_behind_heads(options):
    model = opened(Swapped(), "norm", **options)
    assert leak(model, torch.randn(3, 6, 8), PADDING) < 1e-5


def test_a_mask_that_fits_several_axes_warns():
    x, mask = torch.randn(2, 2, 8), torch.tensor([[False, True], [False, False]])
    with pytest.warns(UserWarning, match=r"padding_mask \(2, 2\) fits axes \[1, 2\] of the output \(2, 2, 2, 4\)"):
        opened(Swapped(), "norm")(x, mask)
    opened(Swapped(), "norm")(x, torch.zeros_like(mask))  # nothing is masked


@pytest.mark.parametrize("blocked", [-1e4, -1e9, -torch.inf, torch.finfo(torch.float32).min])
def test_an_additive_attention_mask_masks_its_negative_entries(blocked):
    model, x = opened(Call(Block("attention_mask")), "block"), torch.randn(3, 6, 8)
    additive = torch.zeros(3, 6).masked_fill(PADDING, blocked)
    assert leak(model, x, hidden=additive) < 1e-5
    torch.testing.assert_close(model(x, hidden=additive), model(x, hidden=(~PADDING).float()))
    torch.testing.assert_close(model(x, hidden=torch.zeros(3, 6)), model(x, hidden=torch.ones(3, 6)))


@pytest.mark.parametrize("options", [{"causal": "no"}, {"causal": None}, {"causal": 1}])
def test_switches_are_checked(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
        opened(nn.Sequential(nn.Linear(3, 4)), "0", **options)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_factors_of_covariances_are_no_sign_of_causality(covariance):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    insert_em_operators(model, ["0", "2"], 2, covariance=covariance, verbose=False)  # each sees the other's, too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 7, 6))

    class Past(nn.Module):
        def forward(self, x):
            return torch.ones(x.shape[1], x.shape[1]).tril() @ x

    model = nn.Sequential(nn.Linear(6, 5), Past())
    insert_em_operators(model, "0", 2, covariance=covariance, verbose=False)
    with pytest.warns(UserWarning, match="'0' fits one mixture to all positions.*sums over earlier positions"):
        model(torch.randn(2, 7, 6))
