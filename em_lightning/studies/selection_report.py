"""SelectionReport: compares a fitted mixture with other mixtures by likelihood, BIC and AIC."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from em_lightning.data import TabularDataModule
from em_lightning.metrics import MixtureLogLikelihood
from em_lightning.mixture import Mixture, fit_blocks, information_criteria
from em_lightning.modules.gaussian_mixture import initial_mixture
from em_lightning.plots import mixture_grid
from em_lightning.studies.density_fits import fit_sklearn
from em_lightning.studies.gaussian_blobs import GaussianBlobs
from em_lightning.studies.report import Findings, Report, curves

_NUM_PICTURED = 4000  # rows; more dots merge


class SelectionReport(Report):
    """Compare a :class:`~em_lightning.modules.GaussianMixtureModule` with other mixtures by likelihood, BIC and AIC.

    The table has a row for this run, for scikit-learn's mixture with as many components, for the mixture that the data
    were drawn from if it is known, and for EM with other numbers of components, each measured on all rows. The figures
    are ``components`` (rows and components in the plane in which the means differ most), ``selection`` (BIC by the
    number of components) and ``training``. The data module must be a :class:`~em_lightning.data.TabularDataModule`.

    Args:
        components: further numbers of components, fitted by EM with the same ``init`` and ``num_starts``.
        max_iters: maximum number of iterations of each of these fits and of scikit-learn's.
        sklearn_rows: largest number of unweighted rows to which scikit-learn's mixture is fitted; 0 never fits it.
    """

    def __init__(self, components: Sequence[int] = (), max_iters: int = 50, sklearn_rows: int = 200_000) -> None:
        super().__init__()
        if any(size < 1 for size in components):
            raise ValueError(f"components={list(components)} must be at least 1 each")
        self.components = list(components)
        self.max_iters = max_iters
        self.sklearn_rows = sklearn_rows
        self._before = self._began = 0.0  # seconds of training before a resumption; clock at the start, less these

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seconds": time.perf_counter() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._before = state_dict["seconds"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._began = time.perf_counter() - self._before

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the likelihood of an epoch, and the seconds since the previous record."""
        seconds = time.perf_counter() - self._began - sum(epoch["seconds"] for epoch in self.history)
        likelihood = float(pl_module.log_likelihood)
        self.history.append({"epoch": trainer.current_epoch + 1, "log_likelihood": likelihood, "seconds": seconds})

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        data: TabularDataModule = trainer.datamodule
        mixture: Mixture = module.mixture.to("cpu")
        name = f"this run ({module.method}, {trainer.world_size} process{'es' if trainer.world_size > 1 else ''})"
        seconds = sum(epoch["seconds"] for epoch in self.history)
        rows = [_row(name, mixture, data, int(module.iterations), seconds)]
        bic_of_truth = {}
        if isinstance(data, GaussianBlobs):
            rows.append(_row("the mixture the rows were drawn from", data.truth(), data))
            bic_of_truth = {rows[-1]["mixture"]: rows[-1]["BIC"]}
        if len(data.tables["train"]) <= self.sklearn_rows and data.tables.get("weights") is None:
            rows.append(self._sklearn(module, data))
        others = [self._em(num_components, module, data) for num_components in self.components]
        notes = [
            f"Data: {data.describe()}. {module.covariance} covariance, floor {module.covariance_floor:g}, tol "
            f"{module.tol:g} nats per row; seed {module.seed}. Likelihoods are in nats per row. BIC and AIC are of the "
            f"fitted rows; lower is better. EM starts with {module.hparams['init']} on {module.sample_size:,} rows, "
            f"scikit-learn with its own default. Seconds are wall-clock on this machine; those of this run include the "
            "Trainer, but not training that an interruption lost: what followed the last checkpoint before it.",
        ]
        bic = {row["K"]: row["BIC"] for row in sorted([rows[0], *others], key=lambda row: row["K"])}
        figures = {"components": _picture(mixture, data)}
        if others:
            series = {"EM": (list(bic), list(bic.values()))}
            figures["selection"] = curves(series, "number of components K", "BIC", "Selection", bic_of_truth)
        best = min(bic, key=lambda num_components: bic[num_components])
        verdict = f"BIC is lowest for K = {best} of {list(bic)}: {bic[best]}."
        return Findings("One mixture of one data set", notes, rows + others, verdict, figures, {"seed": module.seed})

    def _em(self, num_components: int, module: Any, data: TabularDataModule) -> dict[str, Any]:
        """Return the row of EM with another number of components."""
        blocks = data.blocks(whole=True)
        rows = blocks.sample(module.sample_size, module.seed)
        began = time.perf_counter()
        start, _, _ = initial_mixture(rows, module.make_operator(num_components=num_components))
        options = {"max_iters": self.max_iters, "tol": module.tol, "floor": module.covariance_floor}
        fit = fit_blocks(lambda: blocks, start, **options)
        return _row("EM", fit.mixture, data, len(fit.log_likelihoods), time.perf_counter() - began)

    def _sklearn(self, module: Any, data: TabularDataModule) -> dict[str, Any]:
        """Return the row of scikit-learn's mixture with as many components as the module's."""
        from sklearn.mixture import GaussianMixture

        options = {"covariance_type": module.covariance, "reg_covar": module.covariance_floor, "tol": module.tol}
        options |= {"max_iter": self.max_iters, "random_state": module.seed}
        estimator = GaussianMixture(module.mixture.components, **options)
        rows = data.tables["train"].rows(0, len(data.tables["train"])).cpu().numpy()
        began = time.perf_counter()
        mixture = fit_sklearn(estimator, rows)
        return _row("scikit-learn", mixture, data, estimator.n_iter_, time.perf_counter() - began)


def _row(
    name: str, mixture: Mixture, data: TabularDataModule, iterations: int | str = "", seconds: float | str = ""
) -> dict[str, Any]:
    total, mass = _log_likelihood(mixture, data, "train")
    criteria = information_criteria(mixture, total, mass)
    held_out: float | str = ""
    if "held_out" in data.tables:
        held_out_total, held_out_mass = _log_likelihood(mixture, data, "held_out")
        held_out = round(held_out_total / held_out_mass, 5)
    return {
        "mixture": name,
        "K": mixture.means.shape[1],
        "parameters": mixture.num_parameters,
        "log-likelihood": round(total / mass, 5),
        "held out": held_out,
        "BIC": round(criteria.bic),
        "AIC": round(criteria.aic),
        "iterations": iterations,
        "seconds": seconds,
    }


def _log_likelihood(mixture: Mixture, data: TabularDataModule, split: str) -> list[float]:
    """Return the weighted sum of the log-likelihoods of all rows of a split, and the sum of the weights."""
    metric = MixtureLogLikelihood()
    for points, weights in data.blocks(split, whole=True):
        metric.update(mixture.log_prob(points[None])[0], weights=weights)
    return metric.sums[:2].tolist()


def _picture(mixture: Mixture, data: TabularDataModule) -> Any:
    """Draw rows and components in the plane of the two largest principal axes of the means."""
    points = data.blocks(whole=True).sample(_NUM_PICTURED).points.double()
    _, _, axes = torch.linalg.svd(mixture.means[0] - mixture.means.mean(1), full_matrices=True)
    plane = torch.zeros(points.shape[1], 2).double()  # with one feature, the second axis stays empty
    plane[:, : len(axes[:2])] = axes[:2].mT
    # 1e-9, chosen, keeps the variance along an empty axis positive.
    covariances = plane.mT @ mixture.full().covariances @ plane + 1e-9 * torch.eye(2).double()
    projected = Mixture(mixture.log_weights, mixture.means @ plane, covariances)
    return mixture_grid((points @ plane)[None], projected, titles=["rows and components"])
