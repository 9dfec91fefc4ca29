"""Classify point sets with EM pooling or one of PyG's poolings, at equal numbers of parameters.

    em-lightning run benchmarks/poolings.py --config mnist --data.root PATH/TO/mnist
    em-lightning run benchmarks/poolings.py --config shapes --data.root PATH/TO/raw.zip
    python -m benchmarks.poolings [rounds]

The last command prints the time of training and prediction by pooling, on one thread. Every round times all poolings
one after the other, so that changes of the machine's load affect all of them. The table shows medians over the rounds,
in milliseconds of processor time per cloud.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from em_lightning.checks import check_choice
from em_lightning.cli import Recipe
from em_lightning.studies import LayerReport, PointCloudClassifier

POOLINGS = ("em", "max", "mean", "attention", "set_transformer", "mem")


class PoolingClassifier(PointCloudClassifier):
    """A :class:`~em_lightning.studies.PointCloudClassifier` of a given size with any of six poolings.

    Args:
        num_classes: C.
        num_features: D, coordinates of a point.
        pooling: ``"em"``, or PyG's ``"max"``, ``"mean"``, ``"attention"``, ``"set_transformer"`` or ``"mem"``.
        num_components: K, components of EM or clusters of the memory.
        num_parameters: size of the whole module; the head is as wide as it allows.
        **options: arguments of the base class, except ``hidden``, which follows from ``num_parameters``.

    Raises:
        ValueError: the pooling is unknown or ``num_parameters`` is too small.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int = 3,
        pooling: Literal["em", "max", "mean", "attention", "set_transformer", "mem"] = "em",
        num_components: int = 16,
        num_parameters: int = 100_000,
        **options: Any,
    ) -> None:
        check_choice("pooling", pooling, POOLINGS)
        super().__init__(num_classes, num_features, "em" if pooling == "em" else "max", num_components, **options)
        if pooling != "em":
            self.pool = _PyGPooling(pooling, self.width, num_components)
        self.head = nn.Sequential()
        left = num_parameters - sum(parameter.numel() for parameter in self.parameters())
        # A head with hidden layers of width h has h^2 + linear h + constant parameters. h is the largest integer for
        # which these are at most the parameters that are left.
        inputs = self.pool.out_features
        linear, constant = inputs + num_classes + 2, 2 * inputs + num_classes
        hidden = (math.isqrt(max(linear**2 + 4 * (left - constant), 0)) - linear) // 2
        if hidden < 1:
            raise ValueError(f"num_parameters={num_parameters} is too small for the head; raise it, or reduce width")
        self.head = self.make_head(inputs, hidden)


class _PyGPooling(nn.Module):
    """One of PyG's poolings of sets (B, N, F) with a mask (B, N), to (B, ``out_features``)."""

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

    def forward(self, x: Tensor, mask: Tensor | None = None, coordinates: Tensor | None = None) -> Tensor:
        valid = x.new_ones(x.shape[:2]).bool() if mask is None else mask
        rows, (index, _) = x[valid], valid.nonzero(as_tuple=True)  # index: the set of each row
        if self.is_memory:
            clusters, _ = self.inner(rows, index, max_num_nodes=None, batch_size=len(x))
            return clusters.flatten(1)
        return self.inner(rows, index, dim_size=len(x))


recipe = Recipe(
    __file__,
    model=PoolingClassifier,
    data=LightningDataModule,
    report=LayerReport,
    data_to_model=["num_features", "num_classes"],
    threads=1,  # more threads are slower for networks of this size
)

BATCH, POINTS = 128, 64


def main(rounds: int = 15) -> None:
    """Time all poolings and print a table."""
    torch.set_num_threads(1)
    for name, features, classes in (("MNIST", 2, 10), ("GeometricShapes", 3, 40)):
        torch.manual_seed(0)
        points, labels = torch.rand(BATCH, POINTS, features) * 2 - 1, torch.randint(classes, (BATCH,))
        modules = {p: PoolingClassifier(classes, features, p, num_parameters=100_000) for p in POOLINGS}
        optimizers = {p: torch.optim.AdamW(module.parameters(), fused=True) for p, module in modules.items()}
        times: dict[str, list[tuple[float, float]]] = {p: [] for p in POOLINGS}
        for _ in range(rounds):
            for pooling, module in modules.items():
                start = time.process_time()
                optimizers[pooling].zero_grad()
                cross_entropy(module.train()(points), labels).backward()
                optimizers[pooling].step()
                middle = time.process_time()
                with torch.no_grad():
                    module.eval()(points)
                times[pooling].append((middle - start, time.process_time() - middle))
        print(f"\n| {name} | parameters | ms per cloud, training | ms per cloud, prediction |\n|---|---|---|---|")
        for pooling, module in modules.items():
            training, prediction = (
                1e3 / BATCH * statistics.median(column) for column in zip(*times[pooling], strict=True)
            )
            print(
                f"| {pooling} | {sum(p.numel() for p in module.parameters()):,} | {training:.3f} | {prediction:.3f} |"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
