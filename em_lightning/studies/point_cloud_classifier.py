"""PointCloudClassifier: features of points, EM pooling, and a classifier head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from em_lightning.checks import check_choice
from em_lightning.modules.base import EMModule
from em_lightning.operators import EMAbstraction, EMPooling


class PointCloudClassifier(EMModule):
    r"""Classify point clouds: features of each point, pooling to one vector per cloud, classifier head.

    .. math:: h_n = \text{MLP}(x_n), \qquad v = \text{pool}(\{x_n, h_n\}), \qquad \text{logits} = \text{MLP}(v)

    With ``pooling="em"`` a mixture is fitted to the points, and v holds its parameters and the mean features of each
    component; the fit starts from learned components, so that they correspond between clouds. ``"max"`` takes the
    maximum of each feature, as in PointNet. A subclass may set another ``pool``, which is called as
    :class:`~em_lightning.operators.EMPooling` is, and ``head = self.make_head(size, hidden)`` for its output (B, size).

    The MLP of a point does not see its neighbours. ``levels`` replaces the MLP by levels of
    :class:`~em_lightning.operators.EMAbstraction`. The components of a level are the items of the next one; those of
    the last level are pooled.

    Args:
        num_classes: C.
        num_features: D, coordinates of a point.
        pooling: ``"em"`` or ``"max"``.
        num_components, num_iters: K and T of the EM pooling.
        levels: arguments of the ``EMAbstraction`` of each level, such as ``num_components`` and ``pitch``.
        width: features of a point; ignored with ``levels``.
        hidden: width of the head.
        dropout, label_smoothing: dropout of the head and label smoothing of the training loss.
        distort: augmentation: points are multiplied by the identity plus uniform noise of at most this size per entry.
        scale: augmentation: points are multiplied by a random factor from 1 - scale to 1 + scale.
        shift: augmentation: largest random shift of each coordinate.
        jitter: augmentation: standard deviation of Gaussian noise on each point.
        lr, schedule, weight_decay: as in :class:`EMModule`.

    Shape:
        - batch: an object with ``points`` (B, N, D), ``mask`` (B, N) and ``label`` (B,).
        - ``forward(points, mask)``: logits (B, C).

    Raises:
        ValueError: the pooling is unknown.
        TypeError: a level lacks an argument.

    Example:
        >>> PointCloudClassifier(num_classes=10)(torch.randn(2, 50, 3)).shape
        torch.Size([2, 10])

    Source: the set-up of Qi et al., PointNet, 2017.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int = 3,
        pooling: Literal["em", "max"] = "em",
        num_components: int = 16,
        num_iters: int = 5,
        levels: Sequence[Mapping[str, Any]] = (),
        width: int = 64,
        hidden: int = 128,
        dropout: float = 0.3,
        label_smoothing: float = 0.0,
        distort: float = 0.0,
        scale: float = 0.1,
        shift: float = 0.1,
        jitter: float = 0.01,
        lr: float = 2e-3,
        schedule: Literal["one_cycle", "constant"] = "one_cycle",
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(lr, schedule, weight_decay)
        check_choice("pooling", pooling, ("em", "max"))
        self.save_hyperparameters()
        self.augmentation = (distort, scale, shift, jitter)
        self.label_smoothing = label_smoothing
        self.levels = nn.ModuleList()
        level_features = None  # the first level has coordinates only
        for level in levels:
            self.levels.append(EMAbstraction(num_coordinates=num_features, num_features=level_features, **level))
            level_features = level["out_features"]
        if level_features is not None:
            width = level_features
        else:
            self.features = nn.Sequential(
                nn.Linear(num_features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )
        self.width, self.num_classes, self.dropout = width, num_classes, dropout
        self.pool: Any = None
        if pooling == "em":
            prior = {"mean_strength": 0.0, "covariance_strength": 1.0}  # against singular components
            options: dict[str, Any] = {"num_iters": num_iters, "init": "learned", "residual": False, "prior": prior}
            options |= {"num_coordinates": num_features, "summary": ("weights", "means", "scales", "values")}
            self.pool = EMPooling(num_components, width, **options)
        self.head = self.make_head(width if self.pool is None else self.pool.out_features, hidden)
        self.add_metrics(("val", "test"), accuracy=MulticlassAccuracy(num_classes, average="micro"))

    def make_head(self, size: int, hidden: int) -> nn.Sequential:
        """Return a head of two hidden layers for vectors (B, ``size``)."""
        return nn.Sequential(
            nn.BatchNorm1d(size),
            nn.Linear(size, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(hidden, self.num_classes),
        )

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.levels:
            points, features = self.levels[0](points, None, mask)
            for level in self.levels[1:]:
                points, features = level(points, features)
            mask = None  # all components are valid items
        elif mask is None:
            features = self.features(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        else:
            rows = self.features(points[mask])  # exclude the padding from batch normalization
            features = rows.new_zeros(*mask.shape, rows.shape[-1]).masked_scatter(mask.unsqueeze(-1), rows)
        if self.pool is None:
            return self.head(features.amax(1))  # padding is 0, the smallest output of the ReLU
        return self.head(self.pool(features, mask, coordinates=points))

    def step(self, batch: Any, stage: str) -> Tensor:
        points = self.augment(batch.points) if stage == "train" else batch.points
        logits = self(points, None if batch.mask.all() else batch.mask)  # faster without a mask
        if stage != "train":
            self.metrics_of(stage)["accuracy"].update(logits, batch.label)
        smoothing = self.label_smoothing if stage == "train" else 0.0
        return nn.functional.cross_entropy(logits, batch.label, label_smoothing=smoothing)

    def augment(self, points: Tensor) -> Tensor:
        """Return clouds (B, N, D) under a random linear map, scale, shift and jitter."""
        distort, scale, shift, jitter = self.augmentation

        def uniform(*shape: int) -> Tensor:
            return 2.0 * torch.rand(len(points), *shape, device=points.device) - 1.0

        features = points.shape[-1]
        matrix = torch.eye(features, device=points.device) + distort * uniform(features, features)
        moved = points @ matrix * (1.0 + scale * uniform(1, 1)) + shift * uniform(1, features)
        return moved + jitter * torch.randn_like(points)
