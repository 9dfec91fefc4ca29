"""Initialization of the EM operator: centers drawn among the points, or learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.checks import check_at_least, check_choice
from em_lightning.mixture import initialization
from em_lightning.mixture.covariance import Covariance
from em_lightning.mixture.m_step import PseudoCounts
from em_lightning.mixture.points import Parameters, Points

_RANDOM = ("kmeans++", "random")
STARTS = (*initialization.CENTERS, "learned")

# Maps a start to the objective (B,) after some iterations.
Score = Callable[[Parameters], Tensor]


class Sets(NamedTuple):
    """The inputs of all iterations of an EM operator.

    points: the points prepared for EM; ``points.x`` is (B, D, N), in the user's units.
    mass, mask: ``points.mass`` (B,), under the name that all operators have, and the given mask (B, N).
    family: the covariance type of the operator; in ``EMOperator.objective`` that of its mixture; or von Mises-Fisher.
    floor: (B,), the floor of variances in frame coordinates; of 1 / kappa for von Mises-Fisher.
    pseudo_counts, dtype: the pseudo-counts of the prior, and the dtype of the result.
    """

    points: Points
    mass: Tensor
    mask: Tensor | None
    family: Covariance
    floor: Tensor
    pseudo_counts: PseudoCounts | None
    dtype: torch.dtype


class DrawnStart(NamedTuple):
    """A start around centers drawn among the points of each set; ``name`` is ``init`` of :class:`EMOperator`."""

    name: str
    num_components: int
    num_starts: int
    seed: int | None

    def __call__(self, sets: Sets, score: Score | None) -> Parameters:
        """Return, for each set, the start with the highest score; without a score, the first start."""
        points, choose = sets.points, initialization.CENTERS[self.name]
        generator = None if self.seed is None else torch.Generator(points.x.device).manual_seed(self.seed)

        def draw() -> Tensor:
            return choose(points.x.detach().mT, self.num_components, weights=points.weights, generator=generator)

        def around(centers: Tensor) -> Parameters:
            return initialization.parameters_around(points, centers, sets.family, sets.floor)

        with torch.no_grad():
            best = draw()
            if score is not None and self.num_starts > 1:
                highest = score(around(best))
                for _ in range(self.num_starts - 1):
                    centers = draw()
                    objective = score(around(centers))
                    best = torch.where((objective > highest)[:, None, None], centers, best)
                    highest = torch.maximum(objective, highest)
        return around(best)


class LearnedStart(nn.Module):
    """Learned centers, scales and weights, relative to the mean and root mean variance of the set."""

    def __init__(self, num_components: int, num_features: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(num_components, num_features))
        self.log_scale = nn.Parameter(torch.full((num_components, 1), -0.5))  # narrower than the set; not tuned
        self.logits = nn.Parameter(torch.zeros(num_components))

    def forward(self, sets: Sets, score: Score | None) -> Parameters:
        """Return the only start of each set, for any score."""
        mean, unit, family = sets.points.mean, sets.points.root_mean_variance()[:, None, None], sets.family
        deviation = unit * self.log_scale.exp() + sets.floor.sqrt()[:, None, None]  # (B, K, 1)
        identities = family.expand(torch.ones_like(mean), len(self.means))  # unit variances
        covariances = family.scaled(identities, deviation.square().squeeze(-1))
        log_weights = self.logits.log_softmax(-1).to(unit).expand(len(unit), -1)
        return Parameters(log_weights, mean.unsqueeze(1) + self.means * unit, covariances)


def build_start(
    init: str, num_components: int, num_features: int, num_starts: int, seed: int | None
) -> DrawnStart | LearnedStart:
    """Return the start with the name ``init``; arguments are those of :class:`EMOperator`."""
    check_choice("init", init, STARTS)
    check_at_least(1, num_starts=num_starts)
    if num_starts > 1 and init not in _RANDOM:
        raise ValueError(f"num_starts={num_starts} with init={init!r} would all be equal; use 'kmeans++' or 'random'")
    if seed is not None and init not in _RANDOM:
        raise ValueError(f"seed={seed} has no effect with init={init!r}; it is for 'kmeans++' and 'random'")
    if init == "learned":
        return LearnedStart(num_components, num_features)
    return DrawnStart(init, num_components, num_starts, seed)
