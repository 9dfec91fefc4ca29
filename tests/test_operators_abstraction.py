"""Sets to tokens: bumps against a plain loop, invariance, masks, gradients."""

import math
import pickle

import pytest
import torch

from em_lightning.operators import EMAbstraction, EMOperator, EMRefinement
from em_lightning.operators.abstraction import bumps, counts


@pytest.mark.parametrize("features", [1, 2, 3])
def test_bumps_are_gaussians_on_a_lattice(features):
    torch.manual_seed(0)
    x, centers = torch.randn(2, 5, features).double(), torch.randn(2, 3, features).double()
    places = [(i - 1) * 0.5 for i in range(3)]
    lattice = torch.cartesian_prod(*[torch.tensor(places)] * features).reshape(-1, features)
    found = bumps(x, centers, 3, 0.5)
    assert found.shape == (2, 3, 3**features, 5)
    for b, k, j, n in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        square = ((x[b, n] - centers[b, k] - lattice[j]) ** 2).sum().item() / 0.25
        assert math.isclose(found[b, k, j, n], math.exp(-square), rel_tol=1e-9, abs_tol=2e-7)
    torch.testing.assert_close(counts(x, centers, 3, 0.5), found.sum(-1))


def two_levels(**options):
    torch.manual_seed(0)
    first = EMAbstraction(6, 2, None, 8, pitch=0.4, grid=5, blocks=1, **options)
    second = EMAbstraction(3, 2, 8, 12, pitch=0.8, blocks=1, **options)
    return first, second


def clouds():
    x = torch.randn(4, 30, 2, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(30) < torch.tensor([[30], [11], [25], [0]])


@pytest.mark.parametrize("init", ["learned", "farthest"])
def test_order_and_padding_play_no_part(init):
    first, second = (level.eval() for level in two_levels(init=init))
    x, mask = clouds()
    centers, tokens = first(x, mask=mask)
    assert centers.shape == (4, 6, 2) and tokens.shape == (4, 6, 8) and tokens.isfinite().all()
    torch.testing.assert_close(first(x.flip(1), mask=mask.flip(1))[1], tokens)
    torch.testing.assert_close(first(torch.where(mask.unsqueeze(-1), x, torch.nan), mask=mask)[1], tokens)
    torch.testing.assert_close(first(x[1:2, :11])[1], tokens[1:2])
    features = torch.randn(4, 30, 8)
    pooled = second(x, features, mask)[1]
    padded = torch.where(mask.unsqueeze(-1), features, torch.nan)
    torch.testing.assert_close(second(x, padded, mask)[1], pooled)
    torch.testing.assert_close(second(x[1:2, :11], features[1:2, :11])[1], pooled[1:2])


def test_padding_counts_nothing_in_one_dimension():
    x, mask = torch.randn(1, 5000, 1).double(), torch.arange(5000)[None] < 3
    level = EMAbstraction(2, 1, None, 4, pitch=0.4).double().eval()
    torch.testing.assert_close(level(x, mask=mask)[1], level(x[:, :3])[1], rtol=1e-12, atol=1e-12)


def test_tokens_are_sums_over_bumps_around_the_means_of_em():
    level = EMAbstraction(3, 2, 4, 5, pitch=0.7, init="farthest", num_iters=3).eval()
    x, _ = clouds()
    features = torch.randn(4, 30, 4)
    operator = EMOperator(
        3,
        2,
        num_iters=3,
        covariance="spherical",
        residual=False,
        prior={"mean_strength": 0.0, "covariance_strength": 1.0},
    )
    means = operator(x).means
    summed = torch.einsum("bkjn,bnf->bkjf", bumps(x, means, 3, 0.7), features).flatten(2)
    norm = level.embed.norm
    expected = (summed @ level.embed.linear.weight.T / (1 + norm.eps) ** 0.5).relu()
    centers, tokens = level(x, features)
    torch.testing.assert_close(centers, means)
    torch.testing.assert_close(tokens, expected)


def test_features_have_gradients_and_the_template_has_none():
    first, second = two_levels()
    x, mask = clouds()
    second(*first(x, mask=mask))[1].square().sum().backward()
    for name, value in [*first.named_parameters(), *second.named_parameters()]:
        assert value.requires_grad != name.startswith("operator."), name
        assert not value.requires_grad or value.grad.abs().sum() > 0, name
    copy = pickle.loads(pickle.dumps(first.eval()))
    torch.testing.assert_close(copy(x)[1], first(x)[1])
    with torch.autocast("cpu", torch.bfloat16):
        low = first(x)
    assert low[0].dtype == torch.float32
    torch.testing.assert_close(low[1].float(), first(x)[1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"grid": 0}, "grid=0 must be at least 1"),
        ({"pitch": 0.0}, "pitch=0.0 must be positive, in units of the coordinates"),
        ({"inner_pitch": -1.0}, "inner_pitch=-1.0 must be positive"),
        ({"blocks": -1}, "blocks=-1 must not be negative"),
        ({"out_features": 0}, "out_features=0 must be at least 1"),
    ],
)
def test_mistakes_are_answered(arguments, words):
    with pytest.raises(ValueError, match=words):
        EMAbstraction(3, 2, None, **{"out_features": 4, "pitch": 1.0, **arguments})


def test_features_that_are_not_expected_are_answered():
    first, second = two_levels()
    x, _ = clouds()
    with pytest.raises(ValueError, match="features have 3 columns; the abstraction was made for None"):
        first(x, torch.zeros(4, 30, 3))
    with pytest.raises(ValueError, match="features have None columns; the abstraction was made for 8"):
        second(x)


@pytest.mark.parametrize("shape, dim", [((4,), -1), ((2, 5, 4), -1), ((2, 5, 4), 2)])
def test_a_refinement_names_the_shape_that_it_wants(shape, dim):
    layer = EMRefinement(2, 3, dim=dim)
    with pytest.raises(ValueError) as caught:
        layer(torch.zeros(shape))
    assert f"x has shape {shape}; give at least two axes, with 3 features along dim={dim}" in str(caught.value)
