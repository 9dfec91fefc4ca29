"""ClusteringReport: amortized clustering compared with classical EM and the true mixtures."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from em_lightning.data import MixtureSetBatch, MixtureSets
from em_lightning.files import write_whole
from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.studies.report import Report
from em_lightning.studies.results import markdown_table, print_results, verdict, write_results

METHOD = "method"
LL0, LL1, GAP = "LL0", "LL1", "LL1 - oracle"
HELD_OUT, HELD_OUT_GAP = "held out", "held out - oracle"
ARI, CALIBRATION, SECONDS = "adjusted Rand", "calibration error", "ms per set"
COLUMNS = (LL0, LL1, GAP, HELD_OUT, HELD_OUT_GAP, ARI, CALIBRATION, SECONDS)

# Lee et al. 2019, supplement, table 5: LL0, LL1, and LL1 minus the oracle's LL1 of the same paper.
PUBLISHED = {
    "published: rFF + pooling": (-2.0006, -1.6186, -0.146),
    "published: SAB + PMA": (-1.5145, -1.4619, 0.011),
    "published: ISAB(32) + PMA": (-1.4963, -1.4524, 0.020),
}
_PAIRS = 500

# A fit returns mixtures and the log-density of held-out points.
Fit = Callable[[MixtureSetBatch], tuple[Mixture, Tensor]]


class ClusteringReport(Report):
    """Compare a trained :class:`~em_lightning.modules.AmortizedClustering` with classical EM and the true mixtures.

    At the end of a fit it writes ``results.md`` and ``results.json`` to the folder of the logger. On the test sets it
    measures the log-likelihood per fitted point under the output (LL0) and after one exact EM step with diagonal
    covariances (LL1), the log-likelihood of held-out points, the adjusted Rand index of the largest responsibilities,
    and the expected calibration error of the probability that two points share a component, ``sum_k r_nk r_mk``. A
    second table measures sets of other sizes and other numbers of components than the training sets.

    Args:
        classical: whether to measure classical EM too.
        sizes: numbers of points in the second table.
        components: numbers of components in the second table.
        transfer_sets: number of sets per row of the second table; 0 omits the table.
    """

    def __init__(
        self,
        classical: bool = True,
        sizes: tuple[int, ...] = (50, 1000),
        components: tuple[int, ...] = (2, 3, 6, 8),
        transfer_sets: int = 300,
    ) -> None:
        super().__init__()
        self.classical = classical
        self.sizes = sizes
        self.components = components
        self.transfer_sets = transfer_sets

    def report(self, trainer: Any, module: Any, folder: Path) -> str:
        """Write both tables."""
        data: MixtureSets = trainer.datamodule
        torch.manual_seed(data.seed)
        sigma = {"mean_strength": 0.0, "covariance_strength": 1000.0, "covariance": [data.scale**2] * data.num_features}
        classical = {
            "EM from random points, 100 steps": _classical(data, init="random"),
            "EM from k-means++, 100 steps": _classical(data, init="kmeans++"),
            "EM from farthest points, 1 step": _classical(data, num_iters=1),
            "EM from farthest points, 25 steps": _classical(data, num_iters=25),
            "EM from farthest points, 50 steps": _classical(data, num_iters=50),
            "EM, best of 10 k-means++, 100 steps": _classical(data, init="kmeans++", num_starts=10),
            "MAP with known sigma, farthest points, 25 steps": _classical(data, num_iters=25, prior=sigma),
        }
        for steps in (module.operator.num_iters, 20, 40):
            name = f"EM from the starts of the trained operator, {steps} steps"
            classical[name] = functools.partial(_from_its_starts, module.operator, steps)
        fits: dict[str, Fit] = {"oracle": _oracle, **(classical if self.classical else {})}
        fits["trained operator"] = functools.partial(_trained, module)
        batches = _test_batches(data, module.device)
        found = {name: _measure(fit, batches) for name, fit in fits.items()}
        truth = found["oracle"]
        rows = []
        for name, row in found.items():
            gaps = {GAP: row[LL1] - truth[LL0], HELD_OUT_GAP: row[HELD_OUT] - truth[HELD_OUT]}
            rows.append({METHOD: name} | {key: {**row, **gaps}[key] for key in COLUMNS})
        for name, (first, second, gap) in PUBLISHED.items():
            rows.append({METHOD: name, **dict.fromkeys(COLUMNS, "-"), LL0: first, LL1: second, GAP: gap})
        transfer = self._transfer(module, data)
        parameters = sum(value.numel() for value in module.parameters())
        notes = [
            f"Data: {data.describe()}; {data.test_sets} test sets, {data.held_out} held-out points each, "
            f"seed {data.seed}. Likelihoods are in nats per point. LL0 is of the fitted points under the output, LL1 "
            f"after one exact EM step with diagonal covariances; both are compared with the true mixtures' LL0. The "
            f"published rows are of other test sets, so that only their gap can be compared.",
            f"The operator has {parameters:,} parameters; its learned prior: {module.operator.prior!r}.",
        ]
        facts = {"seed": data.seed, "parameters": parameters, "transfer": transfer}
        text = write_results(folder, "Amortized clustering", notes, rows, **facts)
        if transfer:
            title = "Sets unlike the training sets"
            write_whole(folder / "results.md", f"{text}\n## {title}\n\n{markdown_table(transfer)}\n")
            print_results(title, [], transfer)
        return f"{verdict(rows[1:], 'trained operator', HELD_OUT)} {verdict(rows[1:], 'trained operator', LL1)}"

    def _transfer(self, module: Any, data: MixtureSets) -> list[dict[str, Any]]:
        """Return the second table: a row for each number of points, and for each number of components."""
        if not self.transfer_sets:
            return []
        others: list[dict[str, int]] = [{"min_points": size, "max_points": size} for size in self.sizes]
        others += [{"num_components": components} for components in self.components]
        rows = []
        for changes in others:
            other = dataclasses.replace(data, test_sets=self.transfer_sets, **changes)
            batches = _test_batches(other, module.device)
            fitted = module if "min_points" in changes else module.for_components(other.num_components)
            oracle = _measure(_oracle, batches)
            sizes = [str(size) for size in dict.fromkeys((other.min_points, other.max_points))]
            row: dict[str, Any] = {"points": " to ".join(sizes), "K": str(other.num_components)}
            best = _classical(other, init="kmeans++", num_starts=10)
            for name, fit in (("best of 10", best), ("trained", functools.partial(_trained, fitted))):
                found = _measure(fit, batches)
                row[f"{name}: LL1 - oracle"] = found[LL1] - oracle[LL0]
                row[f"{name}: held out - oracle"] = found[HELD_OUT] - oracle[HELD_OUT]
                row[f"{name}: adjusted Rand"] = found[ARI]
            rows.append(row)
        return rows


def _test_batches(data: MixtureSets, device: Any) -> list[MixtureSetBatch]:
    return [MixtureSetBatch(*(part.to(device) for part in batch)) for batch in data.test_dataloader()]


def _classical(data: MixtureSets, **arguments: Any) -> Fit:
    """Return a fit by classical EM with diagonal covariances, by default of 100 steps."""
    arguments = {"num_iters": 100, "covariance": "diag", **arguments}
    operator = EMOperator(data.num_components, data.num_features, residual=False, **arguments).eval()
    return lambda batch: _with_held_out(operator(batch.points, batch.mask), batch)


def _from_its_starts(trained: EMOperator, steps: int, batch: MixtureSetBatch) -> tuple[Mixture, Tensor]:
    """Fit by EM without prior and corrections from the initial mixtures of a trained operator."""
    start = trained(batch.points, batch.mask, num_iters=0)
    plain = EMOperator(trained.num_components, trained.num_features, covariance=trained.covariance, residual=False)
    return _with_held_out(plain(batch.points, batch.mask, init=start, num_iters=steps), batch)


def _with_held_out(mixture: Mixture, batch: MixtureSetBatch) -> tuple[Mixture, Tensor]:
    return mixture, mixture.log_prob(batch.held_out)


def _oracle(batch: MixtureSetBatch) -> tuple[Mixture, Tensor]:
    return _with_held_out(batch.truth, batch)


def _trained(module: Any, batch: MixtureSetBatch) -> tuple[Mixture, Tensor]:
    mixture = module(batch.points, batch.mask)
    return mixture, module.log_prob(mixture, batch.held_out, batch.points, batch.mask)


def _measure(fit: Fit, batches: list[MixtureSetBatch]) -> dict[str, Any]:
    """Return the metrics of a method, by column."""
    from torchmetrics.classification import BinaryCalibrationError

    torch.manual_seed(0)  # the same random starts and pairs for every method
    calibration = BinaryCalibrationError().to(batches[0].points.device)
    sums, sets, seconds = torch.zeros(4, dtype=torch.double), 0, 0.0
    for batch in batches:
        start = time.perf_counter()
        mixture, held_out = fit(batch)
        seconds += time.perf_counter() - start
        sets += len(batch.points)
        levels = [
            one.log_prob(batch.points, batch.mask).sum(-1) / batch.mask.sum(-1)
            for one in (mixture, _one_step(mixture, batch))
        ]
        responsibilities = mixture.posterior(batch.points).responsibilities
        scores = _adjusted_rand(responsibilities.argmax(-1), batch)
        sums += torch.stack([*levels, held_out.mean(-1), scores]).sum(1).cpu()
        calibration.update(*_pairs(responsibilities, batch))
    last = {CALIBRATION: float(calibration.compute()), SECONDS: 1e3 * seconds / sets}
    return {**dict(zip((LL0, LL1, HELD_OUT, ARI), (sums / sets).tolist(), strict=True)), **last}


def _adjusted_rand(found: Tensor, batch: MixtureSetBatch) -> Tensor:
    """Return the adjusted Rand index (B,) of components found (B, N)."""
    from torchmetrics.functional.clustering import adjusted_rand_score

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # of a tensor that torchmetrics makes
        sets = zip(found, batch.labels, batch.mask, strict=True)
        return torch.stack([adjusted_rand_score(one[mask], labels[mask]) for one, labels, mask in sets])


def _pairs(responsibilities: Tensor, batch: MixtureSetBatch) -> tuple[Tensor, Tensor]:
    """Return for random pairs of points the probability that they share a component, and whether they do."""
    sizes = batch.mask.sum(-1, keepdim=True)
    a, b = (torch.rand(2, len(sizes), _PAIRS, device=sizes.device) * sizes).long().unbind(0)
    each = [responsibilities.take_along_dim(index.unsqueeze(-1), 1) for index in (a, b)]
    together = batch.labels.gather(1, a) == batch.labels.gather(1, b)
    return (each[0] * each[1]).sum(-1)[a != b].clamp(0.0, 1.0), together[a != b].long()


def _one_step(mixture: Mixture, batch: MixtureSetBatch) -> Mixture:
    """Return mixtures after one exact EM step with diagonal covariances."""
    step = EMOperator(mixture.components, mixture.features, num_iters=1, covariance="diag", residual=False)
    start = Mixture(mixture.log_weights, mixture.means, mixture.variances().contiguous())
    return step(batch.points, batch.mask, init=start)
