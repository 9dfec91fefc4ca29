"""Sets to tokens: Gaussians on a lattice against their formula, invariance, masks, gradients."""

import pickle

import pytest
import torch
from helpers import assert_raises

from em_lightning.operators import EMAbstraction, EMOperator, EMRefinement


def bumps(x, centers, grid, pitch):
    """Return Gaussians on a lattice around each center, written out: (B, K, J, N)."""
    features = x.shape[-1]
    axis = [(i - (grid - 1) / 2) * pitch for i in range(grid)]
    lattice = torch.cartesian_prod(*[torch.tensor(axis, dtype=x.dtype)] * features).reshape(-1, features)
    places = centers.unsqueeze(2) + lattice
    return (-(places.unsqueeze(3) - x[:, None, None]).square().sum(-1) / pitch**2).exp()


@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("features", [1, 2, 3])
def test_tokens_without_features_count_the_items_on_a_lattice(features, grid):
    x = torch.randn(2, 9, features).double()
    level = EMAbstraction(3, features, None, 4, pitch=0.7, grid=grid, init="farthest").double().eval()
    centers, tokens = level(x)
    counts = bumps(x, centers, grid, 0.7).sum(-1) / 9
    scaled = level.scale(counts.flatten(0, 1))
    expected = (scaled @ level.embed[0].weight.T / (1 + level.embed[1].eps) ** 0.5).relu().view_as(tokens)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)


def two_levels(**options):
    torch.manual_seed(0)
    first = EMAbstraction(6, 2, None, 8, pitch=0.4, grid=5, blocks=1, **options)
    second = EMAbstraction(3, 2, 8, 12, pitch=0.8, blocks=1, **options)
    return first, second


def sets():
    x = torch.randn(4, 30, 2, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(30) < torch.tensor([[30], [11], [25], [0]])


@pytest.mark.parametrize("init", ["learned", "farthest"])
def test_invariant_to_order_and_padding(init):
    first, second = (level.eval() for level in two_levels(init=init))
    x, mask = sets()
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


def test_padding_does_not_count_in_one_dimension():
    x, mask = torch.randn(1, 5000, 1).double(), torch.arange(5000)[None] < 3
    level = EMAbstraction(2, 1, None, 4, pitch=0.4).double().eval()
    torch.testing.assert_close(level(x, mask=mask)[1], level(x[:, :3])[1], rtol=1e-12, atol=1e-12)


def test_tokens_are_sums_over_bumps_around_the_means_of_em():
    level = EMAbstraction(3, 2, 4, 5, pitch=0.7, init="farthest", num_iters=3).eval()
    x, _ = sets()
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
    norm = level.embed[1]
    expected = (summed @ level.embed[0].weight.T / (1 + norm.eps) ** 0.5).relu()
    centers, tokens = level(x, features)
    torch.testing.assert_close(centers, means)
    torch.testing.assert_close(tokens, expected)


def test_features_have_gradients_and_the_template_has_none():
    first, second = two_levels()
    x, mask = sets()
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
        ({"grid": 0}, "grid=0"),
        ({"pitch": 0.0}, "pitch=0.0"),
        ({"inner_pitch": -1.0}, "inner_pitch=-1.0"),
        ({"blocks": -1}, "blocks=-1"),
        ({"out_features": 0}, "out_features=0"),
    ],
)
def test_wrong_arguments_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        EMAbstraction(3, 2, None, **{"out_features": 4, "pitch": 1.0, **arguments})


def test_unexpected_or_missing_features_raise():
    first, second = two_levels()
    x, _ = sets()
    with pytest.raises(ValueError, match="features.* 3 .*None"):
        first(x, torch.zeros(4, 30, 3))
    with pytest.raises(ValueError, match="features.*None.* 8"):
        second(x)


@pytest.mark.parametrize("shape, dim", [((4,), -1), ((2, 5, 4), -1), ((2, 5, 4), 2)])
def test_wrong_shapes_of_a_refinement_raise(shape, dim):
    layer = EMRefinement(2, 3, dim=dim)
    assert_raises(ValueError, ["x", str(shape), f"dim={dim}"], lambda: layer(torch.zeros(shape)))


def test_a_refinement_keeps_the_dtype():
    x = torch.randn(2, 6, 3, dtype=torch.bfloat16)  # its parameters are float32, as under autocast
    assert EMRefinement(2, 3)(x).dtype == torch.bfloat16
