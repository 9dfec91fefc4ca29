"""Set pooling and the PyG aggregation."""

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.nn import MLP, EdgeConv, GINConv, GraphSAGE, PointNetConv, SAGEConv
from torch_geometric.nn.aggr import MeanAggregation, MultiAggregation
from torch_geometric.nn.resolver import aggregation_resolver
from torch_geometric.utils import to_dense_batch

from em_lightning import EMOperator
from em_lightning.mixture.backends import native, use_backend
from em_lightning.operators import EMAbstraction, EMAggregation, EMPooling, EMRefinement, register_aggregation

SUMMARIES = ("weights", "means", "scales", "values")


def sets(sizes=(7, 3, 0, 12), features=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(sizes), max(sizes), features, generator=generator, dtype=torch.float64)
    return x, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


def pooling(**arguments):
    torch.manual_seed(1)
    return EMPooling(2, 3, **{"summary": SUMMARIES, "residual": False, **arguments}).double()


@pytest.mark.parametrize("covariance", ["diag", "spherical", "full", "tied"])
@pytest.mark.parametrize("init", ["learned", "farthest"])
def test_vectors_have_out_features_and_are_invariant_to_order_and_padding(covariance, init):
    pool = pooling(covariance=covariance, init=init, out_features=None)
    x, mask = sets()
    vectors = pool(x, mask)
    assert vectors.shape == (4, pool.out_features) and vectors.isfinite().all()
    torch.testing.assert_close(pool(x.flip(1), mask.flip(1)), vectors)
    torch.testing.assert_close(pool(torch.where(mask.unsqueeze(-1), x, torch.nan), mask), vectors)
    torch.testing.assert_close(pool(x[:1, :7]), vectors[:1])


def test_the_parts_of_a_summary_equal_their_formulas():
    pool = pooling(init="farthest")
    x, mask = sets((9,))
    mixture = pool.operator(x)
    r = mixture.posterior(x).responsibilities[0]
    expected = []
    for k in range(2):
        share = r[:, k] / r[:, k].sum()
        mean = (share[:, None] * x[0]).sum(0)
        parts = [mixture.weights[0, k : k + 1], mixture.means[0, k], mixture.covariances[0, k].log() / 2]
        expected += [*parts, mean]
    torch.testing.assert_close(pool(x, mask)[0], torch.cat(expected))


def test_coordinates_give_the_responsibilities_of_the_features():
    pool = EMPooling(2, 5, num_coordinates=3, summary=("weights", "values"), init="farthest", residual=False).double()
    x, mask = sets((9, 6))
    features = torch.randn(2, 9, 5, dtype=torch.float64)
    r = pool.operator(x, mask).posterior(x).responsibilities * mask[..., None]
    values = r.mT @ features / r.sum(1)[..., None]
    found = pool(features, mask, coordinates=x).reshape(2, 2, 6)
    torch.testing.assert_close(found[..., 1:], values)
    padded = (torch.where(mask.unsqueeze(-1), part, torch.nan) for part in (features, x))
    torch.testing.assert_close(pool(next(padded), mask, coordinates=next(padded)).reshape(2, 2, 6), found)
    with pytest.raises(ValueError, match="coordinates"):
        pool(features, mask)


def test_weights_count_as_repetitions():
    pool = pooling(init="learned")
    x, _ = sets((4,))
    repeated = x[:, [0, 0, 1, 2, 3, 3, 3]]
    torch.testing.assert_close(pool(x, weights=torch.tensor([[2.0, 1.0, 1.0, 3.0]]).double()), pool(repeated))


def test_gradients_and_copies():
    pool = EMPooling(3, 3, head_features=2, out_features=5, summary=("weights", "means", "values"))
    x, mask = sets()
    x = x.float().requires_grad_()
    vectors = pool(x, mask)
    assert vectors.shape == (4, 5) and pool.out_features == 5
    vectors.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad[~mask] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pool.parameters())
    assert pool.project.weight.grad.abs().sum() > 0
    torch.testing.assert_close(copy.deepcopy(pool)(x, mask), vectors)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pool(x, mask), vectors)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"summary": ("weights", "mean")},
            r"summary=\('weights', 'mean'\)",
        ),
        ({"summary": ("means", "means")}, "summary="),
        ({"num_coordinates": 2, "head_features": 2}, "num_coordinates=2"),
    ],
)
def test_wrong_arguments_are_reported(arguments, words):
    with pytest.raises(ValueError, match=words):
        EMPooling(2, 3, **arguments)


def test_items_of_another_size_are_reported():
    with pytest.raises(ValueError, match=r"x.*\(2, 3\)"):
        EMPooling(2, 3)(torch.zeros(2, 3))


# PyG


def ragged(seed=0):
    x, mask = sets(seed=seed)
    return x[mask], mask.nonzero()[:, 0], x, mask


@pytest.mark.parametrize("arguments", [{}, {"in_channels": 3, "out_channels": 4}])
def test_ragged_equals_dense_in_any_order(arguments):
    torch.manual_seed(0)
    aggregation = EMAggregation(2, **arguments).double()
    rows, index, x, mask = ragged()
    found = aggregation(rows, index, dim_size=4)
    assert found.isfinite().all() and (found[2] == 0).all()  # the empty group
    for group in mask.any(1).nonzero()[:, 0]:
        torch.testing.assert_close(found[group], aggregation(rows[index == group])[0])
    if aggregation.pooling is not None:
        torch.testing.assert_close(found[mask.any(1)], aggregation.pooling(x, mask)[mask.any(1)])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(aggregation(rows[order], index[order], dim_size=4), found)
    ptr = torch.tensor([0, 7, 10, 10, 22])
    torch.testing.assert_close(aggregation(rows, ptr=ptr), found)
    torch.testing.assert_close(aggregation(rows, index=index, ptr=ptr), found)
    torch.testing.assert_close(aggregation(rows[:7]), found[:1])
    torch.testing.assert_close(aggregation(rows, index, dim=0, dim_size=4), found)
    several = torch.stack([rows, 2 * rows])
    torch.testing.assert_close(aggregation(several, index, dim_size=4, dim=1)[0], found)
    with pytest.raises(ValueError, match="dim_size"):
        aggregation(rows, index, dim_size=2)
    assert aggregation(rows[:0], index[:0], dim_size=2).shape == (2, found.shape[1])


def test_an_untrained_aggregation_is_the_mean():
    rows, index, *_ = ragged()
    expected = MeanAggregation()(rows, index, dim_size=4)
    torch.testing.assert_close(EMAggregation(3).double()(rows, index, dim_size=4), expected)


def test_a_large_coefficient_of_the_weights_excludes_outliers():
    rows = torch.cat([torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 0.1, torch.full((2, 2), 50.0)])
    aggregation = EMAggregation(2, num_iters=5)
    with torch.no_grad():
        aggregation.by_weight.fill_(20.0)
    torch.testing.assert_close(aggregation(rows)[0], rows[:20].mean(0), rtol=0, atol=1e-4)
    assert (rows.mean(0) > 4).all()
    aggregation.reset_parameters()
    torch.testing.assert_close(aggregation(rows)[0], rows.mean(0))


def graph():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    edges = torch.randint(8, (2, 30), generator=torch.Generator().manual_seed(4))  # node 8 is alone
    return x, edges, torch.randn(9, 3, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SAGEConv(4, 6, aggr="em"),
        lambda: GINConv(nn.Linear(4, 6), aggr="em"),
        lambda: EdgeConv(MLP([8, 6]), aggr="em"),
        lambda: GraphSAGE(4, 5, 2, 6, aggr="em"),
        lambda: SAGEConv(4, 6, aggr=["em", "max"]),
        lambda: SAGEConv(4, 6, aggr="em", aggr_kwargs={"num_components": 3}),
    ],
    ids=["sage", "gin", "edge", "graphsage", "multi", "kwargs"],
)
def test_em_as_the_aggregation_of_a_convolution(make, monkeypatch):
    import torch_geometric.nn.aggr

    register_aggregation()
    monkeypatch.setattr(torch_geometric.nn.aggr, "EMAggregation", EMAggregation)
    torch.manual_seed(0)
    conv, (x, edges, _) = make(), graph()
    x.requires_grad_()
    out = conv(x, edges)
    assert out.shape == (9, 6) and out.isfinite().all()
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert any("by_weight" in name and p.grad is not None for name, p in conv.named_parameters())
    shuffled = edges[:, torch.randperm(30, generator=torch.Generator().manual_seed(6))]
    torch.testing.assert_close(conv(x, shuffled), out, rtol=1e-4, atol=1e-5)


def test_pointnet_and_the_resolver():
    register_aggregation()
    x, edges, position = graph()
    conv = PointNetConv(MLP([7, 6]), aggr="em")
    out = conv(x, position, edges)
    assert out.shape == (9, 6) and out.isfinite().all()
    assert isinstance(aggregation_resolver("em"), EMAggregation)
    several = MultiAggregation(["mean", EMAggregation(2)])
    assert several(x, torch.tensor([0, 0, 1, 1, 1, 1, 3, 3, 3]), dim_size=4).shape == (4, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"out_channels": 3}, "in_channels=None.*out_channels=3"),
        ({"summary": ("means",)}, "summary.*out_channels"),
        ({"components": 2}, "components"),
        ({"num_iters": -1}, "num_iters=-1"),
    ],
)
def test_wrong_aggregations_are_reported(arguments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        EMAggregation(2, **arguments)


def padded_layout(aggregation, rows, index, num_groups):
    """Return the result of one EMOperator on groups padded to the largest."""
    order = index.argsort(stable=True)
    x, mask = to_dense_batch(rows[order], index[order], batch_size=num_groups)
    operator = EMOperator(
        aggregation.num_components,
        rows.shape[-1],
        num_iters=aggregation.num_iters,
        covariance="spherical",
        residual=False,
        prior={"mean_strength": 0.0, "covariance_strength": 1.0},
    )
    mixture = operator(x, mask)
    scores = aggregation.by_weight * mixture.log_weights - aggregation.by_scale * mixture.covariances.log() / 2
    means = (scores.softmax(-1).unsqueeze(1) @ mixture.means).squeeze(1)
    return torch.where(mask.any(1, keepdim=True), means, 0.0)


@pytest.mark.parametrize("components", [1, 2, 4])
@pytest.mark.parametrize("features", [1, 3, 7, 16, 19])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_groups_of_any_size_equal_the_padded_layout(components, features, backend):
    generator = torch.Generator().manual_seed(components)
    sizes = [1, 2, 0, 3, 4, 5, 7, 8, 0, 15, 16, 17, 33, 90, 2]
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = 3 + torch.randn(len(index), features, generator=generator, dtype=torch.float64)
    rows[index == 4], rows[index == 13] = 1.5, rows[index == 13].round()  # one point, and duplicates
    order = torch.randperm(len(index), generator=generator)
    rows, index = rows[order].requires_grad_(), index[order]
    aggregation = EMAggregation(components, num_iters=2).double()
    with torch.no_grad():
        aggregation.by_weight.fill_(2.0), aggregation.by_scale.fill_(-0.5)
    expected = padded_layout(aggregation, rows, index, len(sizes))
    with use_backend(backend):
        found = aggregation(rows, index)
        single = aggregation(rows.float(), index)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs = (rows, aggregation.by_weight, aggregation.by_scale)
    gradients = [torch.autograd.grad(y.sin().sum(), inputs, retain_graph=True) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    rounded = rows.detach().float().requires_grad_()
    expected = padded_layout(aggregation, rounded.double(), index, len(sizes))
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("offset", "size"), [(1e6, 1.0), (0.0, 1e8), (0.0, 1e-8), (0.0, 1e150)])
@pytest.mark.parametrize("num_iters", [0, 3])
def test_groups_of_any_scale(offset, size, num_iters):
    index = torch.tensor([0] * 40 + [1] * 3)
    rows = offset + size * torch.randn(43, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    aggregation = EMAggregation(3, num_iters=num_iters).double()
    with torch.no_grad():
        aggregation.by_weight.fill_(2.0)
    found, expected = aggregation(rows, index), padded_layout(aggregation, rows, index, 2)
    torch.testing.assert_close(found / size, expected / size, rtol=1e-9, atol=1e-9)


def test_the_groups_of_an_exported_program_are_fitted_by_the_native_operator():
    rows, index = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4
    if not native.fits_groups(rows):
        pytest.skip("there is no compiler")
    program = torch.export.export(EMAggregation(2), (rows, index), {"dim_size": 4})
    assert "em_lightning.fit_groups.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(rows, index, dim_size=4), EMAggregation(2)(rows, index, dim_size=4))


def exported(aggregation, rows, index):
    program = torch.export.export(aggregation, (rows, index), {"dim_size": 4})
    return lambda rows, index: program.module()(rows, index, dim_size=4)


def compiled(aggregation, rows, index):
    torch.compiler.reset()
    return torch.compile(lambda rows, index: aggregation(rows, index, dim_size=4), fullgraph=True, backend="aot_eager")


def traced(aggregation, rows, index):
    function = lambda rows, index: aggregation(rows, index, dim_size=4)  # noqa: E731
    return torch.jit.trace(function, (rows, index), check_trace=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [exported, compiled, traced])
@pytest.mark.parametrize("arguments", [{}, {"num_components": 3, "num_iters": 1}])
def test_an_aggregation_without_python_equals_eager(make, arguments):
    def example(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(30, 2, generator=generator), torch.randint(4, (30,), generator=generator)

    rows, index = example(0)
    if not native.fits_groups(rows):
        pytest.skip("there is no compiler")
    aggregation = EMAggregation(**arguments).eval()
    for parameter in aggregation.parameters():
        parameter.requires_grad_(False)
    program = make(aggregation, rows, index)
    others = example(1)  # groups of other sizes
    torch.testing.assert_close(program(*others), aggregation(*others, dim_size=4), rtol=1e-5, atol=1e-5)


def test_second_derivatives_and_transforms_of_an_aggregation():
    index = torch.tensor([0, 0, 0, 1, 1, 2] + [3] * 18)
    rows = torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    aggregation = EMAggregation(2, num_iters=1).double()
    with torch.no_grad():
        aggregation.by_weight.fill_(2.0)
    scores = [
        torch.autograd.grad(means.square().sum(), rows, create_graph=True)[0]
        for means in (aggregation(rows, index), padded_layout(aggregation, rows, index, 4))
    ]
    seconds = [torch.autograd.grad(score.square().sum(), rows)[0] for score in scores]
    torch.testing.assert_close(*seconds, rtol=1e-8, atol=1e-8)

    def total(x):
        return aggregation(x, index, dim_size=4).square().sum()

    torch.testing.assert_close(torch.func.grad(total)(rows.detach()), scores[0])
    direction = torch.ones_like(rows)
    slope = torch.func.jvp(total, (rows.detach(),), (direction,))[1]
    torch.testing.assert_close(slope, (scores[0] * direction).sum())
    pairs = torch.stack([rows, 2 * rows]).detach()
    each = torch.func.vmap(torch.func.grad(total))(pairs)
    torch.testing.assert_close(each[0], scores[0])


def test_a_hub_of_many_rows_costs_no_more_than_its_rows():
    # Padded to the hub, the groups would take 3 GB.
    index = torch.cat([torch.zeros(20_000, dtype=torch.long), torch.arange(1, 20_000)])
    rows = torch.randn(len(index), 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    means = EMAggregation(2)(rows, index)
    torch.testing.assert_close(means, MeanAggregation()(rows, index), rtol=0, atol=1e-5)
    means.sum().backward()
    torch.testing.assert_close(rows.grad[-1], torch.ones(2))


@pytest.mark.parametrize("shape", [(6,), (6, 3), (2, 6, 3), (2, 2, 6, 3)])
def test_every_axis_of_rows_and_heads(shape):
    aggregation, index = EMAggregation(2, num_iters=2).double(), torch.tensor([2, 0, 2, 2, 0, 2])
    with torch.no_grad():
        aggregation.by_weight.fill_(3.0)
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = x.movedim(max(len(shape) - 2, 0), 0)
    expected = torch.stack(
        [
            aggregation(part, index, dim_size=4)
            for part in rows.reshape(6, -1, shape[-1] if len(shape) > 1 else 1).unbind(1)
        ],
        1,
    ).reshape(4, *rows.shape[1:])
    for dim in range(len(shape)):
        found = aggregation(rows.movedim(0, dim), index, dim_size=4, dim=dim)
        torch.testing.assert_close(found, expected.movedim(0, dim))
        torch.testing.assert_close(aggregation(rows.movedim(0, dim), index, dim_size=4, dim=dim - len(shape)), found)
        assert found.shape == MeanAggregation()(rows.movedim(0, dim), index, dim_size=4, dim=dim).shape


@pytest.mark.parametrize("arguments", [{}, {"in_channels": 3, "out_channels": 4, "head_features": 2}])
def test_no_rows_give_zeros_and_zero_gradients(arguments):
    aggregation, x = EMAggregation(2, **arguments), torch.zeros(0, 3, requires_grad=True)
    out = aggregation(x, torch.zeros(0, dtype=torch.long), dim_size=5)
    out.sum().backward()
    assert not out.any() and x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in aggregation.parameters())
    assert aggregation(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape[0] == 0


def test_max_num_elements_drops_the_last_rows_of_a_group():
    rows, index, *_ = ragged()
    aggregation = EMAggregation(2).double()
    kept = torch.cat([(index == group).nonzero()[:4, 0] for group in range(4)])
    expected = aggregation(rows[kept], index[kept], dim_size=4)
    torch.testing.assert_close(aggregation(rows, index, dim_size=4, max_num_elements=4), expected)
    torch.testing.assert_close(
        aggregation(rows, index, dim_size=4, max_num_elements=100), aggregation(rows, index, dim_size=4)
    )
    assert not aggregation(rows, index, dim_size=4, max_num_elements=0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_of_half_precision(dtype):
    x, mask = sets()
    x = x.to(dtype).requires_grad_()
    modules = [
        EMPooling(2, 3, head_features=2, out_features=5),
        EMRefinement(2, 3),
        EMAbstraction(2, 3, None, 4, pitch=0.5, blocks=1),
        EMAbstraction(2, 3, 3, 4, pitch=0.5),
        EMAggregation(2, in_channels=3, out_channels=4),
    ]
    for module, inputs in zip(modules, [(x, mask), (x,), (x,), (x, x), (x[mask],)], strict=True):
        out = module.to(dtype)(*inputs)
        out = out[-1] if isinstance(out, tuple) else out
        assert out.dtype == dtype and out.isfinite().all()
        out.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_one_item_is_pooled_beside_a_background():
    x = torch.randn(3, 1, 2)
    assert EMPooling(2, 2, summary=("weights", "values"), background=0.1)(x).isfinite().all()


@pytest.mark.parametrize(
    ("x", "index", "error", "words"),
    [
        (torch.ones(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long), TypeError, "x.*int64"),
        (torch.ones(4, 2), torch.zeros(4), TypeError, "index.*float32.*int64"),
        (torch.ones(4, 2), torch.zeros(3, dtype=torch.long), ValueError, r"index \(3,\).*4 rows"),
    ],
)
def test_wrong_rows_are_reported(x, index, error, words):
    with pytest.raises(error, match=words):
        EMAggregation(2)(x, index, dim_size=1)


def test_masks_and_weights_of_another_shape_are_reported():
    x, mask = sets()
    with pytest.raises(ValueError, match=r"mask.*\(4, 11\).*\(4, 12\)"):
        pooling()(x, mask[:, 1:])
    with pytest.raises(ValueError, match=r"weights.*\(3, 12\).*\(4, 12\)"):
        pooling()(x, weights=mask[1:].double())


@pytest.mark.parametrize("channels", [{}, {"in_channels": 3, "out_channels": 5, "head_features": 4}])
def test_reset_parameters_restores_the_start(channels):
    torch.manual_seed(1)
    aggregation = EMAggregation(2, **channels)
    torch.manual_seed(1)
    fresh = EMAggregation(2, **channels)
    with torch.no_grad():
        for parameter in aggregation.parameters():
            parameter.add_(3.0)
    torch.manual_seed(1)
    aggregation.reset_parameters()
    for (name, one), two in zip(aggregation.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_set_of_zero_weight_has_finite_gradients():
    x = torch.full((1, 2, 1), 1.5e5, requires_grad=True)
    EMPooling(1, 1, summary=["scales", "values"])(x, weights=torch.zeros(1, 2)).sum().backward()
    assert x.grad.isfinite().all()


EDGES, NONE = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 2]]), torch.empty(2, 0, dtype=torch.long)
STEPS = ((EDGES, EDGES), (NONE, EDGES), (EDGES, NONE), (NONE, NONE), (EDGES, EDGES))  # edges of either process


def convolution(arguments):
    torch.manual_seed(0)
    return SAGEConv(8, 4, aggr=EMAggregation(2, **arguments)).double()


def gradient_of(conv, edges):
    conv.zero_grad()
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    conv(x, edges).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in conv.parameters()])


def gradients_on_a_rank(rank, arguments):
    conv = DistributedDataParallel(convolution(arguments))
    return [gradient_of(conv, edges[rank]).clone() for edges in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"in_channels": 8, "out_channels": 8, "residual": False}])
def test_a_batch_without_edges_does_not_stop_data_parallel_training(arguments, tmp_path):
    conv = convolution(arguments)
    expected = [torch.stack([gradient_of(conv, edges).clone() for edges in pair]).mean(0) for pair in STEPS]
    for found in run_ranks(gradients_on_a_rank, arguments, folder=tmp_path):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments", [{}, {"in_channels": 2, "out_channels": 3}])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hubs_cost_no_more_than_their_rows_with_any_summary(arguments, backend):
    """Padded to the largest hub, the groups would take 3 GB."""
    sizes = torch.tensor([9000, 3, 4000] + [2] * 20_000)
    index = torch.arange(len(sizes)).repeat_interleave(sizes)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(index), 2, dtype=torch.float64, generator=generator).requires_grad_()
    aggregation = EMAggregation(2, **arguments).double()
    with use_backend(backend):
        found = aggregation(rows, index)
        found.sum().backward()
        for group in (0, 1, 2, 20_002):
            alone = aggregation(rows.detach()[index == group])
            torch.testing.assert_close(found[group], alone[0], rtol=1e-6, atol=1e-6)
    assert rows.grad.isfinite().all()
