"""MixtureReport: mixtures of point clouds by a trained EM operator, classical EM and scikit-learn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from em_lightning.data import PointCloudBatch
from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.plots.mixtures import component_colors, curves, mixture_grid
from em_lightning.studies.report import Report, fit_sklearn
from em_lightning.studies.results import write_results

HELD_OUT = "held-out log-likelihood (nats per point)"
FITTED = "log-likelihood of the fitted points"
OWN_UNITS = "held-out, in the data's own units"
EFFECTIVE = "effective components"
SECONDS = "ms per cloud"


class MixtureReport(Report):
    """Compare a trained :class:`~em_lightning.EMOperator` with classical EM and scikit-learn on the test clouds.

    At the end of a fit it writes to the folder of the logger: ``results.md`` and ``results.json`` (held-out
    log-likelihood, time per cloud), ``clouds.png`` (responsibilities and ellipsoids), ``samples.png``,
    ``training.png`` and ``iterations.png`` (likelihood by iteration). TensorBoard gets the same figures, a
    point-cloud view and histograms by EM iteration. The module must have an attribute ``operator``, the data module
    must be a :class:`~em_lightning.data.PointCloudDataModule`.

    Args:
        num_pictured: number of clouds in the figures.
        sklearn: whether to fit scikit-learn's ``GaussianMixture`` to every cloud, until an iteration gains less than
            ``sklearn_tol``.
        sklearn_tol: tolerance of scikit-learn's fit.
        curve_iters: number of iterations of classical EM in ``iterations.png``.
    """

    def __init__(
        self, num_pictured: int = 8, sklearn: bool = True, sklearn_tol: float = 1e-4, curve_iters: int = 20
    ) -> None:
        super().__init__()
        self.num_pictured = num_pictured
        self.sklearn = sklearn
        self.sklearn_tol = sklearn_tol
        self.curve_iters = curve_iters

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the likelihoods of the epoch."""
        logged = {stage: trainer.callback_metrics.get(f"{stage}/log_likelihood") for stage in ("train", "val")}
        found = {stage: float(value) for stage, value in logged.items() if value is not None}
        self.history.append({"step": trainer.global_step, **found})

    def report(self, trainer: Any, module: Any, folder: Path) -> None:
        """Write the table and the figures."""
        # The random starts must not depend on how the training was distributed over processes.
        torch.manual_seed(trainer.datamodule.seed)
        operator: EMOperator = module.operator
        loader = trainer.datamodule.test_dataloader()
        batches = [PointCloudBatch(*(part.to(module.device) for part in batch)) for batch in loader]
        steps = operator.num_iters
        first = batches[0]
        starts = [operator(batch.points, batch.mask, num_iters=0) for batch in batches]
        rows = [
            _measure(f"classical EM, {steps} steps, same start", operator.classical(), batches, starts),
            _measure(f"trained operator, {steps} steps", operator, batches, starts),
        ]
        if self.sklearn:
            rows.insert(1, self._measure_sklearn(operator, batches, trainer.datamodule.seed))
        clouds = sum(len(batch.points) for batch in batches)
        notes = [
            f"Data: {trainer.datamodule.describe()}. Likelihoods are of held-out points of the {clouds} test clouds, "
            f"normalized to radius 1, K = {operator.num_components}, {operator.covariance} covariance, "
            f"floor {operator.covariance_floor:g}; seed {trainer.datamodule.seed}.",
            "Times are wall-clock on this machine; the operator fits one batch of clouds at a time.",
        ]
        write_results(folder, "Mixtures of point clouds", notes, rows, seed=trainer.datamodule.seed)

        # Clouds of one class are adjacent in the batch.
        rows_shown = torch.linspace(0, len(first.points) - 1, min(self.num_pictured, len(first.points))).long()
        shown = PointCloudBatch(*(part[rows_shown] for part in first))
        mixture = operator(shown.points, shown.mask)
        names = trainer.datamodule.class_names
        titles = [names[i] if names else "" for i in shown.label.tolist()]
        samples = mixture.sample(shown.points.shape[1])
        figures = {
            "clouds": mixture_grid(shown.points, mixture, shown.mask, titles),
            "samples": mixture_grid(samples, mixture, titles=[f"{title}, sampled" for title in titles]),
            "iterations": self._iterations(operator, batches, starts, rows),
        }
        if self.history:
            series: Any = {}
            for stage in ("train", "val"):
                points = [(one["step"], one[stage]) for one in self.history if stage in one]
                series |= {stage: tuple(zip(*points, strict=True))} if points else {}
            figures["training"] = curves(series, "optimizer step", "log-likelihood per point (nats)", "Training")
        self.save_figures(trainer, figures, folder)
        _write_events(getattr(trainer.logger, "experiment", None), operator, shown)

    def _iterations(
        self, operator: EMOperator, batches: list[PointCloudBatch], starts: list[Mixture], rows: list[dict[str, Any]]
    ) -> Any:
        series = {}
        for name, each, steps in (
            ("classical EM", operator.classical(), max(self.curve_iters, operator.num_iters)),
            ("trained operator", operator, operator.num_iters),
        ):
            totals = torch.zeros(steps + 1)
            for batch, start in zip(batches, starts, strict=True):
                for i, mixture in enumerate(each.iterate(batch.points, batch.mask, init=start, num_iters=steps)):
                    totals[i] += mixture.log_prob(batch.held_out, batch.held_out_mask).sum().cpu()
            points = sum(int(batch.held_out_mask.sum()) for batch in batches)
            series[name] = (list(range(steps + 1)), (totals / points).tolist())
        levels = {row["method"]: row[HELD_OUT] for row in rows if row["method"].startswith("scikit-learn")}
        return curves(series, "EM iteration", HELD_OUT, "Likelihood by iteration", levels)

    def _measure_sklearn(self, operator: EMOperator, batches: list[PointCloudBatch], seed: int) -> dict[str, Any]:
        from rich.progress import track
        from threadpoolctl import threadpool_limits

        scores, total = [], 0.0
        clouds = [(batch, i) for batch in batches for i in range(len(batch.points))]
        for batch, i in track(clouds, "scikit-learn on every test cloud", transient=True):
            points = batch.points[i][batch.mask[i]].double().cpu().numpy()
            with threadpool_limits(1):  # several threads are slower on sets of this size
                mixture, _, seconds = fit_sklearn(
                    points,
                    min(operator.num_components, len(points)),
                    operator.covariance,
                    reg_covar=operator.covariance_floor,
                    tol=self.sklearn_tol,
                    max_iter=1000,
                    random_state=seed,
                )
            total += seconds
            one = PointCloudBatch(*(part[i : i + 1] for part in batch))
            scores.append(_scores(mixture.to(batch.points.device), one))
        return _row("scikit-learn GaussianMixture, converged", scores, total)


def _write_events(writer: Any, operator: EMOperator, clouds: PointCloudBatch) -> None:
    """Add a point-cloud view and histograms by EM iteration to TensorBoard, if the writer is one."""
    if not hasattr(writer, "add_mesh"):
        return
    for i, mixture in enumerate(operator.iterate(clouds.points, clouds.mask)):
        responsibilities = mixture.posterior(clouds.points).responsibilities
        writer.add_histogram("by EM iteration/weights of the components", mixture.weights, i)
        largest = responsibilities.amax(-1)[clouds.mask]
        writer.add_histogram("by EM iteration/largest responsibility of a point", largest, i)
    if clouds.points.shape[-1] == 3:
        colors = responsibilities.cpu() @ component_colors(operator.num_components)
        dots = {"material": {"cls": "PointsMaterial", "size": 0.03}}
        writer.add_mesh("responsibilities", clouds.points.cpu(), (255 * colors).byte(), None, dots, 0)
    writer.flush()


def _measure(
    method: str, operator: EMOperator, batches: list[PointCloudBatch], starts: list[Mixture]
) -> dict[str, Any]:
    from rich.progress import track

    scores, seconds = [], 0.0
    operator(batches[0].points, batches[0].mask)  # warm up
    for batch, start in track(list(zip(batches, starts, strict=True)), method, transient=True):
        began = time.perf_counter()
        operator(batch.points, batch.mask).means.cpu()  # waits for a GPU
        seconds += time.perf_counter() - began
        # Fit again from the common start, because random starts differ between calls.
        scores.append(_scores(operator(batch.points, batch.mask, init=start), batch))
    return _row(method, scores, seconds)


def _scores(mixture: Mixture, batch: PointCloudBatch) -> Tensor:
    """Return the metrics (4, B) of each cloud."""
    held_out = _per_point(mixture.log_prob(batch.held_out, batch.held_out_mask), batch.held_out_mask)
    fitted = _per_point(mixture.log_prob(batch.points, batch.mask), batch.mask)
    own = held_out + batch.normalization.log_jacobian()
    return torch.stack([held_out, fitted, own, torch.special.entr(mixture.weights).sum(-1).exp()]).double().cpu()


def _per_point(log_prob: Tensor, mask: Tensor) -> Tensor:
    return log_prob.sum(-1) / mask.sum(-1).clamp(min=1)


def _row(method: str, scores: list[Tensor], seconds: float) -> dict[str, Any]:
    clouds = torch.cat(scores, 1)
    means = zip((HELD_OUT, FITTED, OWN_UNITS, EFFECTIVE), clouds.mean(1).tolist(), strict=True)
    return {"method": method, **dict(means), SECONDS: 1e3 * seconds / clouds.shape[1]}
