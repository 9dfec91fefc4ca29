"""ClusteringReport: amortized clustering compared with classical EM and the true mixtures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from em_lightning.mixture import Mixture, em_step
from em_lightning.operators import EMOperator
from em_lightning.studies.mixture_sets import MixtureSetBatch, MixtureSets
from em_lightning.studies.report import Findings, Report

LL0, LL1, GAP = "LL0", "LL1", "LL1 - oracle"
HELD_OUT, HELD_OUT_GAP = "held out", "held out - oracle"
ARI, CALIBRATION, SECONDS = "adjusted Rand", "calibration error", "ms per set"
COLUMNS = (LL0, LL1, GAP, HELD_OUT, HELD_OUT_GAP, ARI, CALIBRATION, SECONDS)
TRAINED = "trained operator"

# Lee et al. 2019, supplement, table 5: LL0, LL1, and LL1 minus the oracle's LL1 of the same paper.
PUBLISHED = {
    "published: rFF + pooling": (-2.0006, -1.6186, -0.146),
    "published: SAB + PMA": (-1.5145, -1.4619, 0.011),
    "published: ISAB(32) + PMA": (-1.4963, -1.4524, 0.020),
}
_PAIRS = 500  # per set, for the calibration error

FitFunction = Callable[[MixtureSetBatch], Mixture]


class ClusteringReport(Report):
    """Compare a trained :class:`~em_lightning.studies.AmortizedClustering` with classical EM and the true mixtures.

    On the test sets it measures the log-likelihood per fitted point under the fit (LL0) and after one exact EM step
    with diagonal covariances (LL1), the log-likelihood of held-out points, the adjusted Rand index of the largest
    responsibilities, and the expected calibration error of the probability that two points share a component,
    ``sum_k r_nk r_mk``.

    Args:
        classical: whether to measure classical EM too.
    """

    def __init__(self, classical: bool = True) -> None:
        super().__init__()
        self.classical = classical

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        """Measure all methods on the test sets."""
        data: MixtureSets = trainer.datamodule
        torch.manual_seed(data.seed)
        fits: dict[str, FitFunction] = {"oracle": lambda batch: batch.truth}
        classical = _classical_fits(data, module.operator) if self.classical else {}
        fits |= classical
        fits[TRAINED] = lambda batch: module(batch.points, batch.mask)
        batches = [MixtureSetBatch(*(part.to(module.device) for part in batch)) for batch in data.test_dataloader()]
        found = {name: _measure(fit, batches, module if name == TRAINED else None) for name, fit in fits.items()}
        oracle = found["oracle"]
        rows = []
        for name, row in found.items():
            row |= {GAP: row[LL1] - oracle[LL0], HELD_OUT_GAP: row[HELD_OUT] - oracle[HELD_OUT]}
            rows.append({"method": name, **{key: row[key] for key in COLUMNS}})
        for name, (ll0, ll1, gap) in PUBLISHED.items():
            rows.append({"method": name, **dict.fromkeys(COLUMNS, "-"), LL0: ll0, LL1: ll1, GAP: gap})
        parameters = sum(value.numel() for value in module.parameters())
        notes = [
            f"Data: {data.describe()}; {data.test_sets} test sets, {data.held_out} held-out points each, "
            f"seed {data.seed}. Likelihoods are in nats per point. LL0 is of the fitted points under the output, LL1 "
            f"after one exact EM step with diagonal covariances; both are compared with the true mixtures' LL0. The "
            f"published rows are of other test sets, so that only their gap can be compared.",
            f"The operator has {parameters:,} parameters; its learned prior: {module.operator.prior!r}.",
        ]
        verdict = f"{TRAINED}: {found[TRAINED][HELD_OUT_GAP]:+.4f} nats per held-out point against the oracle"
        if classical:
            best = max(classical, key=lambda name: found[name][HELD_OUT])
            verdict += f"; {best}, the best of the others: {found[best][HELD_OUT_GAP]:+.4f}"
        facts = {"seed": data.seed, "parameters": parameters}
        return Findings("Amortized clustering", notes, rows, f"{verdict}.", facts=facts)


def _classical_fits(data: MixtureSets, trained: EMOperator) -> dict[str, FitFunction]:
    """Return EM with diagonal covariances from several starts, and EM from the starts of a trained operator."""

    def classical(num_iters: int = 100, **options: Any) -> FitFunction:
        options = {"num_iters": num_iters, "covariance": "diag", "residual": False, **options}
        operator = EMOperator(data.num_components, data.num_features, **options).eval()
        return lambda batch: operator(batch.points, batch.mask)

    def from_its_starts(num_iters: int) -> FitFunction:
        plain = EMOperator(trained.num_components, trained.num_features, covariance=trained.covariance, residual=False)

        def fit(batch: MixtureSetBatch) -> Mixture:
            start = trained(batch.points, batch.mask, num_iters=0)
            return plain(batch.points, batch.mask, init=start, num_iters=num_iters)

        return fit

    prior = {"mean_strength": 0.0, "covariance_strength": 1000.0, "covariance": [data.scale**2] * data.num_features}
    return {
        "EM from random points, 100 steps": classical(init="random"),
        "EM from k-means++, 100 steps": classical(init="kmeans++"),
        "EM from farthest points, 1 step": classical(1),
        "EM from farthest points, 25 steps": classical(25),
        "EM from farthest points, 50 steps": classical(50),
        "EM, best of 10 k-means++, 100 steps": classical(init="kmeans++", num_starts=10),
        "MAP with known sigma, farthest points, 25 steps": classical(25, prior=prior),
    } | {
        f"EM from the starts of the trained operator, {steps} steps": from_its_starts(steps)
        for steps in (trained.num_iters, 20, 40)
    }


def _measure(fit: FitFunction, batches: list[MixtureSetBatch], module: Any = None) -> dict[str, Any]:
    """Return the metrics of a method, by column; a module has a log-density of its own."""
    from torchmetrics.classification import BinaryCalibrationError

    torch.manual_seed(0)  # the same random starts and pairs for every method
    calibration = BinaryCalibrationError().to(batches[0].points.device)
    sums, sets, seconds = torch.zeros(4, dtype=torch.double), 0, 0.0
    for batch in batches:
        points, mask, held_out = batch[:3]
        start = time.perf_counter()
        mixture = fit(batch)
        density = module.log_prob(mixture, held_out, points, mask) if module else mixture.log_prob(held_out)
        seconds += time.perf_counter() - start
        sets += len(points)
        diagonal = Mixture(mixture.log_weights, mixture.means, mixture.variances().contiguous())
        before_and_after = (mixture, em_step(points, diagonal, mask))
        log_likelihoods = [each.log_prob(points, mask).sum(-1) / mask.sum(-1) for each in before_and_after]
        responsibilities = mixture.posterior(points).responsibilities
        scores = _adjusted_rand(responsibilities.argmax(-1), batch)
        sums += torch.stack([*log_likelihoods, density.mean(-1), scores]).sum(1).cpu()
        calibration.update(*_pairs(responsibilities, batch))
    means = dict(zip((LL0, LL1, HELD_OUT, ARI), (sums / sets).tolist(), strict=True))
    return {**means, CALIBRATION: float(calibration.compute()), SECONDS: 1e3 * seconds / sets}


def _adjusted_rand(found: Tensor, batch: MixtureSetBatch) -> Tensor:
    """Return the adjusted Rand index (B,) of predicted components (B, N)."""
    from torchmetrics.functional.clustering import adjusted_rand_score

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # raised for a tensor of torchmetrics
        sets = zip(found, batch.labels, batch.mask, strict=True)
        return torch.stack([adjusted_rand_score(one[mask], labels[mask]) for one, labels, mask in sets])


def _pairs(responsibilities: Tensor, batch: MixtureSetBatch) -> tuple[Tensor, Tensor]:
    """Return the predicted probabilities that random pairs of points share a component, and whether they do."""
    sizes = batch.mask.sum(-1, keepdim=True)
    a, b = (torch.rand(2, len(sizes), _PAIRS, device=sizes.device) * sizes).long().unbind(0)
    each = [responsibilities.take_along_dim(index.unsqueeze(-1), 1) for index in (a, b)]
    together = batch.labels.gather(1, a) == batch.labels.gather(1, b)
    return (each[0] * each[1]).sum(-1)[a != b].clamp(0.0, 1.0), together[a != b].long()
