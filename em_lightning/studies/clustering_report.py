"""ClusteringReport: amortized clustering compared with classical EM and the true mixtures."""

from __future__ import annotations

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
from em_lightning.studies.results import markdown_table, print_markdown, write_results

METHOD = "method"
LL0, LL1, GAP = "LL0", "LL1", "LL1 - oracle"
HELD_OUT, HELD_OUT_GAP = "held out", "held out - oracle"
ARI, CALIBRATION, SECONDS = "adjusted Rand", "calibration error", "ms per set"

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

    def report(self, trainer: Any, module: Any, folder: Path) -> None:
        """Measure and write."""
        data: MixtureSets = trainer.datamodule
        torch.manual_seed(data.seed)
        batches = [_on(batch, module.device) for batch in data.test_dataloader()]
        rows = [_measure("oracle", lambda batch: _plain(batch.truth, batch), batches)]
        if self.classical:
            rows += [_measure(name, _fit_of(operator), batches) for name, operator in _classical(data).items()]
        rows.append(_measure("trained operator", lambda batch: _trained(module, batch), batches))
        for row in rows:
            row[GAP] = row[LL1] - rows[0][LL1 if row is rows[0] else LL0]
            row[HELD_OUT_GAP] = row[HELD_OUT] - rows[0][HELD_OUT]
        for name, (first, second, gap) in PUBLISHED.items():
            rows.append({**dict.fromkeys(rows[0], "-"), METHOD: name, LL0: first, LL1: second, GAP: gap})
        transfer = self._transfer(module, data)
        parameters = sum(value.numel() for value in module.parameters())
        notes = [
            f"Data: {data.describe()}; {data.num_sets['test']} test sets, {data.fresh['test']} held-out points each, "
            f"seed {data.seed}. Likelihoods are in nats per point. LL0 is of the fitted points under the output, LL1 "
            f"after one exact EM step with diagonal covariances; both are compared with the true mixtures' LL0. The "
            f"published rows are of other test sets, so that only their gap can be compared.",
            f"The operator has {parameters:,} parameters; its learned prior: {module.operator.prior!r}.",
        ]
        facts = {"seed": data.seed, "parameters": parameters, "transfer": transfer}
        text = write_results(folder, "Amortized clustering", notes, rows, **facts)
        if transfer:
            more = "\n## Sets unlike the training sets\n\n" + markdown_table(transfer) + "\n"
            write_whole(folder / "results.md", text + more)
            print_markdown(more)

    def _transfer(self, module: Any, data: MixtureSets) -> list[dict[str, Any]]:
        if not self.transfer_sets:
            return []
        others: list[tuple[int | None, int]] = [(size, data.num_components) for size in self.sizes]
        others += [(None, components) for components in self.components]
        rows = []
        for size, components in others:
            low, high = (data.min_points, data.max_points) if size is None else (size, size)
            other = MixtureSets(
                components,
                data.num_features,
                low,
                high,
                data.extent,
                data.scale,
                data.concentration,
                test_sets=self.transfer_sets,
                held_out=data.fresh["test"],
                seed=data.seed,
            )
            batches = [_on(batch, module.device) for batch in other.test_dataloader()]
            fitted = module if components == data.num_components else module.for_components(components)
            oracle = _measure("oracle", lambda batch: _plain(batch.truth, batch), batches)
            row: dict[str, Any] = {"points": str(size or f"{low} to {high}"), "K": str(components)}
            kmeans = _operator(other, init="kmeans++", num_starts=10)
            for name, fit in (("best of 10", _fit_of(kmeans)), ("trained", functools.partial(_trained, fitted))):
                found = _measure(name, fit, batches)
                row[f"{name}: LL1 - oracle"] = found[LL1] - oracle[LL0]
                row[f"{name}: held out - oracle"] = found[HELD_OUT] - oracle[HELD_OUT]
                row[f"{name}: adjusted Rand"] = found[ARI]
            rows.append(row)
        return rows


def _on(batch: MixtureSetBatch, device: Any) -> MixtureSetBatch:
    moved: Any = (part.to(device) for part in batch)
    return MixtureSetBatch(*moved)


def _operator(data: MixtureSets, **arguments: Any) -> EMOperator:
    arguments = {"num_iters": 100, "covariance": "diag", **arguments}
    return EMOperator(data.num_components, data.num_features, residual=False, **arguments).eval()


def _classical(data: MixtureSets) -> dict[str, EMOperator]:
    sigma = {"mean_strength": 0.0, "covariance_strength": 1000.0, "covariance": [data.scale**2] * data.num_features}
    return {
        "EM from random points, 100 steps": _operator(data, init="random"),
        "EM from k-means++, 100 steps": _operator(data, init="kmeans++"),
        "EM from farthest points, 1 step": _operator(data, num_iters=1),
        "EM from farthest points, 25 steps": _operator(data, num_iters=25),
        "EM from farthest points, 50 steps": _operator(data, num_iters=50),
        "EM, best of 10 k-means++, 100 steps": _operator(data, init="kmeans++", num_starts=10),
        "MAP with known sigma, farthest points, 25 steps": _operator(data, num_iters=25, prior=sigma),
    }


def _fit_of(operator: EMOperator) -> Fit:
    return lambda batch: _plain(operator(batch.points, batch.mask), batch)


def _plain(mixture: Mixture, batch: MixtureSetBatch) -> tuple[Mixture, Tensor]:
    return mixture, mixture.log_prob(batch.held_out)


def _trained(module: Any, batch: MixtureSetBatch) -> tuple[Mixture, Tensor]:
    mixture = module(batch.points, batch.mask)
    return mixture, module.log_prob(mixture, batch.held_out, batch.points, batch.mask)


def _measure(name: str, fit: Fit, batches: list[MixtureSetBatch]) -> dict[str, Any]:
    from torchmetrics.classification import BinaryCalibrationError
    from torchmetrics.functional.clustering import adjusted_rand_score

    calibration = BinaryCalibrationError().to(batches[0].points.device)
    sums = {LL0: 0.0, LL1: 0.0, HELD_OUT: 0.0, ARI: 0.0}
    sets, seconds = 0, 0.0
    for batch in batches:
        start = time.perf_counter()
        mixture, held_out = fit(batch)
        seconds += time.perf_counter() - start
        sets += len(batch.points)
        sizes = batch.mask.sum(-1)
        for key, one in ((LL0, mixture), (LL1, _one_step(mixture, batch))):
            sums[key] += float((one.log_prob(batch.points, batch.mask).sum(-1) / sizes).sum())
        sums[HELD_OUT] += float(held_out.mean(-1).sum())
        responsibilities = mixture.posterior(batch.points).responsibilities
        found = responsibilities.argmax(-1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse invariant checks")  # of a tensor that torchmetrics makes
            for one, labels, mask in zip(found, batch.labels, batch.mask, strict=True):
                sums[ARI] += float(adjusted_rand_score(one[mask], labels[mask]))
        pair = torch.rand(2, len(sizes), _PAIRS, device=sizes.device) * sizes[:, None]
        a, b = pair.long().unbind(0)
        wide = (len(sizes), _PAIRS, responsibilities.shape[-1])
        shares = [responsibilities.gather(1, index.unsqueeze(-1).expand(wide)) for index in (a, b)]
        together = batch.labels.gather(1, a) == batch.labels.gather(1, b)
        apart = a != b
        calibration.update((shares[0] * shares[1]).sum(-1)[apart].clamp(0.0, 1.0), together[apart].long())
    return {
        METHOD: name,
        LL0: sums[LL0] / sets,
        LL1: sums[LL1] / sets,
        GAP: 0.0,
        HELD_OUT: sums[HELD_OUT] / sets,
        HELD_OUT_GAP: 0.0,
        ARI: sums[ARI] / sets,
        CALIBRATION: float(calibration.compute()),
        SECONDS: 1e3 * seconds / sets,
    }


def _one_step(mixture: Mixture, batch: MixtureSetBatch) -> Mixture:
    """Return mixtures after one exact EM step with diagonal covariances."""
    _, components, features = mixture.means.shape
    step = EMOperator(components, features, num_iters=1, covariance="diag", residual=False)
    return step(
        batch.points, batch.mask, init=Mixture(mixture.log_weights, mixture.means, mixture.variances().contiguous())
    )
