"""MixtureReport: compares the trained point-cloud operator with classical fits tuned for each cloud size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from em_lightning.data import PointCloudBatch
from em_lightning.mixture import Mixture
from em_lightning.plots import mixture_grid
from em_lightning.studies.density_fits import FIXED_STEPS, TRAINED, Clouds, Result, compare, sklearn_mixtures
from em_lightning.studies.page import scene, write_page
from em_lightning.studies.report import Findings, Report, batches_on, curves

Results = Mapping[int, Mapping[str, Result]]  # by size, then by method

_LIKELIHOOD = "held-out log-likelihood per point (nats)"


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
        """Record the likelihoods of the epoch, which the figure ``training`` shows."""
        logged = trainer.callback_metrics
        names = [name for name in ("train/log_likelihood", "val/log_likelihood") if name in logged]
        self.history.append({"epoch": trainer.current_epoch + 1, **{name: float(logged[name]) for name in names}})

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        data = trainer.datamodule
        # The random starts must not depend on how the training was distributed over processes.
        torch.manual_seed(data.seed)
        val, test = (batches_on(module.device, loader) for loader in (data.val_dataloader(), data.test_dataloader()))
        results: dict[int, dict[str, Result]] = {}
        for size in self.sizes:
            val_clouds, test_clouds = clouds_of(val, size), clouds_of(test, size)
            if val_clouds and test_clouds:
                results[size] = compare(module, val_clouds, test_clouds, self.sklearn)
        if not results:
            raise ValueError(f"sizes={tuple(self.sizes)} must hold one that validation and test clouds have")
        verdict = verdict_by_size(
            {size: {name: result.scores for name, result in row.items()} for size, row in results.items()}
        )
        notes = [
            f"Data: {data.describe()}. Held-out log-likelihood per point in nats of the test clouds, normalized to "
            f"radius 1, K = {module.operator.num_components}, by number of fitted points N, and milliseconds per cloud "
            f"on this machine; seed {data.seed}. Tuned methods: settings of the highest mean on the validation clouds "
            f"of each size.",
            verdict,
        ]
        clouds = test[0]  # clouds of one class are adjacent in it
        rows = torch.linspace(0, len(clouds.points) - 1, min(self.num_pictured, len(clouds.points))).long()
        shown = PointCloudBatch(*(part[rows] for part in clouds))
        titles = [data.class_names[label] for label in shown.label.tolist()]
        write_page(folder / "report.html", list(self._scenes(module, shown, titles)))
        settings = {size: {name: dict(result.setting) for name, result in row.items()} for size, row in results.items()}
        return Findings(
            title="Mixtures of point clouds",
            notes=notes,
            rows=table(results),
            verdict=verdict,
            figures={**self._curves(results), "clouds": _side_by_side(module, shown, titles)},
            facts={"seed": data.seed, "settings": settings},
        )

    def _curves(self, results: Results) -> dict[str, Any]:
        fixed = {f"EM, {steps} steps" for steps in FIXED_STEPS}  # left out, so that curves can be told apart
        names = [name for name in next(iter(results.values())) if name not in fixed]
        by_size, by_time = {}, {}
        for name in names:
            likelihoods = [float(row[name].scores.mean()) for row in results.values()]
            by_size[name] = (list(results), likelihoods)
            by_time[name] = ([1e3 * row[name].seconds for row in results.values()], likelihoods)
        return {
            "sizes": curves(by_size, "number of points", _LIKELIHOOD, log_x=True),
            "times": curves(by_time, "ms per cloud", _LIKELIHOOD, log_x=True),
        }

    def _scenes(self, module: Any, batch: PointCloudBatch, titles: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the clouds of the page, with the mixtures of each method after each iteration."""
        from sklearn.mixture import GaussianMixture

        for i, title in enumerate(titles):
            points = batch.points[i, batch.mask[i]].unsqueeze(0)
            held_out = batch.held_out[i, batch.held_out_mask[i]].unsqueeze(0)
            trained = list(module.iterate(points))
            classical = list(module.operator.classical().iterate(points, num_iters=len(trained) - 1))
            methods = {"classical EM": classical, TRAINED: trained}
            if self.sklearn:
                name = "scikit-learn GaussianMixture"
                methods[name] = sklearn_mixtures(points, module.operator.num_components, GaussianMixture)
            yield scene(title, points, held_out, methods)


def _side_by_side(module: Any, batch: PointCloudBatch, titles: Sequence[str]) -> Figure:
    """Draw each cloud with its mixture by classical EM, and beside it with its mixture by the module."""
    points, mask = batch.points, batch.mask
    trained = list(module.iterate(points, mask))
    *_, classical = module.operator.classical().iterate(points, mask, num_iters=len(trained) - 1)
    pairs = zip(classical.parameters(), trained[-1].parameters(), strict=True)
    mixtures = Mixture(*(torch.stack(pair, 1).flatten(0, 1) for pair in pairs))
    named = [f"{title}, {method}" for title in titles for method in ("EM", "trained")]
    return mixture_grid(points.repeat_interleave(2, 0), mixtures, mask.repeat_interleave(2, 0), named)


def clouds_of(batches: Sequence[PointCloudBatch], size: int) -> Clouds | None:
    """Return the first ``size`` points of the clouds that have so many, and equally many held-out points of each."""
    count = min(int(batch.held_out_mask.sum(1).min()) for batch in batches)
    points, held_out = [], []
    for batch in batches:
        keep = batch.mask.sum(1) >= size
        if keep.any():
            points.append(batch.points[keep, :size])
            held_out.append(batch.held_out[keep, :count])
    return Clouds(torch.cat(points), torch.cat(held_out)) if points else None


def table(results: Results) -> list[dict[str, Any]]:
    """Return one row per method: likelihoods by size, then times by size."""
    rows = []
    for name in next(iter(results.values())):
        likelihoods = {f"N = {size}": float(row[name].scores.mean()) for size, row in results.items()}
        times = {f"ms, N = {size}": 1e3 * row[name].seconds for size, row in results.items()}
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
    parts = []
    if above:
        parts.append(f"is above every classical fit at {', '.join(above)}")
    if not_above:
        parts.append(f"is not above every classical fit at {', '.join(not_above)}")
    return f"The {TRAINED} {' and '.join(parts)}."
