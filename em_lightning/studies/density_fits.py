"""Classical density estimates of point clouds, with settings tuned on validation clouds for each cloud size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.studies.report import fit_sklearn

Setting = Mapping[str, Any]
# Pairs of a setting and the held-out log-likelihoods per point (B,) of the clouds under it.
Scores = Iterator[tuple[Setting, Tensor]]

FLOORS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 4e-2)
STEPS = (1, 2, 3, 5, 8, 12, 20, 30, 45, 60, 80)
TRAINED = "trained operator"


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
    """Return the scores and the time of a method with one setting, including the evaluation of held-out points."""
    began = time.perf_counter()
    ((setting, scores),) = method.scores(clouds, components, **setting)
    return Result(setting, scores, (time.perf_counter() - began) / len(scores))


def learned(module: Any) -> Method:
    """Return the method that applies a trained module, with the module's number of components."""

    def scores(clouds: Clouds, components: int) -> Scores:
        yield {}, module(clouds.points).log_prob(clouds.held_out).mean(1).cpu()

    return Method(TRAINED, scores, [{}])


def em_scores(
    clouds: Clouds,
    components: int,
    floor: float = 1e-6,
    starts: int = 1,
    steps: int | Sequence[int] = STEPS,
    prior: Mapping[str, Any] | None = None,
) -> Scores:
    """Score batched EM, or MAP-EM under a prior, after each number of steps in ``steps``."""
    options: dict[str, Any] = {"init": "kmeans++", "num_starts": starts, "prior": prior, "residual": False}
    operator = EMOperator(components, clouds.points.shape[-1], covariance_floor=floor, **options).eval()
    wanted = (steps,) if isinstance(steps, int) else steps
    for step, mixture in enumerate(operator.iterate(clouds.points, num_iters=max(wanted))):
        if step in wanted:
            setting = {"floor": floor, "starts": starts, "steps": step, "prior": prior}
            yield setting, mixture.log_prob(clouds.held_out).mean(1)


def kernel_scores(clouds: Clouds, components: int) -> Scores:
    """Score Gaussian kernel densities whose bandwidth is chosen for each cloud by leave-one-out."""
    points, count = clouds.points, clouds.points.shape[1]
    features = points.shape[-1]
    bandwidths = torch.logspace(-2.5, 0.0, 26).tolist()

    def log_density(square: Tensor, width: float, others: int) -> Tensor:
        constant = features * math.log(width * math.sqrt(2.0 * math.pi)) + math.log(others)
        return (-0.5 * square / width**2).logsumexp(-1) - constant

    scores = []
    for cloud, held_out in zip(points, clouds.held_out, strict=True):
        square = torch.cdist(cloud, cloud).square()
        square.fill_diagonal_(math.inf)
        levels = torch.stack([log_density(square, width, count - 1).mean() for width in bandwidths])
        width = bandwidths[int(levels.argmax())]
        scores.append(log_density(torch.cdist(held_out, cloud).square(), width, count).mean())
    yield {}, torch.stack(scores)


def sklearn_scores(clouds: Clouds, components: int, **options: Any) -> Scores:
    """Score scikit-learn's mixtures, fitted to the clouds one by one, in one thread."""
    mixtures = sklearn_mixtures(clouds.points, components, **options)
    held_out = clouds.held_out.split(1)
    scores = [mixture.log_prob(x.double()).mean() for mixture, x in zip(mixtures, held_out, strict=True)]
    yield options, torch.stack(scores).float()


def sklearn_mixtures(points: Tensor, components: int, **options: Any) -> list[Mixture]:
    """Return the mixture of each cloud (B, N, D) by scikit-learn's ``GaussianMixture``."""
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    estimator = GaussianMixture(min(components, points.shape[1]), max_iter=300, random_state=0, **options)
    with threadpool_limits(1):  # several threads are slower on sets of this size
        return [fit_sklearn(estimator, rows)[0] for rows in points.double().cpu().numpy()]


def each(**options: Sequence[Any]) -> list[Setting]:
    """Return all combinations of the options."""
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def baselines(size: int, fine: bool = False) -> list[Method]:
    """Return the methods for clouds of one size, with coarse or fine grids of settings."""
    # Where wider ranges were tried, no setting at the ends of these ranges was best on validation clouds.
    floors = [floor for floor in FLOORS if (floor >= 1e-4 if size < 100 else floor <= 3e-2)]
    starts = (1,) if size < 100 else (8,)
    strengths: Sequence[float] = (1.0, 3.0, 10.0) if size < 200 else (0.3, 1.0)
    shares = (0.03, 0.1, 0.3) if size < 200 else (1e-5, 1e-4, 1e-3)
    if not fine:
        floors, strengths = floors[::2], strengths[1:2]
    fixed = {"weight_concentration": (1.1,), "mean_strength": (0.0,)}
    priors = each(**fixed, covariance_strength=strengths, covariance=shares)
    return [
        *(Method(f"EM, {steps} steps", em_scores, [{"steps": steps, "starts": 8}]) for steps in (5, 20, 40)),
        Method("EM, tuned", em_scores, each(floor=floors, starts=starts)),
        Method("MAP-EM, tuned", em_scores, each(prior=priors, starts=starts)),
        Method("kernel density", kernel_scores, [{}]),
        Method("scikit-learn, tuned", sklearn_scores, each(reg_covar=floors[::2])),
    ]
