"""Explicit EM for a layer of rectified linear energies: E-steps and monotone M-steps, without an optimizer.

The objective of a layer d = relu(W x~), x~ = (x, 1), over all N items is

    L(W) = mean_n F_n + V(d),  F_n = -log sum_j exp(-d_nj) = min_r sum_j r_nj (d_nj + log r_nj),

with the volume terms V = -sum_j log(Var(d_j) + 1e-6) + sum_{i != j} Corr(d_i, d_j)^2, or with the bounded variance
term sum_j log(1 + 1 / Var(d_j)); the option --volume calls the former "published" (arXiv 2601.06478). An iteration is

- E-step: r = softmin(d) at the current W. The surrogate Q(W | r) = mean_n sum_j r_nj (d_nj + log r_nj) + V(d) is an
  upper bound of L that touches it at the current W.
- M-step: a responsibility-weighted least-squares problem for each unit. As relu(z) <= z / 2 + z^2 / (4 c) + c / 4 with
  equality at c = |z|, the weighted energies are at most a quadratic function of w_j with Hessian
  A_j = mean_n r_nj / (2 c_nj) x~ x~^T. The volume terms enter by their gradient. The variance term also adds
  mean_n 2 [z_nj > 0] / Var(d_j) x~ x~^T to A_j, an upper bound of its Hessian. So does the bounded variance term, whose
  Hessian is at most 1.125 times this. The step is halved until Q decreases.

So L(W') <= Q(W' | r) <= Q(W | r) = L(W): the objective never increases (`tests/test_composition.py` verifies this).

`python -m benchmarks.explicit_em [--root PATH/TO/mnist]` compares explicit EM with SGD and Adam at four learning rates.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from em_lightning.competition import softmin
from em_lightning.data import MNIST, Digits
from em_lightning.losses import EMLoss
from em_lightning.studies import linear_probe, markdown_table

VOLUMES = {
    "published": EMLoss(free_energy=0.0),
    "bounded": EMLoss(free_energy=0.0, variance=0.0, bounded_variance=1.0),
}
ENERGY = EMLoss(variance=0.0, decorrelation=0.0, reduction="mean")
SMALLEST_C = 1e-2  # lower bound of c, as c = |z| = 0 would give an infinite weight; any c gives an upper bound
RIDGE = 1e-6  # relative to the mean of the diagonal of A_j, which is singular where pixels are constant
MAX_HALVINGS = 30  # a step of 2^-30 is below the rounding of float32
DEAD_VARIANCE = 0.01  # units with a smaller variance are dead, as in em_lightning.metrics.DeadUnits
ACTIVE_SHARE = 0.01  # a unit is active on an item if its energy exceeds this share (chosen) of the standard deviation
RATES = (1e-3, 1e-2, 1e-1, 1.0)  # learning rates of SGD and Adam


class Iteration(NamedTuple):
    """One iteration: the new weights (K, D + 1), L before, Q after the M-step, L after, and the accepted step size."""

    weights: Tensor
    before: float
    surrogate: float
    after: float
    step: float


def energies(weights: Tensor, x: Tensor) -> Tensor:
    """Return the energies (N, K) of weights (K, D + 1) and items with a last column of ones (N, D + 1)."""
    return torch.relu(x @ weights.T)


def objective(weights: Tensor, x: Tensor, volume: EMLoss) -> Tensor:
    """Return L with these volume terms."""
    d = energies(weights, x)
    return ENERGY.total(d) + volume.total(d)


def surrogate(weights: Tensor, x: Tensor, responsibilities: Tensor, volume: EMLoss) -> Tensor:
    """Return Q for responsibilities (N, K) of the E-step."""
    d = energies(weights, x)
    expected = (responsibilities * d).sum(1) - torch.special.entr(responsibilities).sum(1)
    return expected.mean() + volume.total(d)


def least_squares(weights: Tensor, x: Tensor, responsibilities: Tensor) -> Tensor:
    """Return the matrices (K, D + 1, D + 1) of the M-step: A_j with the part of the variance term, and a ridge."""
    z = x @ weights.T
    d = z.relu()
    variance = d.var(0) + 1e-6
    per_item = responsibilities / (2 * z.abs().clamp_min(SMALLEST_C)) + 2 / variance * (z > 0)
    matrices = torch.stack([(x * column[:, None]).T @ x for column in per_item.unbind(1)]) / len(x)
    ridge = RIDGE * matrices.diagonal(dim1=1, dim2=2).mean(1)
    return matrices + ridge[:, None, None] * torch.eye(x.shape[1], dtype=x.dtype)


def iterate(weights: Tensor, x: Tensor, volume: EMLoss) -> Iteration:
    """Run one E-step and one M-step."""
    weights = weights.detach().requires_grad_()
    responsibilities = softmin(energies(weights, x)).responsibilities.detach()
    value = surrogate(weights, x, responsibilities, volume)
    (gradient,) = torch.autograd.grad(value, weights)
    with torch.no_grad():
        direction = torch.linalg.solve(least_squares(weights, x, responsibilities), -gradient)
        step, before = 1.0, float(value)
        for _ in range(MAX_HALVINGS):
            proposal = weights + step * direction
            reached = float(surrogate(proposal, x, responsibilities, volume))
            if reached <= before:
                after = float(objective(proposal, x, volume))
                return Iteration(proposal, before, surrogate=reached, after=after, step=step)
            step /= 2
    return Iteration(weights.detach(), before, surrogate=before, after=before, step=0.0)


def start(x: Tensor, num_components: int, seed: int) -> Tensor:
    """Return the initial weights (K, D + 1) of `torch.nn.Linear`."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(x.shape[1] - 1, num_components, dtype=x.dtype)
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach()


class Fit(NamedTuple):
    """Final weights, and (seconds, L) over training."""

    weights: Tensor
    curve: list[tuple[float, float]]


def explicit(weights: Tensor, x: Tensor, volume: EMLoss, seconds: float) -> Fit:
    """Iterate for some seconds of processor time, or until no step decreases the objective."""
    began, curve = time.process_time(), [(0.0, float(objective(weights, x, volume)))]
    while curve[-1][0] < seconds:
        found = iterate(weights, x, volume)
        weights = found.weights
        curve.append((time.process_time() - began, found.after))
        if not found.step:
            break
    return Fit(weights, curve)


def gradient_descent(
    weights: Tensor, x: Tensor, volume: EMLoss, seconds: float, name: str, rate: float, seed: int
) -> Fit:
    """Train with batches of 128 for some seconds; evaluations of the objective are not counted."""
    used, curve = 0.0, [(0.0, float(objective(weights, x, volume)))]
    weights = weights.clone().requires_grad_()
    optimizer = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[name]([weights], lr=rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    while used < seconds:
        began = time.process_time()
        for rows in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            objective(weights, x[rows], volume).backward()
            optimizer.step()
        used += time.process_time() - began
        with torch.no_grad():
            curve.append((used, float(objective(weights, x, volume))))
        if not math.isfinite(curve[-1][1]):
            break  # diverged
    return Fit(weights.detach(), curve)


def final(fit: Fit) -> float:
    """Return the objective at the end of a fit."""
    return fit.curve[-1][1]


def time_to(curve: list[tuple[float, float]], value: float) -> float:
    """Return the first time at which the objective is at most ``value``; infinity if never."""
    return next((seconds for seconds, reached in curve if reached <= value), float("inf"))


def matched(weights: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """Return ``other`` with its units reordered to correlate best with those of ``weights`` (Hungarian method)."""
    units = torch.cat([energies(weights, x), energies(other, x)], 1).T
    correlation = torch.corrcoef(units).nan_to_num()[: len(weights), len(weights) :]
    _, order = linear_sum_assignment(-correlation.numpy())
    return other[torch.from_numpy(order)]


def barrier(weights: Tensor, other: Tensor, x: Tensor, volume: EMLoss, points: int = 11) -> float:
    """Return the largest excess of the objective over the straight line between its values at the two ends."""
    fractions = torch.linspace(0, 1, points).tolist()
    values = torch.tensor([float(objective(weights.lerp(other, t), x, volume)) for t in fractions])
    line = values[0] + (values[-1] - values[0]) * torch.linspace(0, 1, points)
    return float((values - line).max())


def with_ones(x: Tensor) -> Tensor:
    """Return items (N, ...) as rows (N, D + 1) with a last column of ones."""
    return torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1)


def compare(name: str, train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, options: argparse.Namespace):
    """Return the rows of the table for one data set."""
    rows, volume = [], VOLUMES[options.volume]
    x, test_x = with_ones(train), with_ones(test)
    fits: dict[str, list[Fit]] = {}
    for seed in range(options.seeds):
        first = start(x, options.components, seed)
        fits.setdefault("explicit EM", []).append(explicit(first, x, volume, options.seconds))
        for optimizer in ("SGD", "Adam"):
            for rate in RATES:
                fit = gradient_descent(first, x, volume, options.seconds, optimizer, rate, seed)
                fits.setdefault(f"{optimizer} {rate:g}", []).append(fit)
    best = {}
    for optimizer in ("SGD", "Adam"):
        totals = {key: sum(map(final, fits[key])) for key in fits if key.startswith(optimizer)}
        best[optimizer] = min(totals, key=lambda key: float("inf") if math.isnan(totals[key]) else totals[key])
    of_sgd, of_em = (list(map(final, fits[key])) for key in (best["SGD"], "explicit EM"))
    for key, found in fits.items():
        ends = torch.tensor(list(map(final, found)))
        features = [[energies(fit.weights, part) for part in (x, test_x)] for fit in found]
        scores = [linear_probe(a, labels, b, test_labels) for a, b in features if a.isfinite().all()]
        pairs = list(zip(fits["explicit EM"], found, strict=True))
        barriers = [barrier(em.weights, matched(em.weights, fit.weights, x), x, volume) for em, fit in pairs]
        rows.append({
            "data": f"{name}, {options.volume}",
            "method": key + (" (best rate)" if key in best.values() else ""),
            "final objective": f"{ends.mean():.2f} ± {ends.std():.2f}",
            "s to SGD's final objective": _mean_or_never(
                [time_to(fit.curve, value) for fit, value in zip(found, of_sgd, strict=True)]
            ),
            "s to explicit EM's": _mean_or_never(
                [time_to(fit.curve, value) for fit, value in zip(found, of_em, strict=True)]
            ),
            "iterations or epochs": _mean_or_never([len(fit.curve) - 1 for fit in found]),
            "probe %": f"{100 * sum(scores) / len(scores):.2f}" if scores else "",
            "dead units": _mean_or_never([int((d.var(0) < DEAD_VARIANCE).sum()) for _, d in features]),
            "free energy": _mean_or_never([float(softmin(d).free_energy.mean()) for d, _ in features]),
            "active units": _mean_or_never(
                [float((d > ACTIVE_SHARE * d.std()).float().sum(1).mean()) for d, _ in features]
            ),
            "kurtosis": _mean_or_never(
                [float(((d - d.mean(0)) / d.std(0).clamp_min(1e-9)).pow(4).mean()) for d, _ in features]
            ),
            "barrier to explicit EM": _mean_or_never(barriers),
        })  # fmt: skip
    return rows


def _mean_or_never(values: list[float]) -> str:
    """Return the mean as text, or "never" if one of the values is an infinite time."""
    return "never" if max(values) == float("inf") else f"{sum(values) / len(values):.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", help="folder of MNIST; without it the digits of scikit-learn alone")
    parser.add_argument("--components", type=int, default=25)
    parser.add_argument("--features", type=int, default=50, help="principal components of MNIST")
    parser.add_argument("--items", type=int, default=10_000, help="training images of MNIST")
    parser.add_argument("--seconds", type=float, default=20.0, help="processor time of each fit")
    parser.add_argument("--volume", choices=VOLUMES, default="published")
    parser.add_argument("--seeds", type=int, default=3, help="number of initial weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (Digits().whole(split) for split in ("train", "test"))
    rows = compare("digits", train.x, train.y, test.x, test.y, options)
    if options.root:
        train, test = (MNIST(root=options.root).whole(split) for split in ("train", "test"))
        x, y = train.x[: options.items].flatten(1), train.y[: options.items]
        mean = x.mean(0)
        _, _, directions = torch.pca_lowrank(x - mean, options.features)
        projected, test_projected = ((part - mean) @ directions for part in (x, test.x.flatten(1)))
        rows += compare("MNIST", projected, y, test_projected, test.y, options)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
