"""Where the operator's loop starts: centers drawn among the points, or learned ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.mixture import starts
from em_lightning.mixture.cloud import Cloud
from em_lightning.mixture.covariance import Structure
from em_lightning.mixture.factors import State

_RANDOM = ("kmeans++", "random")
STARTS = ("farthest", *_RANDOM, "learned")

# From a state to the objective (B,) that it leads to.
Judge = Callable[[State], Tensor]


class DrawnStart(NamedTuple):
    """A mixture around centers that are drawn among the points of each cloud.

    name: ``"farthest"``, ``"kmeans++"`` or ``"random"``.
    num_components: K.
    lloyd_steps: steps of k-means that centers take.
    num_starts: draws of which each cloud keeps the best.
    seed: of the draws, the same in every call; ``None`` draws from torch's global generator.
    """

    name: str
    num_components: int
    lloyd_steps: int
    num_starts: int
    seed: int | None

    @torch.no_grad()
    def centers(self, cloud: Cloud, structure: Structure, floor: Tensor, judge: Judge | None) -> Tensor:
        """Return for each cloud the centers (B, K, D) that a judge prefers, the first drawn without one."""
        generator = None
        if self.seed is not None:
            generator = torch.Generator(cloud.points.device).manual_seed(self.seed)
        num_starts = self.num_starts if judge is not None else 1
        drawn = [starts.draw_centers(self.name, cloud, self.num_components, generator) for _ in range(num_starts)]
        drawn = [starts.lloyd(cloud, centers, self.lloyd_steps) for centers in drawn]
        if judge is None or num_starts == 1:
            return drawn[0]
        best, chosen = torch.full_like(cloud.mass, -torch.inf), drawn[0]
        for centers in drawn:
            objective = judge(starts.from_centers(cloud, centers, structure, floor))
            chosen = torch.where((objective > best)[:, None, None], centers, chosen)
            best = torch.maximum(best, objective)
        return chosen

    def __call__(self, cloud: Cloud, structure: Structure, floor: Tensor, judge: Judge | None) -> State:
        """Return the start of each cloud."""
        return starts.from_centers(cloud, self.centers(cloud, structure, floor, judge), structure, floor)


class LearnedStart(nn.Module):
    """Trained centers, scales and weights, in units of the cloud.

    Args:
        num_components: K.
        num_features: D.
    """

    def __init__(self, num_components: int, num_features: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(num_components, num_features))
        self.log_scale = nn.Parameter(torch.zeros(num_components, 1) - 0.5)
        self.logits = nn.Parameter(torch.zeros(num_components))

    def forward(self, cloud: Cloud, structure: Structure, floor: Tensor, judge: Judge | None) -> State:
        """Return the start of each cloud; there is nothing to judge."""
        unit = cloud.variance.mean(-1).clamp(min=torch.finfo(cloud.points.dtype).tiny).sqrt()[:, None, None]
        factors = structure.expand(torch.ones_like(cloud.center), *self.means.shape)
        spread = unit * self.log_scale.exp() + floor.sqrt()[:, None, None]
        spread = spread if factors.scale.shape[1] == spread.shape[1] else spread.mean(1, keepdim=True)
        spread = spread if factors.scale.ndim == 3 else spread.unsqueeze(-1)
        log_weights = self.logits.log_softmax(-1).to(unit.dtype).expand(len(unit), -1)
        return State(log_weights, self.means * unit, factors.times(spread))


def build_start(
    init: str, num_components: int, num_features: int, lloyd_steps: int, num_starts: int, seed: int | None
) -> DrawnStart | LearnedStart:
    """Return the start of that name.

    Raises:
        ValueError: the name is unknown, or an argument makes no sense beside it.
    """
    if init not in STARTS:
        raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(map(repr, STARTS))}")
    if num_starts > 1 and init not in _RANDOM:
        raise ValueError(f"num_starts={num_starts} of init={init!r} would all be the same; use 'kmeans++' or 'random'")
    if seed is not None and init not in _RANDOM:
        raise ValueError(f"seed={seed} is for the draws of 'kmeans++' and 'random'; init={init!r} draws nothing")
    if lloyd_steps < 0 or (lloyd_steps > 0 and init == "learned"):
        raise ValueError(f"lloyd_steps={lloyd_steps} must not be negative, and 0 for init='learned'")
    if init == "learned":
        return LearnedStart(num_components, num_features)
    return DrawnStart(init, num_components, lloyd_steps, num_starts, seed)
