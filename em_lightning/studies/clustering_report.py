"""ClusteringReport: amortized clustering compared with classical EM and the true mixtures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from em_lightning.mixture import Mixture, em_step
from em_lightning.operators import EMOperator
from em_lightning.studies.density_fits import TRAINED
from em_lightning.studies.mixture_sets import MixtureSetBatch, MixtureSets
from em_lightning.studies.report import Findings, Report

ORACLE = "oracle"
# Lee et al. 2019, supplement, table 5: LL0, LL1, and LL1 minus the log-likelihood of the paper's true mixtures.
PUBLISHED = {
    "published: rFF + pooling": (-2.0006, -1.6186, -0.146),
    "published: SAB + PMA": (-1.5145, -1.4619, 0.011),
    "published: ISAB(32) + PMA": (-1.4963, -1.4524, 0.020),
}

FitFunction = Callable[[MixtureSetBatch], Mixture]


class ClusteringReport(Report):
    """Compare a trained :class:`~em_lightning.studies.AmortizedClustering` with classical EM and the true mixtures.

    On the test sets it measures the log-likelihood per fitted point under the fit (LL0) and after one exact EM step
    with diagonal covariances (LL1), the log-likelihood of held-out points, and the adjusted Rand index of hard labels.

    Args:
        classical: whether to measure classical EM too.
    """

    def __init__(self, classical: bool = True) -> None:
        super().__init__()
        self.classical = classical

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        data: MixtureSets = trainer.datamodule
        batches = move_data_to_device(list(data.test_dataloader()), module.device)
        fits: dict[str, FitFunction] = {ORACLE: lambda batch: batch.truth}
        if self.classical:
            fits |= _classical_fits(data, module.operator)
        rows = {name: _measure(fit, batches) for name, fit in fits.items()}
        rows[TRAINED] = _measure(lambda batch: module(batch.points, batch.mask), batches, module.log_prob)
        for row in rows.values():
            row["LL1 - oracle"] = row["LL1"] - rows[ORACLE]["LL0"]
            row["held out - oracle"] = row["held out"] - rows[ORACLE]["held out"]
        for name, (ll0, ll1, gap) in PUBLISHED.items():
            rows[name] = dict.fromkeys(rows[ORACLE], "-") | {"LL0": ll0, "LL1": ll1, "LL1 - oracle": gap}
        num_parameters = sum(value.numel() for value in module.parameters())
        notes = [
            f"Data: {data.describe()}; {data.test_sets} test sets, {data.held_out} held-out points each, "
            f"seed {data.seed}. Likelihoods are in nats per point. LL0 is of the fitted points under the output, LL1 "
            f"after one exact EM step with diagonal covariances; LL1 is compared with the true mixtures' LL0. "
            f"Published rows are of other test sets: only their gap can be compared. Times include held-out densities.",
            f"The module has {num_parameters:,} parameters; its learned prior: {module.operator.prior!r}.",
        ]
        verdict = f"{TRAINED}: {rows[TRAINED]['held out - oracle']:+.4f} nats per held-out point against the oracle"
        rivals = [name for name in fits if name != ORACLE]
        if rivals:
            best = max(rivals, key=lambda name: rows[name]["held out"])
            verdict += f"; {best}, the best of the others: {rows[best]['held out - oracle']:+.4f}"
        table = [{"method": name, **row} for name, row in rows.items()]
        facts = {"seed": data.seed, "parameters": num_parameters}
        return Findings("Amortized clustering", notes, table, f"{verdict}.", facts=facts)


def _classical_fits(data: MixtureSets, trained: EMOperator) -> dict[str, FitFunction]:
    """Return EM and MAP-EM with diagonal covariances from several starts, and EM from a trained operator's starts."""

    def classical(num_iters: int, **options: Any) -> FitFunction:
        options |= {"num_iters": num_iters, "covariance": "diag", "residual": False}
        operator = EMOperator(data.num_components, data.num_features, **options).eval()
        return lambda batch: operator(batch.points, batch.mask)

    def from_trained_start(num_iters: int) -> FitFunction:
        plain = EMOperator(trained.num_components, trained.num_features, covariance=trained.covariance, residual=False)
        return lambda batch: plain(
            batch.points, batch.mask, init=trained(batch.points, batch.mask, num_iters=0), num_iters=num_iters
        )

    # 1,000 pseudo-counts, more than a set has points: the scale stays near the true one.
    prior = {"mean_strength": 0.0, "covariance_strength": 1000.0, "covariance": [data.scale**2] * data.num_features}
    fits = {
        "EM from random points, 100 steps": classical(100, init="random"),
        "EM from k-means++, 100 steps": classical(100, init="kmeans++"),
        "EM from farthest points, 1 step": classical(1, init="farthest"),
        "EM from farthest points, 25 steps": classical(25, init="farthest"),
        "EM from farthest points, 50 steps": classical(50, init="farthest"),
        "EM, best of 10 k-means++, 100 steps": classical(100, init="kmeans++", num_starts=10),
        "MAP with known sigma, farthest points, 25 steps": classical(25, init="farthest", prior=prior),
    }
    for steps in (trained.num_iters, 20, 40):
        fits[f"EM from the starts of the trained operator, {steps} steps"] = from_trained_start(steps)
    return fits


def _measure(
    fit: FitFunction, batches: Sequence[MixtureSetBatch], log_prob: Callable[..., Tensor] | None = None
) -> dict[str, Any]:
    """Return the row of a method; ``log_prob`` replaces the mixture's own log-density of held-out points."""
    from torchmetrics.functional.clustering import adjusted_rand_score

    torch.manual_seed(0)  # the same random starts for every method
    columns: dict[str, list[Tensor]] = {"LL0": [], "LL1": [], "held out": [], "adjusted Rand": []}
    seconds = 0.0
    for batch in batches:
        points, mask, held_out, labels, _ = batch
        began = time.perf_counter()
        mixture = fit(batch)
        held_out_log_prob = log_prob(mixture, held_out, points, mask) if log_prob else mixture.log_prob(held_out)
        seconds += time.perf_counter() - began
        diagonal = Mixture(mixture.log_weights, mixture.means, mixture.variances().contiguous())
        improved = em_step(points, diagonal, mask)
        predicted = mixture.posterior(points).responsibilities.argmax(-1)
        columns["LL0"].append(mixture.log_prob(points, mask).sum(-1) / mask.sum(-1))
        columns["LL1"].append(improved.log_prob(points, mask).sum(-1) / mask.sum(-1))
        columns["held out"].append(held_out_log_prob.mean(-1))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse invariant checks")  # raised for a tensor of torchmetrics
            sets = zip(predicted, labels, mask, strict=True)
            scores = [adjusted_rand_score(found[valid], true[valid]) for found, true, valid in sets]
        columns["adjusted Rand"].append(torch.stack(scores))
    row = {name: float(torch.cat(values).double().mean()) for name, values in columns.items()}
    return {**row, "ms per set": 1e3 * seconds / sum(len(batch.points) for batch in batches)}
