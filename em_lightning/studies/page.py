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


def mixture_page(path: Path, clouds: Sequence[tuple[str, Tensor, Tensor, Mapping[str, Sequence[Mixture]]]]) -> None:
    """Write an HTML page that needs no network, with rotatable clouds, ellipsoids and a slider over iterations.

    Args:
        path: path of the page.
        clouds: for each cloud the title, fitted points (1, N, 3), held-out points (1, M, 3), and per method the
            mixtures of one set after each iteration.
    """

    def numbers(values: Tensor) -> Any:
        return [numbers(part) for part in values] if values.ndim else round(float(values), 4)

    def step(mixture: Mixture, points: Tensor, held_out: Tensor) -> dict[str, Any]:
        values, vectors = torch.linalg.eigh(mixture.full().covariances[0].double())
        axes = (2.0 * vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)).mT
        shapes = {"means": mixture.means[0], "axes": axes, "weights": mixture.weights[0]}
        clouds = {"fitted": points, "held_out": held_out}
        scores = {name: float(mixture.log_prob(x.to(mixture.means)).mean()) for name, x in clouds.items()}
        return {name: numbers(value.detach().cpu()) for name, value in shapes.items()} | scores

    content = [
        {
            "title": title,
            "points": numbers(points[0].cpu()),
            "held_out": numbers(held_out[0].cpu()),
            "methods": [
                {"name": name, "steps": [step(mixture, points, held_out) for mixture in mixtures]}
                for name, mixtures in methods.items()
            ],
        }
        for title, points, held_out, methods in clouds
    ]
    page = Path(__file__).with_name("scene.html").read_text(encoding="utf-8")
    write_whole(path, page.replace("/*DATA*/", json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")))
