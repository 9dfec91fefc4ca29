"""SelectionReport: compares a fitted mixture with others by likelihood, BIC and AIC."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from em_lightning.data import GaussianBlobs, TabularDataModule
from em_lightning.mixture import Mixture, fit_blocks, information_criteria
from em_lightning.operators import EMOperator
from em_lightning.plots import curves, mixture_grid
from em_lightning.studies.report import Findings, Report, fit_sklearn

_PICTURED = 4000


class SelectionReport(Report):
    """Compare a fitted :class:`~em_lightning.modules.GaussianMixtureModule` with others by likelihood, BIC and AIC.

    The table has a row for this run, for scikit-learn's mixture with as many components, for the mixture that the data
    were drawn from if it is known, and for EM with other numbers of components, each measured on all rows. The figures
    are ``components`` (rows and components in the plane in which the means differ most), ``selection`` (BIC by the
    number of components) and ``likelihood``. The data module must be a :class:`~em_lightning.data.TabularDataModule`.

    Args:
        components: further numbers of components, fitted by EM with the same ``init``.
        max_iters: maximum number of iterations of each of these fits.
        sklearn_rows: largest number of rows to which scikit-learn's mixture is fitted; 0 never fits it.
    """

    def __init__(self, components: Sequence[int] = (), max_iters: int = 50, sklearn_rows: int = 200_000) -> None:
        super().__init__()
        if any(size < 1 for size in components):
            raise ValueError(f"components={list(components)} must be at least 1 each")
        self.components = list(components)
        self.max_iters = max_iters
        self.sklearn_rows = sklearn_rows

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Record the start time of an epoch."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the likelihood and the time of an epoch; an epoch resumed in its middle adds no time."""
        seconds = time.perf_counter() - getattr(self, "_began", time.perf_counter())
        self.history.append({"log_likelihood": float(pl_module.log_likelihood), "seconds": seconds})

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        """Measure all mixtures and draw the figures."""
        data: TabularDataModule = trainer.datamodule
        mixture: Mixture = module.mixture.to("cpu")
        own = f"this run ({module.method}, {trainer.world_size} process{'es' if trainer.world_size > 1 else ''})"
        levels, seconds = [one["log_likelihood"] for one in self.history], sum(one["seconds"] for one in self.history)
        rows = [_row(own, mixture, data, int(module.iterations), seconds)]
        truth = {}
        if isinstance(data, GaussianBlobs):
            rows.append(_row("the mixture the rows were drawn from", data.truth(), data))
            truth = {rows[1]["mixture"]: rows[1]["BIC"]}
        if len(data.tables["train"]) <= self.sklearn_rows and data.tables.get("weights") is None:
            rows.append(self._sklearn(module, mixture, data))
        others = [self._other(size, module, data) for size in self.components]
        notes = [
            f"Data: {data.describe()}. {module.covariance} covariance, floor {module.covariance_floor:g}, tol "
            f"{module.tol:g} nats per row; seed {module.seed}. Likelihoods are in nats per row, BIC and AIC of the "
            f"fitted rows, lower is better. EM starts by {module.hparams['init']} in {module.sample_size:,} rows, "
            f"scikit-learn by its own default; seconds are wall-clock on this machine, for this run with the Trainer.",
        ]
        figures = {"components": _picture(mixture, data)}
        if levels:
            series = {"this run": (list(range(1, len(levels) + 1)), levels)}
            figures["likelihood"] = curves(series, "epoch", "log-likelihood (nats per row)", "Training")
        tried = sorted((row["K"], row["BIC"]) for row in [rows[0], *others])
        sizes, criteria = zip(*tried, strict=True)
        if others:
            figures["selection"] = curves(
                {"EM": (sizes, criteria)}, "number of components K", "BIC", "Selection", truth
            )
        size, best = min(tried, key=lambda pair: pair[1])
        verdict = f"BIC is lowest for K = {size} of {list(sizes)}: {best}."
        facts = {"seed": module.seed}
        return Findings("One mixture of one data set", notes, rows + others, verdict, figures, facts)

    def _other(self, size: int, module: Any, data: TabularDataModule) -> dict[str, Any]:
        blocks = data.blocks(whole=True)
        points, weights = blocks.sample(module.sample_size, module.seed)
        init = module.hparams["init"]
        operator = EMOperator(
            size,
            data.num_features,
            covariance=module.covariance,
            init=init,
            seed=None if init == "farthest" else module.seed,
            covariance_floor=module.covariance_floor,
            residual=False,
        )
        began = time.perf_counter()
        counts = None if weights is None else weights[None].double()
        start = operator(points[None].double(), weights=counts, num_iters=0)
        fit = fit_blocks(lambda: blocks, start, max_iters=self.max_iters, tol=module.tol, floor=module.covariance_floor)
        return _row("EM", fit.mixture, data, len(fit.log_likelihoods), time.perf_counter() - began)

    def _sklearn(self, module: Any, mixture: Mixture, data: TabularDataModule) -> dict[str, Any]:
        from sklearn.mixture import GaussianMixture

        table = data.tables["train"]
        options = {"reg_covar": module.covariance_floor, "tol": module.tol, "random_state": module.seed}
        estimator = GaussianMixture(
            mixture.components, covariance_type=module.covariance, max_iter=self.max_iters, **options
        )
        found, seconds = fit_sklearn(estimator, table.rows(0, len(table)).cpu().numpy())
        return _row("scikit-learn", found, data, estimator.n_iter_, seconds)


def _row(
    name: str, mixture: Mixture, data: TabularDataModule, iterations: int | str = "", seconds: float | str = ""
) -> dict[str, Any]:
    total, mass = _likelihood(mixture, data, "train")
    found = information_criteria(mixture, total, mass)
    held_out: float | str = ""
    if "held_out" in data.tables:
        likelihood, count = _likelihood(mixture, data, "held_out")
        held_out = round(likelihood / count, 5)
    return {
        "mixture": name,
        "K": mixture.means.shape[1],
        "parameters": mixture.num_parameters,
        "log-likelihood": round(total / mass, 5),
        "held out": held_out,
        "BIC": round(found.bic),
        "AIC": round(found.aic),
        "iterations": iterations,
        "seconds": seconds,
    }


def _likelihood(mixture: Mixture, data: TabularDataModule, split: str) -> tuple[float, float]:
    total = mass = 0.0
    for points, weights in data.blocks(split, whole=True):
        log_prob = mixture.log_prob(points[None])[0].double()
        total += float(log_prob.sum() if weights is None else (log_prob * weights).sum())
        mass += len(points) if weights is None else float(weights.sum())
    return total, mass


def _picture(mixture: Mixture, data: TabularDataModule) -> Any:
    """Draw rows and components in the plane of the two largest principal axes of the means."""
    points = data.blocks(whole=True).sample(_PICTURED).points.double()
    middle = mixture.means.mean(1)
    axes = torch.linalg.svd(mixture.means[0] - middle, full_matrices=True).Vh[: min(2, points.shape[1])].T
    if axes.shape[1] < 2:
        axes = torch.cat([axes, torch.zeros_like(axes)], 1)
    covariances = axes.T @ mixture.full().covariances @ axes
    flat = Mixture(mixture.log_weights, mixture.means @ axes, covariances + 1e-9 * torch.eye(2).double())
    return mixture_grid((points @ axes)[None], flat, titles=["rows and components"])
