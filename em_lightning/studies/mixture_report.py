"""MixtureReport: compares the trained point-cloud operator with classical fits tuned for each cloud size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from matplotlib.figure import Figure
from torch import Tensor

from em_lightning.data import PointCloudBatch
from em_lightning.mixture import Mixture
from em_lightning.plots import mixture_grid
from em_lightning.studies.density_fits import TRAINED, Clouds, Result, compare_fits, em_operator, sklearn_mixtures
from em_lightning.studies.page import scene, write_page
from em_lightning.studies.report import Findings, Report, curves

Results = Mapping[int, Mapping[str, Result]]  # by size, then by method

_LIKELIHOOD = "held-out log-likelihood per point (nats)"


class MixtureReport(Report):
    """Compare a trained :class:`~em_lightning.modules.PointCloudGMM` with tuned classical fits, by cloud size.

    The table has the held-out log-likelihood and the time per cloud of each method. The figures are ``sizes``
    (likelihood by number of points), ``times`` (likelihood by time) and ``clouds``; ``report.html`` shows rotatable
    clouds and ellipsoids. The settings of the classical fits are tuned on the validation clouds of each size.

    Args:
        sizes: numbers of points; a size that no validation or no test cloud has is left out.
        num_pictured: number of clouds in the figures and in ``report.html``.
        sklearn: whether to fit scikit-learn's ``GaussianMixture``.
    """

    def __init__(self, sizes: Sequence[int] = (32, 128, 512), num_pictured: int = 8, sklearn: bool = True) -> None:
        super().__init__()
        self.sizes = sizes
        self.num_pictured = num_pictured
        self.sklearn = sklearn

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        data = trainer.datamodule
        # The random starts must not depend on how the training was distributed over processes.
        torch.manual_seed(data.seed)
        batches = [list(loader) for loader in (data.val_dataloader(), data.test_dataloader())]
        val, test = move_data_to_device(batches, module.device)
        results: dict[int, dict[str, Result]] = {}
        test_clouds: dict[int, Any] = {size: clouds_of(test, size) for size in self.sizes}
        for size, clouds in test_clouds.items():
            val_clouds = clouds_of(val, size)
            if val_clouds and clouds:
                results[size] = compare_fits(module, val_clouds, clouds, self.sklearn)
        if not results:
            raise ValueError(f"sizes={tuple(self.sizes)} must hold one that validation and test clouds have")
        scores = {size: {name: result.scores for name, result in row.items()} for size, row in results.items()}
        verdict = verdict_by_size(scores)
        notes = [
            f"Data: {data.describe()}. Held-out log-likelihood per point in nats of the test clouds, normalized to "
            f"radius 1, K = {module.operator.num_components}, by number of fitted points N, and milliseconds per cloud "
            f"on this machine; seed {data.seed}. Tuned methods: settings of the highest mean on the validation clouds "
            f"of each size.",
            verdict,
        ]
        settings = {size: {name: dict(result.setting) for name, result in row.items()} for size, row in results.items()}
        size = sorted(results)[len(results) // 2]  # the middle size, of the clouds in the pictures
        labels = [label for batch in test for label in batch.label[batch.mask.sum(1) >= size].tolist()]
        # One cloud of each class comes first.
        rows = sorted(range(len(labels)), key=lambda row: labels[:row].count(labels[row]))[: self.num_pictured]
        shown = Clouds(*(part[rows] for part in test_clouds[size]))
        titles = [f"{data.class_names[labels[row]]}, N = {size}" for row in rows]
        fits = self._fits(module, shown.points, settings[size])
        scenes = []
        for i, title in enumerate(titles):
            methods = {name: [mixture[i] for mixture in mixtures] for name, mixtures in fits.items()}
            scenes.append(scene(title, shown.points[i : i + 1], shown.held_out[i : i + 1], methods))
        write_page(folder / "report.html", scenes)
        figures = {**self._curves(results), "clouds": _side_by_side(shown, fits, titles)}
        facts = {"seed": data.seed, "settings": settings}
        return Findings("Mixtures of point clouds", notes, table(results), verdict, figures, facts)

    def _curves(self, results: Results) -> dict[str, Any]:
        # EM with fixed numbers of steps is left out, so that curves can be told apart.
        names = [name for name in next(iter(results.values())) if not name.endswith(" steps")]
        likelihoods = {name: [float(row[name].scores.mean()) for row in results.values()] for name in names}
        by_size = {name: (list(results), likelihoods[name]) for name in names}
        by_time = {name: ([1e3 * row[name].seconds for row in results.values()], likelihoods[name]) for name in names}
        return {
            "sizes": curves(by_size, "number of points", _LIKELIHOOD, log_x=True),
            "times": curves(by_time, "ms per cloud (one dot for each number of points)", _LIKELIHOOD, log_x=True),
        }

    def _fits(self, module: Any, points: Tensor, settings: Mapping[str, Any]) -> dict[str, list[Mixture]]:
        """Return the mixtures of clouds (B, N, D) after each iteration of the methods that are pictured."""
        components, tuned = module.operator.num_components, dict(settings["EM, tuned"])
        steps = tuned.pop("steps")
        classical = list(em_operator(components, points.shape[-1], **tuned).iterate(points, num_iters=steps))
        fits = {"EM, tuned": classical, TRAINED: list(module.iterate(points))}
        if self.sklearn:
            name = "scikit-learn, tuned"
            fits[name] = [_joined(sklearn_mixtures(points, components, **settings[name]))]
        return fits


def _joined(mixtures: Sequence[Mixture]) -> Mixture:
    return Mixture(*(torch.cat(parts) for parts in zip(*(mixture.parameters() for mixture in mixtures), strict=True)))


def _side_by_side(clouds: Clouds, fits: Mapping[str, Sequence[Mixture]], titles: Sequence[str]) -> Figure:
    """Draw each cloud with its mixture by tuned EM, and beside it with its mixture by the module."""
    pair = {name: fits[name][-1] for name in ("EM, tuned", TRAINED)}
    scores = {name: mixture.log_prob(clouds.held_out).mean(1).tolist() for name, mixture in pair.items()}
    named = [f"{title}\n{name}: {scores[name][i]:.2f}" for i, title in enumerate(titles) for name in pair]
    mixtures = _joined([mixture[i] for i in range(len(titles)) for mixture in pair.values()])
    return mixture_grid(clouds.points.repeat_interleave(2, dim=0), mixtures, titles=named)


def clouds_of(batches: Sequence[PointCloudBatch], size: int) -> Clouds | None:
    """Return ``size`` points of each cloud that has so many, and as many held-out points as all have; None if empty."""
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
    """Return a sentence: at which sizes the trained operator is above the best classical fit by two standard errors.

    Example:
        >>> verdict_by_size({32: {"EM": torch.zeros(2), "trained operator": torch.tensor([0.9, 1.1])}})
        'The trained operator is above every classical fit at 32 points (+1.000 ± 0.100 over EM).'
    """
    found: dict[str, list[str]] = {"above": [], "not clearly above": []}
    for size, row in scores.items():
        best = max((name for name in row if name != TRAINED), key=lambda name: float(row[name].mean()))
        gain = row[TRAINED] - row[best]
        error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else math.nan
        gained = f"{size} points ({float(gain.mean()):+.3f} ± {error:.3f} over {best})"
        found["above" if gain.mean() > 2.0 * error else "not clearly above"].append(gained)
    parts = [f"{where} every classical fit at {', '.join(sizes)}" for where, sizes in found.items() if sizes]
    return f"The {TRAINED} is {' and is '.join(parts)}."
