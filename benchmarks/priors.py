"""Held-out likelihood of small sets by the strength of the prior on the covariances.

    python -m benchmarks.priors [--sets 200]

Blobs: 3 to 5 Gaussian clusters per set with three features, centers at least 3, 6 or 12 apart, and random covariances
of mean variance .76, a standard deviation of .87. They are fitted with K = 4, the mean number of clusters. Surfaces:
generated ones with noise of .02 of the radius, fitted with K = 8 (chosen). The printed table has the median over the
sets of the log-likelihood per held-out point, and in parentheses the share of the sets that are better than without a
prior. All fits start from the best of four k-means++ starts.
"""

import argparse

import torch

from em_lightning import EMOperator
from em_lightning.studies import ProceduralSurfaces

FEATURES, HELD_OUT, SIZES = 3, 200, (40, 100, 200)  # features, held-out points per set, points per set
STRENGTHS = (None, 0.03, 0.1, 0.3, 1.0, 3.0)


def blobs(sets, points, distance):
    """Return points and held-out points (B, N, D) of clusters whose centers are at least ``distance`` apart."""
    generator = torch.Generator().manual_seed(points)
    found = []
    for _ in range(sets):
        count = int(torch.randint(3, 6, (), generator=generator))
        centers = torch.zeros(count, FEATURES)
        while torch.pdist(centers).min() < distance:
            centers = 4 * distance * (torch.rand(count, FEATURES, generator=generator) - 0.5)
        factors = 0.7 * torch.eye(FEATURES) + 0.3 * torch.randn(count, FEATURES, FEATURES, generator=generator)
        which = torch.randint(count, (points + HELD_OUT,), generator=generator)
        noise = torch.randn(points + HELD_OUT, FEATURES, 1, generator=generator)
        found.append(centers[which] + (factors[which] @ noise).squeeze(-1))
    return torch.stack(found).split([points, HELD_OUT], 1)


def surfaces(sets, points):
    """Return points and held-out points (B, N, D) of generated surfaces."""
    data = ProceduralSurfaces(num_points=points, test_clouds=sets, noise=0.02, batch_size=sets)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    return batch.points, batch.held_out


def row(num_components, points, held_out):
    """Return the cells of a row of the table."""
    cells, without_prior = [], None
    for strength in STRENGTHS:
        prior = None if strength is None else {"covariance_strength": strength}
        options = {"init": "kmeans++", "num_starts": 4, "seed": 0, "residual": False, "prior": prior}
        mixtures, _ = EMOperator(num_components, FEATURES, **options).fit(points)
        likelihoods = mixtures.log_prob(held_out).mean(1)
        cells.append(f"{likelihoods.median():.2f}")
        if strength is None:  # the first strength
            without_prior = likelihoods
        else:
            cells[-1] += f" ({(likelihoods > without_prior).float().mean():.0%})"
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=200, help="number of sets per row")
    sets = parser.parse_args().sets
    torch.set_num_threads(1)
    heads = ["no prior", *(f"strength {strength:g}" for strength in STRENGTHS[1:])]
    print(f"| sets | points | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}")
    for distance in (12, 6, 3):
        for points in SIZES:
            cells = row(4, *blobs(sets, points, distance))
            print(f"| blobs {distance} apart, K = 4 | {points} | {' | '.join(cells)} |", flush=True)
    for points in SIZES:
        print(f"| surfaces, K = 8 | {points} | {' | '.join(row(8, *surfaces(sets, points)))} |", flush=True)


if __name__ == "__main__":
    main()
