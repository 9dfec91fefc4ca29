"""HTML page with point clouds and mixtures that can be rotated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from em_lightning.files import write_whole
from em_lightning.mixture import Mixture


def write_page(path: Path, scenes: Sequence[Mapping[str, Any]]) -> None:
    """Write an HTML page that needs no network, with rotatable clouds, ellipsoids and a slider over iterations."""
    # "<" is escaped, so that no title can end the script element that holds the data.
    data = json.dumps(scenes, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_name("scene.html").read_text(encoding="utf-8")
    write_whole(path, page.replace("/*DATA*/", data))


def scene(title: str, points: Tensor, held_out: Tensor, methods: Mapping[str, Sequence[Mixture]]) -> dict[str, Any]:
    """Return the data of one cloud: fitted points (1, N, 3), held-out points, each method's mixture per iteration."""

    def iteration(mixture: Mixture) -> dict[str, Any]:
        variances, directions = torch.linalg.eigh(mixture.full().covariances[0].double())
        return {
            "means": _rounded(mixture.means[0]),
            "weights": _rounded(mixture.weights[0]),
            "axes": _rounded(2.0 * variances.clamp(min=0.0).sqrt().unsqueeze(-1) * directions.mT),  # two sigma
            "fitted": float(mixture.log_prob(points.to(mixture.means)).mean()),
            "held_out": float(mixture.log_prob(held_out.to(mixture.means)).mean()),
        }

    return {
        "title": title,
        "points": _rounded(points[0]),
        "held_out": _rounded(held_out[0]),
        "methods": [{"name": name, "steps": [*map(iteration, mixtures)]} for name, mixtures in methods.items()],
    }


def _rounded(values: Tensor) -> Any:
    """Return a tensor as nested lists of numbers with four decimals, for a small file."""
    return values.detach().cpu().double().round(decimals=4).tolist()
