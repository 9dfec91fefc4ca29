"""PointCloudClassifier: features of points, a pooling (EM or one of PyG's), and a classifier head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from em_lightning.modules.base import EMModule
from em_lightning.modules.checks import check_choice
from em_lightning.operators import EMAbstraction, EMPooling

POOLINGS = ("em", "max", "mean", "attention", "set_transformer", "mem")


class PointCloudClassifier(EMModule):
    r"""Classify point clouds: features of each point, pooling to one vector per cloud, classifier head.

    .. math:: h_n = \text{MLP}(x_n), \qquad v = \text{pool}(\{x_n, h_n\}), \qquad \text{logits} = \text{MLP}(v)

    With ``pooling="em"`` a mixture is fitted to the points, and v holds its parameters and the mean features of each
    component. The other poolings are PyG's: maximum (as in PointNet), mean, attentional aggregation, Set Transformer
    aggregation and memory pooling.

    The MLP of single points sees no neighbours. ``levels`` replaces it by a pyramid of
    :class:`~em_lightning.operators.EMAbstraction`: the components of one level are the items of the next, and those of
    the last level are pooled.

    Args:
        num_classes: C.
        num_features: D, coordinates of a point.
        pooling: ``"em"``, ``"max"``, ``"mean"``, ``"attention"``, ``"set_transformer"`` or ``"mem"``.
        num_components: K, components of EM or clusters of the memory.
        num_iters: EM iterations.
        covariance: of the components.
        init: initialization of EM; with ``"learned"`` components keep their identity from cloud to cloud.
        levels: for each level of the pyramid the arguments of its ``EMAbstraction``: ``num_components``,
            ``out_features``, ``pitch``, and any others.
        width: features of a point; ignored with ``levels``.
        hidden: width of the head; ``None`` takes the largest that ``num_parameters`` allows.
        num_parameters: size of the whole module, for comparing poolings.
        dropout: after the hidden layers of the head.
        label_smoothing: of the cross-entropy in training.
        distort: augmentation of training clouds: largest difference of the entries of a random linear map from those of
            the identity.
        scale: augmentation: a random factor from 1 - scale to 1 + scale.
        shift: augmentation: largest random shift of each coordinate.
        jitter: augmentation: standard deviation of Gaussian noise on each point.
        lr: largest learning rate.
        schedule: ``"one_cycle"`` or ``"constant"``.
        weight_decay: decoupled weight decay.

    Shape:
        - batch: an object with ``points`` (B, N, D), ``mask`` (B, N) and ``label`` (B,).
        - ``forward(points, mask)``: logits (B, C).

    Raises:
        ValueError: the pooling is unknown, ``num_parameters`` is too small, or a level lacks an argument.

    Example:
        >>> PointCloudClassifier(10, pooling="em", hidden=64)(torch.randn(2, 50, 3)).shape
        torch.Size([2, 10])

    Source: the set-up of Qi et al., PointNet, 2017.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int = 3,
        pooling: Literal["em", "max", "mean", "attention", "set_transformer", "mem"] = "em",
        num_components: int = 16,
        num_iters: int = 5,
        covariance: Literal["full", "diag", "spherical", "tied"] = "full",
        init: Literal["learned", "farthest", "kmeans++", "random"] = "learned",
        levels: Sequence[Mapping[str, Any]] = (),
        width: int = 64,
        hidden: int | None = None,
        num_parameters: int = 150_000,
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
        check_choice("pooling", pooling, POOLINGS)
        self.save_hyperparameters()
        self.augmentation = (distort, scale, shift, jitter)
        self.label_smoothing = label_smoothing
        self.levels = nn.ModuleList()
        below = None
        for number, level in enumerate(levels):
            missing = [name for name in ("num_components", "out_features", "pitch") if name not in level]
            if missing:
                raise ValueError(f"levels[{number}]={dict(level)!r} lacks {', '.join(missing)}")
            self.levels.append(EMAbstraction(num_coordinates=num_features, num_features=below, **level))
            below = width = level["out_features"]
        if not levels:
            self.features = nn.Sequential(
                nn.Linear(num_features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )
        self.pool: EMPooling | _PyGPooling
        if pooling == "em":
            self.pool = EMPooling(
                num_components,
                width,
                num_coordinates=num_features,
                summary=("weights", "means", "scales", "values"),
                num_iters=num_iters,
                covariance=covariance,
                init=init,
                residual=False,
                prior={"mean_strength": 0.0, "covariance_strength": 1.0},
            )
        else:
            self.pool = _PyGPooling(pooling, width, num_components)
        size = self.pool.out_features
        if hidden is None:
            spare = num_parameters - sum(value.numel() for value in self.parameters())
            hidden = max((h for h in range(1, 2049) if _head_size(size, h, num_classes) <= spare), default=0)
            if not hidden:
                raise ValueError(f"num_parameters={num_parameters} leaves none for the head; give more, or less width")
        self.head = nn.Sequential(
            nn.BatchNorm1d(size),
            nn.Linear(size, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        self.add_metrics(("val", "test"), accuracy=MulticlassAccuracy(num_classes, average="micro"))

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, C) of clouds (B, N, D)."""
        if self.levels:
            points, features = self.levels[0](points, None, mask)
            for level in self.levels[1:]:
                points, features = level(points, features)
            rows, mask = features.flatten(0, 1), None  # all components are valid items
        else:
            # Batch normalization must not see the padding.
            rows = self.features(points.flatten(0, 1) if mask is None else points[mask])
        valid = torch.ones_like(points[..., 0], dtype=torch.bool) if mask is None else mask
        if isinstance(self.pool, EMPooling):
            features = rows.new_zeros(*points.shape[:2], rows.shape[-1]).masked_scatter(valid.unsqueeze(-1), rows)
            return self.head(self.pool(features, mask, coordinates=points))
        index = torch.arange(len(points), device=points.device).repeat_interleave(valid.sum(1))
        return self.head(self.pool(rows, index, len(points)))

    def step(self, batch: Any, stage: str) -> Tensor:
        """Return the cross-entropy; outside training, update the accuracy."""
        points = self.augment(batch.points) if stage == "train" else batch.points
        logits = self(points, None if batch.mask.all() else batch.mask)  # no mask is faster
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


def _head_size(size: int, hidden: int, classes: int) -> int:
    return 2 * size + (size + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * classes


class _PyGPooling(nn.Module):
    """A PyG aggregation or pooling of rows (M, F) by the index of their sets (M,), as (B, ``out_features``)."""

    def __init__(self, pooling: str, width: int, num_components: int) -> None:
        super().__init__()
        from torch_geometric.nn import MemPooling, aggr

        self.out_features = num_components * width if pooling == "mem" else width
        self.inner: nn.Module
        if pooling == "mem":
            self.inner = MemPooling(width, width, heads=4, num_clusters=num_components)
        elif pooling == "attention":
            gate = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
            self.inner = aggr.AttentionalAggregation(gate)
        elif pooling == "set_transformer":
            self.inner = aggr.SetTransformerAggregation(width, num_seed_points=1, heads=4)
        else:
            self.inner = aggr.MaxAggregation() if pooling == "max" else aggr.MeanAggregation()
        self.is_memory = pooling == "mem"

    def forward(self, rows: Tensor, index: Tensor, sets: int) -> Tensor:
        if self.is_memory:
            return self.inner(rows, index, max_num_nodes=None, batch_size=sets)[0].flatten(1)
        return self.inner(rows, index, dim_size=sets)
