"""The LightningDataModule that all point clouds share."""

from __future__ import annotations

from typing import Any, Literal

import lightning
from torch.utils.data import DataLoader

from em_lightning.data.clouds import (
    SPLITS,
    CloudDataset,
    EpochSampler,
    PointCloudBatch,
    Shapes,
    collate_clouds,
)

ROTATIONS = ("none", "z", "so3")


def at_least(low: float, **values: float) -> None:
    """Raise ValueError for an argument below its least value."""
    for name, value in values.items():
        if not value >= low:
            raise ValueError(f"{name}={value} is too small; give {low} or more")


class PointCloudDataModule(lightning.LightningDataModule):
    """Batches of point clouds, each with points to fit and fresh held-out points of the same shape.

    Training clouds are drawn afresh in every epoch; those of validation and test are fixed by the seed. An item
    depends on (seed, split, epoch, index) alone, not on workers, ranks or resumption. A subclass says in
    :meth:`shapes` what is drawn from.

    Args:
        num_points: points of a cloud to fit, and as many held out.
        batch_size: clouds per batch (on each rank).
        num_workers: processes that draw clouds; 0 draws them in the main one.
        seed: 0 or more; the clouds are a function of it.
        noise: standard deviation of Gaussian jitter, where the shape has radius 1. Points on a surface have no density
            in space: with more components or thinner ones the likelihood grows without bound. With jitter it has
            a bound, the entropy of the jittered surface.
        rotate: a random rotation of each training cloud: ``"none"``, about ``"z"``, or any (``"so3"``).

    Raises:
        ValueError: an argument is outside its range.
    """

    num_features = 3

    def __init__(
        self,
        num_points: int = 1024,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        noise: float = 0.0,
        rotate: Literal["none", "z", "so3"] = "none",
    ) -> None:
        super().__init__()
        at_least(1, num_points=num_points, batch_size=batch_size)
        at_least(0, num_workers=num_workers, seed=seed, noise=noise)
        self.num_points = num_points
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.noise = noise
        if rotate not in ROTATIONS:
            raise ValueError(f"rotate={rotate!r} is unknown; choose from {', '.join(ROTATIONS)}")
        self.rotate = rotate
        self.class_names: list[str] = []
        self.datasets: dict[str, CloudDataset] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes, which :meth:`setup` finds."""
        self.setup()
        return len(self.class_names)

    def shapes(self, split: str) -> Shapes:
        """Return the source of shapes of a split, and set ``class_names``."""
        raise NotImplementedError(f"{type(self).__name__} must define shapes(split)")

    def source(self) -> str:
        """Return in a few words what is drawn from."""
        raise NotImplementedError(f"{type(self).__name__} must define source()")

    def describe(self) -> str:
        """Return one line that says what data is used, with the numbers of clouds once :meth:`setup` has run."""
        counts = ", ".join(f"{len(data)} {split}" for split, data in self.datasets.items())
        counts = f": {counts} clouds" if counts else ""
        return f"{self.source()}, {self.num_points} points a cloud to fit and as many held out{counts}"

    def setup(self, stage: str | None = None) -> None:
        """Read or define the shapes of all splits, once."""
        if not self.datasets:
            self.datasets = {split: self._dataset(split) for split in SPLITS}

    def _dataset(self, split: str) -> CloudDataset:
        rotate = self.rotate if split == "train" else "none"
        return CloudDataset(self.shapes(split), split, self.num_points, self.seed, self.noise, rotate)

    def _loader(self, split: str, **options: Any) -> DataLoader[PointCloudBatch]:
        self.setup()
        return DataLoader(
            self.datasets[split],  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate_clouds,
            **options,
        )

    def train_dataloader(self) -> DataLoader[PointCloudBatch]:
        """Return shuffled batches that are drawn afresh in every epoch, this rank's share of them."""
        self.setup()
        replicas, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        return self._loader("train", sampler=EpochSampler(self.datasets["train"], replicas, rank, self.seed))

    def val_dataloader(self) -> DataLoader[PointCloudBatch]:
        """Return the fixed validation clouds."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[PointCloudBatch]:
        """Return the fixed test clouds."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[PointCloudBatch]:
        """Return the fixed test clouds."""
        return self._loader("test")
