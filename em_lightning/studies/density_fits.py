"""Classical density estimates of point clouds, with the settings that validation clouds choose for each cloud size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.studies.report import fit_sklearn

Setting = Mapping[str, Any]
# Settings, and the held-out log-likelihood per point of each cloud (B,) under each.
Scores = Iterator[tuple[Setting, Tensor]]

FLOORS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 4e-2)
STEPS = (1, 2, 3, 5, 8, 12, 20, 30, 45, 60, 80)


class Clouds(NamedTuple):
    """Points to fit (B, N, D) and held-out points (B, M, D)."""

    points: Tensor
    held_out: Tensor


class Method(NamedTuple):
    """A density estimate: ``scores(clouds, components, **setting)`` and the settings to choose from."""

    name: str
    scores: Callable[..., Scores]
    grid: Sequence[Setting]


class Result(NamedTuple):
    """The chosen setting, the held-out log-likelihoods per point of test clouds (B,), and seconds per cloud."""

    setting: Setting
    scores: Tensor
    seconds: float


def tune(method: Method, clouds: Clouds, components: int) -> Setting:
    """Return the setting with the highest mean held-out log-likelihood of validation clouds."""
    found = [pair for setting in method.grid for pair in method.scores(clouds, components, **setting)]
    return max(found, key=lambda pair: float(pair[1].mean()))[0]


def measure(method: Method, clouds: Clouds, components: int, setting: Setting) -> Result:
    """Return the scores and the time of a method with one setting, the evaluation of held-out points included."""
    began = time.perf_counter()
    ((setting, scores),) = method.scores(clouds, components, **setting)
    return Result(setting, scores, (time.perf_counter() - began) / len(scores))


def em_scores(
    clouds: Clouds,
    components: int,
    floor: float = 1e-6,
    starts: int = 1,
    steps: int | Sequence[int] = STEPS,
    prior: Mapping[str, Any] | None = None,
) -> Scores:
    """Score batched EM, or MAP-EM under a prior, after each of some numbers of steps."""
    operator = _classical(clouds, components, floor, starts, prior)
    wanted = (steps,) if isinstance(steps, int) else steps
    for step, mixture in enumerate(operator.iterate(clouds.points, num_iters=max(wanted))):
        if step in wanted:
            setting = {"floor": floor, "starts": starts, "steps": step, "prior": prior}
            yield setting, mixture.log_prob(clouds.held_out).mean(1)


def _classical(
    clouds: Clouds, components: int, floor: float, starts: int, prior: Mapping[str, Any] | None = None
) -> EMOperator:
    options: dict[str, Any] = {"init": "kmeans++", "num_starts": starts, "residual": False}
    features = clouds.points.shape[-1]
    return EMOperator(components, features, covariance_floor=floor, prior=prior, **options).eval()


def cross_validated_scores(clouds: Clouds, components: int, steps: int, floors: Sequence[float] = FLOORS) -> Scores:
    """Score EM whose floor each cloud chooses by the mean log-likelihood of five folds of its own points."""
    points = clouds.points
    fold = torch.arange(points.shape[1]) % 5
    operators = [_classical(clouds, components, floor, 1) for floor in floors]
    levels = torch.zeros(len(floors), len(points))
    for operator, level in zip(operators, levels, strict=True):
        for out in range(5):
            mixture = operator(points, (fold != out).expand(points.shape[:2]), num_iters=steps)
            level += mixture.log_prob(points[:, fold == out]).sum(1)
    best, scores = levels.argmax(0), torch.zeros(len(points))
    for i in best.unique().tolist():
        chosen = best == i
        mixture = operators[i](points[chosen], num_iters=steps)
        scores[chosen] = mixture.log_prob(clouds.held_out[chosen]).mean(1)
    yield {"steps": steps, "floors": floors}, scores


def kernel_scores(clouds: Clouds, components: int) -> Scores:
    """Score Gaussian kernel densities whose bandwidth each cloud chooses by leaving one point out."""
    points, count = clouds.points, clouds.points.shape[1]
    features = points.shape[-1]
    bandwidths = torch.logspace(-2.5, 0.0, 26).tolist()

    def log_density(square: Tensor, width: Tensor | float, others: int) -> Tensor:
        width = torch.as_tensor(width)
        constant = features * (width.log() + 0.5 * math.log(2.0 * math.pi)) + math.log(others)
        return (-0.5 * square / width.square()).logsumexp(-1) - constant.squeeze(-1)

    scores = []
    for cloud, held_out in zip(points, clouds.held_out, strict=True):
        square = torch.cdist(cloud, cloud).square()
        square.fill_diagonal_(math.inf)
        levels = torch.stack([log_density(square, width, count - 1).mean() for width in bandwidths])
        width = bandwidths[int(levels.argmax())]
        scores.append(log_density(torch.cdist(held_out, cloud).square(), width, count).mean())
    yield {}, torch.stack(scores)


def sklearn_scores(clouds: Clouds, components: int, **options: Any) -> Scores:
    """Score scikit-learn's mixtures, fitted to one cloud after the other by one thread."""
    mixtures = sklearn_mixtures(clouds.points, components, **options)
    held_out = clouds.held_out.split(1)
    scores = [mixture.log_prob(x.double()).mean() for mixture, x in zip(mixtures, held_out, strict=True)]
    yield options, torch.stack(scores).float()


def sklearn_mixtures(
    points: Tensor, components: int, bayesian: bool = False, covariance_share: float | None = None, **options: Any
) -> list[Mixture]:
    """Return the mixture of each cloud (B, N, D) by scikit-learn; the share is that of a prior in the variance."""
    from threadpoolctl import threadpool_limits

    mixtures = []
    with threadpool_limits(1):  # several threads are slower on sets of this size
        for rows in points.double().cpu().numpy():
            if covariance_share is not None:
                options["covariance_prior"] = covariance_share * rows.var() * np.eye(rows.shape[1])
            found = fit_sklearn(
                rows, min(components, len(rows)), "full", bayesian=bayesian, max_iter=300, random_state=0, **options
            )
            mixtures.append(found[0])
    return mixtures


def _each(**options: Sequence[Any]) -> list[Setting]:
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def _priors(strengths: Sequence[float], shares: Sequence[float]) -> list[Setting]:
    return [
        {"weight_concentration": 1.1, "mean_strength": 0.0, "covariance_strength": strength, "covariance": share}
        for strength, share in product(strengths, shares)
    ]


def baselines(size: int, thorough: bool = True) -> list[Method]:
    """Return the methods for clouds of one size, with fine grids of settings or, for a demonstration, coarse ones."""
    # Validation clouds never chose a setting at the end of these ranges where a wider one was tried.
    floors = [floor for floor in FLOORS if (floor >= 1e-4 if size < 100 else floor <= 3e-2)]
    starts = (1,) if size < 100 else (8,)
    strengths: Sequence[float] = (1.0, 3.0, 10.0) if size < 200 else (0.3, 1.0)
    shares = (0.03, 0.1, 0.3) if size < 200 else (1e-5, 1e-4, 1e-3)
    if not thorough:
        floors, strengths = floors[::2], strengths[1:2]
    methods = [Method(f"EM, {steps} steps", em_scores, [{"steps": steps, "starts": 8}]) for steps in (5, 20, 40)]
    methods += [
        Method("EM, tuned", em_scores, _each(floor=floors, starts=starts)),
        Method("MAP-EM, tuned", em_scores, _each(prior=_priors(strengths, shares), starts=starts)),
        Method("kernel density", kernel_scores, [{}]),
        Method("scikit-learn, tuned", sklearn_scores, _each(reg_covar=floors[::2])),
    ]
    if thorough:
        prior = {"covariance_share": shares, "weight_concentration_prior": (0.01, 1.0)}
        methods += [
            Method("EM, floor cross-validated", cross_validated_scores, _each(steps=(5, 20), floors=(floors,))),
            Method("scikit-learn, n_init=10, tuned", sklearn_scores, _each(reg_covar=floors[::2], n_init=(10,))),
            Method("BayesianGaussianMixture, tuned", sklearn_scores, _each(bayesian=(True,), **prior)),
        ]
    return methods
