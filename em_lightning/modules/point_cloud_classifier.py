"""Point clouds to classes, with any pooling in the middle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from em_lightning.modules.base import EMModule
from em_lightning.operators import EMAbstraction, EMPooling

POOLINGS = ("em", "max", "mean", "attention", "set_transformer", "mem")


class PointCloudClassifier(EMModule):
    r"""Classify point clouds: features of each point, one vector of their set, classes.

    .. math:: h_n = \text{MLP}(x_n), \qquad v = \text{pool}(\{x_n, h_n\}), \qquad \text{logits} = \text{MLP}(v)

    With ``pooling="em"`` a mixture is fitted to the points themselves, and v is its parameters and the mean features of
    each component. The others are PyG's: the largest feature (as in PointNet), the mean, attentional aggregation, Set
    Transformer aggregation and memory pooling.

    A layer for each point sees no neighbours. With ``levels`` a pyramid of
    :class:`~em_lightning.operators.EMAbstraction` takes its place: the components of one level are the items of the
    next, and those of the last are pooled.

    Args:
        num_classes: C.
        num_features: D, coordinates of a point.
        pooling: ``"em"``, ``"max"``, ``"mean"``, ``"attention"``, ``"set_transformer"`` or ``"mem"``.
        num_components: K, components of EM, seeds of the Set Transformer, clusters of the memory.
        num_iters: EM iterations.
        covariance: of the components.
        init: where EM starts; ``"learned"`` gives components an identity of their own.
        levels: for each level of the pyramid the arguments of its ``EMAbstraction``: ``num_components``,
            ``out_features``, ``pitch`` and what else differs from its defaults.
        width: features of a point; of no effect with ``levels``.
        hidden: width of the layers behind the pooling; ``None`` takes the largest that ``num_parameters`` allow.
        num_parameters: what the whole is to have, so that poolings can be compared.
        dropout: behind the hidden layer.
        label_smoothing: the share of each target that all classes have alike.
        distort: training clouds are multiplied by a matrix whose entries differ from the identity's by up to that,
        scale: scaled by a factor from 1 - scale to 1 + scale,
        shift: shifted by up to that in every coordinate,
        jitter: and each point by Gaussian noise of that deviation.
        lr: largest learning rate.
        schedule: ``"one_cycle"`` or ``"constant"``.
        weight_decay: decoupled weight decay.

    Shape:
        - batch: anything with ``points`` (B, N, D), ``mask`` (B, N) and ``label`` (B,).
        - ``forward(points, mask)``: logits (B, C).

    Raises:
        ValueError: the pooling is unknown, ``num_parameters`` are too few, or a level lacks an argument.

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
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
        self.save_hyperparameters()
        self.augmentation = (distort, scale, shift, jitter)
        self.label_smoothing = label_smoothing
        self.levels = nn.ModuleList()
        if levels:
            for number, level in enumerate(levels):
                missing = [name for name in ("num_components", "out_features", "pitch") if name not in level]
                if missing:
                    raise ValueError(f"levels[{number}]={dict(level)!r} lacks {', '.join(missing)}")
                below = levels[number - 1]["out_features"] if number else None
                self.levels.append(EMAbstraction(num_coordinates=num_features, num_features=below, **level))
            width = levels[-1]["out_features"]
        else:
            self.features = nn.Sequential(
                nn.Linear(num_features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )
        self.pool: nn.Module
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
            size = self.pool.out_features
        else:
            self.pool, size = _peer(pooling, width, num_components)
        if hidden is None:
            spare = num_parameters - sum(value.numel() for value in self.parameters())
            fitting = [h for h in range(1, 2049) if _head_size(size, h, num_classes) <= spare]
            if not fitting:
                raise ValueError(f"num_parameters={num_parameters} leave none for the head: give more, or less width")
            hidden = fitting[-1]
        self.head = nn.Sequential(
            nn.BatchNorm1d(size),
            nn.Linear(size, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, C) of clouds (B, N, D)."""
        if self.levels:
            points, rows = self._tokens(points, mask)
            mask = None  # of points; all components count
        else:
            rows = self.features(points.flatten(0, 1) if mask is None else points[mask])
        valid = torch.ones_like(points[..., 0], dtype=torch.bool) if mask is None else mask
        if isinstance(self.pool, EMPooling):
            features = rows.new_zeros(*points.shape[:2], rows.shape[-1]).masked_scatter(valid.unsqueeze(-1), rows)
            return self.head(self.pool(features, mask, coordinates=points))
        index = torch.arange(len(points), device=points.device).repeat_interleave(valid.sum(1))
        return self.head(self.pool(rows, index, len(points)))

    def _tokens(self, points: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the components of the last level, and the rows of their features."""
        points, features = self.levels[0](points, None, mask)
        for level in self.levels[1:]:
            points, features = level(points, features)
        return points, features.flatten(0, 1)

    def step(self, batch: Any, stage: str) -> Tensor:
        """Return the cross-entropy, and log the accuracy outside training."""
        points = self._augmented(batch.points) if stage == "train" else batch.points
        # Without padding there is less to do.
        logits = self(points, None if batch.mask.all() else batch.mask)
        if stage != "train":
            accuracy = self.test_accuracy if stage == "test" else self.val_accuracy
            accuracy(logits, batch.label)
            self.log(f"{stage}/accuracy", accuracy, on_epoch=True, on_step=False, batch_size=len(logits))
        smoothing = self.label_smoothing if stage == "train" else 0.0
        return nn.functional.cross_entropy(logits, batch.label, label_smoothing=smoothing)

    def _augmented(self, points: Tensor) -> Tensor:
        distort, scale, shift, jitter = self.augmentation

        def uniform(*shape: int) -> Tensor:
            return 2.0 * torch.rand(len(points), *shape, device=points.device) - 1.0

        features = points.shape[-1]
        matrix = torch.eye(features, device=points.device) + distort * uniform(features, features)
        moved = points @ matrix * (1.0 + scale * uniform(1, 1)) + shift * uniform(1, features)
        return moved + jitter * torch.randn_like(points)


def _head_size(size: int, hidden: int, classes: int) -> int:
    return 2 * size + (size + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * classes


class _Pool(nn.Module):
    """An aggregation or a pooling of PyG as a function of rows and their sets."""

    def __init__(self, inner: nn.Module, memory: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.memory = memory

    def forward(self, rows: Tensor, index: Tensor, sets: int) -> Tensor:
        if self.memory:
            pooled, _ = self.inner(rows, index, max_num_nodes=None, batch_size=sets)
            return pooled.flatten(1)
        return self.inner(rows, index, dim_size=sets)


def _peer(pooling: str, width: int, num_components: int) -> tuple[nn.Module, int]:
    """Return a pooling of PyG, and the size of its vectors."""
    from torch_geometric.nn import MemPooling, aggr

    if pooling == "max":
        return _Pool(aggr.MaxAggregation()), width
    if pooling == "mean":
        return _Pool(aggr.MeanAggregation()), width
    if pooling == "attention":
        gate = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        return _Pool(aggr.AttentionalAggregation(gate)), width
    if pooling == "set_transformer":
        return _Pool(aggr.SetTransformerAggregation(width, num_seed_points=1, heads=4)), width
    return _Pool(MemPooling(width, width, heads=4, num_clusters=num_components), memory=True), num_components * width
