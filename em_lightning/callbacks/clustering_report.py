"""The tables at the end of a run of amortized clustering."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from em_lightning.data import MixtureSetBatch, MixtureSets
from em_lightning.files import write_whole
from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.results import markdown_table, write_results

METHOD = "method"
LL0, LL1, GAP = "LL0", "LL1", "LL1 - oracle"
HELD_OUT, HELD_OUT_GAP = "held out", "held out - oracle"
ARI, CALIBRATION, SECONDS = "adjusted Rand", "calibration error", "ms a set"

# Lee et al. 2019, supplement, table 5: LL0, LL1, and LL1 less the oracle's of the same paper.
PUBLISHED = {
    "published: rFF + pooling": (-2.0006, -1.6186, -0.146),
    "published: SAB + PMA": (-1.5145, -1.4619, 0.011),
    "published: ISAB(32) + PMA": (-1.4963, -1.4524, 0.020),
}
_PAIRS = 500

# A fit returns mixtures, and the log-density of fresh points.
Fit = Callable[[MixtureSetBatch], tuple[Mixture, Tensor]]


class ClusteringReport(lightning.Callback):
    """Compare a trained :class:`~em_lightning.modules.AmortizedClustering` with classical EM and the true mixtures.

    At the end of a fit it writes ``results.md`` and ``results.json`` to the folder of the logger, from the test sets:
    the log-likelihood of a point of the fitted set under the output (LL0) and after one exact EM step with diagonal
    covariances (LL1), that of fresh points, the adjusted Rand index of the largest responsibilities, and the expected
    calibration error of "these two points belong together", whose probability is ``sum_k r_nk r_mk``. A second table
    has sets of other sizes and other numbers of components than those of the training.

    Args:
        classical: whether to measure classical EM too.
        sizes: numbers of points of the second table.
        components: numbers of components of the second table.
        transfer_sets: sets for each of its rows; 0 leaves it out.
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

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure and write."""
        if trainer.fast_dev_run or not trainer.is_global_zero or trainer.interrupted:
            return
        folder = Path(getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir)
        training = pl_module.training
        pl_module.eval()
        data: MixtureSets = trainer.datamodule
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(data.seed)
            batches = [_on(batch, pl_module.device) for batch in data.test_dataloader()]
            rows = [_measure("oracle", lambda batch: _plain(batch.truth, batch), batches)]
            if self.classical:
                for name, fit in _classical(data):
                    rows.append(_measure(name, fit, batches))
            rows.append(_measure("trained operator", lambda batch: _trained(pl_module, batch), batches))
            for row in rows:
                row[GAP] = row[LL1] - rows[0][LL1 if row is rows[0] else LL0]
                row[HELD_OUT_GAP] = row[HELD_OUT] - rows[0][HELD_OUT]
            rows += [{**dict.fromkeys(rows[0], "-"), **_published(name)} for name in PUBLISHED]
            transfer = self._transfer(pl_module, data)
        learned = pl_module.operator.prior
        parameters = sum(value.numel() for value in pl_module.parameters())
        notes = [
            f"Data: {data.describe()}; {data.num_sets['test']} test sets, {data.fresh['test']} fresh points each, seed "
            f"{data.seed}. Likelihoods are nats a point. LL0 is of the fitted points under the output, LL1 after one "
            f"exact EM step of it with diagonal covariances; both are compared with the true mixtures' LL0. Published "
            f"rows are of other test sets: their gap alone can be compared.",
            f"The operator has {parameters:,} parameters; what its prior learned: {learned!r}.",
        ]
        text = write_results(
            folder, "Amortized clustering", notes, rows, seed=data.seed, parameters=parameters, transfer=transfer
        )
        if transfer:
            more = "\n## Sets unlike those of the training\n\n" + markdown_table(transfer) + "\n"
            write_whole(folder / "results.md", text + more)
            text += more
        print(f"\n{text}\nWritten to {folder}")
        pl_module.train(training)

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


def _published(name: str) -> dict[str, Any]:
    first, second, gap = PUBLISHED[name]
    return {METHOD: name, LL0: first, LL1: second, GAP: gap}


def _on(batch: MixtureSetBatch, device: Any) -> MixtureSetBatch:
    truth = Mixture(*(part.to(device) for part in batch.truth))
    points, mask, held_out, labels = (part.to(device) for part in batch[:4])
    return MixtureSetBatch(points, mask, held_out, labels, truth)


def _operator(data: MixtureSets, **arguments: Any) -> EMOperator:
    arguments = {"num_iters": 100, "covariance": "diag", **arguments}
    return EMOperator(data.num_components, data.num_features, residual=False, **arguments).eval()


def _classical(data: MixtureSets) -> Iterator[tuple[str, Fit]]:
    told = {"mean_strength": 0.0, "covariance_strength": 1000.0, "covariance": [data.scale**2] * data.num_features}
    for name, operator in {
        "EM from random points, 100 steps": _operator(data, init="random"),
        "EM from k-means++, 100 steps": _operator(data, init="kmeans++"),
        "EM from farthest points, 1 step": _operator(data, num_iters=1),
        "EM from farthest points, 25 steps": _operator(data, num_iters=25),
        "EM from farthest points, 50 steps": _operator(data, num_iters=50),
        "EM, best of 10 k-means++, 100 steps": _operator(data, init="kmeans++", num_starts=10),
        "MAP told sigma, farthest points, 25 steps": _operator(data, num_iters=25, prior=told),
    }.items():
        yield name, _fit_of(operator)


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
    covariances = mixture.covariances
    if mixture.covariance_type == "full":
        covariances = covariances.diagonal(dim1=-2, dim2=-1)
    elif mixture.covariance_type == "spherical":
        covariances = covariances.unsqueeze(-1).expand_as(mixture.means)
    step = EMOperator(components, features, num_iters=1, covariance="diag", residual=False)
    return step(batch.points, batch.mask, init=mixture._replace(covariances=covariances.contiguous()))
