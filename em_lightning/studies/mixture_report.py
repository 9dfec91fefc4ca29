"""MixtureReport: compares the trained point-cloud operator with classical fits tuned for each cloud size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from em_lightning.data import PointCloudBatch
from em_lightning.plots import curves, mixture_grid
from em_lightning.studies.density_fits import (
    TRAINED,
    Clouds,
    Result,
    baselines,
    learned,
    measure,
    sklearn_mixtures,
    tune,
)
from em_lightning.studies.page import mixture_page
from em_lightning.studies.report import Findings, Report

_LABEL = "held-out log-likelihood per point (nats)"


class MixtureReport(Report):
    """Compare a trained :class:`~em_lightning.modules.PointCloudGMM` with tuned classical fits, by cloud size.

    The table has the held-out log-likelihood and the time per cloud of each method. The figures are ``sizes``
    (likelihood by number of points), ``times`` (likelihood by time), ``clouds`` and ``training``; ``report.html`` shows
    rotatable clouds and ellipsoids. The settings of the classical fits are tuned on the validation clouds of each size.

    Args:
        sizes: numbers of points; those above the size of the data's clouds are left out.
        num_pictured: number of clouds in the figures and in ``report.html``.
        sklearn: whether to fit scikit-learn's ``GaussianMixture``.
    """

    def __init__(self, sizes: Sequence[int] = (32, 128, 512), num_pictured: int = 8, sklearn: bool = True) -> None:
        super().__init__()
        self.sizes = sizes
        self.num_pictured = num_pictured
        self.sklearn = sklearn

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the likelihoods of the epoch."""
        logged = {stage: trainer.callback_metrics.get(f"{stage}/log_likelihood") for stage in ("train", "val")}
        found = {stage: float(value) for stage, value in logged.items() if value is not None}
        self.history.append({"step": trainer.global_step, **found})

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        """Measure all methods and draw the figures."""
        data = trainer.datamodule
        # The random starts must not depend on how the training was distributed over processes.
        torch.manual_seed(data.seed)
        splits = [
            [PointCloudBatch(*(part.to(module.device) for part in batch)) for batch in loader]
            for loader in (data.val_dataloader(), data.test_dataloader())
        ]
        found: dict[int, dict[str, Result]] = {}
        for size in self.sizes:
            val, test = (clouds_of(batches, size) for batches in splits)
            if len(val.points) and len(test.points):
                found[size] = self._compare(module, val, test, size)
        if not found:
            raise ValueError(f"sizes={tuple(self.sizes)} must hold one that validation and test clouds have")
        verdict = verdict_by_size(
            {size: {name: each.scores for name, each in row.items()} for size, row in found.items()}
        )
        notes = [
            f"Data: {data.describe()}. Held-out log-likelihood per point in nats of the test clouds, normalized to "
            f"radius 1, K = {module.operator.num_components}, by number of fitted points N, and milliseconds per cloud "
            f"on this machine; seed {data.seed}. Tuned methods: settings of the highest mean on the validation clouds "
            f"of each size.",
            verdict,
        ]
        settings = {size: {name: dict(each.setting) for name, each in row.items()} for size, row in found.items()}
        batch = splits[1][0]  # clouds of one class are adjacent in it
        rows = torch.linspace(0, len(batch.points) - 1, min(self.num_pictured, len(batch.points))).long()
        shown = PointCloudBatch(*(part[rows] for part in batch))
        titles = [data.class_names[i] for i in shown.label.tolist()]
        mixture = module(shown.points, shown.mask)
        figures = {**self._curves(found), "clouds": mixture_grid(shown.points, mixture, shown.mask, titles)}
        mixture_page(folder / "report.html", list(_scenes(module, shown, titles, self.sklearn)))
        facts = {"seed": data.seed, "settings": settings}
        return Findings("Mixtures of point clouds", notes, table(found), verdict, figures, facts)

    def _compare(self, module: Any, val: Clouds, test: Clouds, size: int) -> dict[str, Result]:
        from rich.progress import track

        methods = [each for each in baselines(size) if self.sklearn or "scikit" not in each.name] + [learned(module)]
        components, found = module.operator.num_components, {}
        for method in track(methods, f"fits of {size} points", transient=True):
            found[method.name] = measure(method, test, components, tune(method, val, components))
        return found

    def _curves(self, found: Mapping[int, Mapping[str, Result]]) -> dict[str, Any]:
        # Of the EM fits only the tuned ones, so that curves can be told apart.
        names = [name for name in next(iter(found.values())) if not name.startswith("EM, ") or "tuned" in name]
        likelihoods = {name: [float(row[name].scores.mean()) for row in found.values()] for name in names}
        seconds = {name: [1e3 * row[name].seconds for row in found.values()] for name in names}
        by_size = {name: (list(found), likelihoods[name]) for name in names}
        by_time = {name: (seconds[name], likelihoods[name]) for name in names}
        figures = {
            "sizes": curves(by_size, "number of points", _LABEL, log_x=True),
            "times": curves(by_time, "ms per cloud", _LABEL, log_x=True),
        }
        lines = {}
        for stage in ("train", "val"):
            epochs = [epoch for epoch in self.history if stage in epoch]
            if epochs:
                lines[stage] = ([epoch["step"] for epoch in epochs], [epoch[stage] for epoch in epochs])
        return {**figures, "training": curves(lines, "optimizer step", _LABEL, "Training")} if lines else figures


def clouds_of(batches: Sequence[PointCloudBatch], size: int) -> Clouds:
    """Return the first ``size`` points of the clouds that have so many, and an equal number of held-out points."""
    count = min(int(batch.held_out_mask.sum(1).min()) for batch in batches)
    kept = [(batch, batch.mask.sum(1) >= size) for batch in batches if batch.points.shape[1] >= size]
    if not kept:
        return Clouds(batches[0].points[:0], batches[0].held_out[:0])
    return Clouds(
        torch.cat([batch.points[keep, :size] for batch, keep in kept]),
        torch.cat([batch.held_out[keep, :count] for batch, keep in kept]),
    )


def table(found: Mapping[int, Mapping[str, Result]]) -> list[dict[str, Any]]:
    """Return one row per method: likelihoods by size, then times by size."""
    rows = []
    for name in next(iter(found.values())):
        likelihoods = {f"N = {size}": float(row[name].scores.mean()) for size, row in found.items()}
        times = {f"ms, N = {size}": 1e3 * row[name].seconds for size, row in found.items()}
        rows.append({"method": name, **likelihoods, **times})
    return rows


def verdict_by_size(scores: Mapping[int, Mapping[str, Tensor]]) -> str:
    """Return a sentence that compares the trained operator with the best classical fit at each size.

    Example:
        >>> verdict_by_size({32: {"EM": torch.zeros(2), "trained operator": torch.tensor([0.9, 1.1])}})
        'The trained operator is above every classical fit at 32 points (+1.000 ± 0.100 over EM).'
    """
    above: list[str] = []
    not_above: list[str] = []
    for size, row in scores.items():
        best = max((name for name in row if name != TRAINED), key=lambda name: float(row[name].mean()))
        gain = row[TRAINED] - row[best]
        error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else math.nan
        sizes = above if gain.mean() > 0 else not_above
        sizes.append(f"{size} points ({float(gain.mean()):+.3f} ± {error:.3f} over {best})")
    verdicts = {"is above": above, "is not above": not_above}
    parts = [f"{verdict} every classical fit at {', '.join(sizes)}" for verdict, sizes in verdicts.items() if sizes]
    return f"The {TRAINED} {' and '.join(parts)}."


def _scenes(module: Any, batch: PointCloudBatch, titles: Sequence[str], sklearn: bool) -> Any:
    """Yield the clouds of the page: points, held-out points and the mixtures of each method after each iteration."""
    for i, title in enumerate(titles):
        points, held_out = (
            batch.points[i : i + 1][:, batch.mask[i]],
            batch.held_out[i : i + 1][:, batch.held_out_mask[i]],
        )
        total = module.exact_iters + module.operator.num_iters
        methods = {
            "classical EM": list(module.operator.classical().iterate(points, num_iters=total)),
            TRAINED: list(module.iterate(points)),
        }
        if sklearn:
            methods["scikit-learn GaussianMixture"] = sklearn_mixtures(points, module.operator.num_components)
        yield title, points, held_out, methods
