"""Initial centers: farthest points, k-means++ and random points, as functions of the points."""

import pytest
import torch
from helpers import clusters, two_clusters

from em_lightning.mixture.initialization import farthest_points, kmeans_plus_plus, random_points


def test_farthest_points_equal_gonzalez():
    x = clusters(1, 50, 3)
    points = x[0]
    chosen = [(points - points.mean(0)).norm(dim=1).argmax().item()]
    while len(chosen) < 6:
        chosen.append(torch.cdist(points, points[chosen]).amin(1).argmax().item())
    torch.testing.assert_close(farthest_points(x, 6)[0], points[chosen])


@pytest.mark.parametrize("draw", [kmeans_plus_plus, random_points])
def test_random_centers_are_seeded_points_of_the_set(draw):
    x = clusters(3, 40, 3)
    mask = torch.arange(40).expand(3, -1) < torch.tensor([[40], [20], [3]])
    dirty = x.masked_fill(~mask.unsqueeze(-1), 1e6)
    one, two = (draw(dirty, 5, mask.to(x), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    for b, count in enumerate([40, 20, 3]):
        distances = torch.cdist(one[b], x[b, :count])
        assert distances.amin(1).max() < 1e-6
        if count >= 5:
            assert len(distances.argmin(1).unique()) == 5


@pytest.mark.parametrize("draw", [kmeans_plus_plus, random_points, farthest_points])
def test_points_of_zero_weight_are_not_chosen_as_centers(draw):
    x = clusters(3, 40, 3)
    weights = torch.rand(3, 40, dtype=x.dtype) * (torch.arange(40) % 4 == 0) * torch.tensor([[1.0], [1e-3], [1e-6]])
    options = {} if draw is farthest_points else {"generator": torch.Generator().manual_seed(1)}
    found = draw(x, 5, weights=weights, **options)
    for b in range(3):
        nearest = torch.cdist(found[b], x[b]).min(1)
        assert nearest.values.max() < 1e-6 and (nearest.indices % 4 == 0).all()


@pytest.mark.parametrize("draw", [kmeans_plus_plus, random_points, farthest_points])
def test_sets_with_too_few_points_have_finite_centers(draw):
    for x, weights in (
        (torch.ones(1, 8, 2), None),
        (torch.randn(1, 2, 2), None),
        (torch.randn(1, 8, 2), torch.zeros(1, 8)),
    ):
        found = draw(x, 4, weights)
        assert found.shape == (1, 4, 2) and found.isfinite().all()


def test_kmeans_plus_plus_finds_separated_clusters():
    centers = torch.tensor([[0.0, 0], [100, 0], [0, 100], [100, 100]])
    x = (centers.repeat_interleave(25, 0) + torch.randn(100, 2))[None].expand(20, -1, -1)
    cells = torch.cdist(kmeans_plus_plus(x, 4), centers.expand(20, -1, -1)).argmin(-1).sort(-1).values
    assert torch.equal(cells, torch.arange(4).expand(20, -1))


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_plus_plus_lowers_the_total_distance_more_than_random_points(weighted):
    """Each draw keeps the best of several candidates, weighted by the distance to the centers before it."""
    x = clusters(50, 60)
    weights = torch.rand(50, 60, dtype=torch.float64) if weighted else torch.ones(50, 60, dtype=torch.float64)
    totals = [
        (torch.cdist(x, draw(x, 8, weights=weights)).square().amin(-1) * weights).sum().item()
        for draw in (kmeans_plus_plus, random_points)
    ]
    assert totals[0] < 0.8 * totals[1]


def test_points_of_zero_weight_do_not_move_centers():
    x = two_clusters(2, 60)
    padded = torch.cat([x, torch.full((2, 5, 2), 1e6).double()], 1)
    weights = (torch.arange(65).expand(2, -1) < 60).double()
    centers = farthest_points(x, 3)
    torch.testing.assert_close(farthest_points(padded, 3, weights), centers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_do_not_depend_on_padding_or_precision(dtype):
    x = clusters(3, 50, 2)
    expected = kmeans_plus_plus(x, 6, generator=torch.Generator().manual_seed(2))
    padded, mask = torch.cat([x, torch.full((3, 20, 2), 1e3).to(x)], 1).to(dtype), torch.arange(70).expand(3, -1) < 50
    found = kmeans_plus_plus(padded, 6, mask.to(dtype), torch.Generator().manual_seed(2))
    torch.testing.assert_close(found.to(x), expected)


def test_first_center_is_drawn_in_proportion_to_the_weights():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 6.0, 0.0])
    x = torch.arange(6.0).expand(4000, -1).unsqueeze(-1)
    first = kmeans_plus_plus(x, 1, weights.expand(4000, -1), torch.Generator().manual_seed(0)).flatten()
    counts = torch.bincount(first.long(), minlength=6) / len(first)
    torch.testing.assert_close(counts, weights / weights.sum(), atol=0.03, rtol=0.0)
    assert (counts[weights == 0] == 0).all()


@pytest.mark.parametrize("choose", [kmeans_plus_plus, farthest_points])
def test_distances_that_overflow_give_points_of_the_set(choose):
    x = 1e30 * torch.randn(2, 20, 3)
    found = choose(x, 4)
    assert (torch.cdist(found.double(), x.double()).amin(-1) == 0).all()
