"""Images as point sets: positions of the points, reproducible draws, wrong arguments."""

import numpy as np
import pytest
import torch
from test_images import write_set

from em_lightning import studies


def mnist(folder, **options):
    arrays = write_set(folder)
    module = studies.ImagePointSets("mnist", str(folder), **{"jitter": 0.0, "batch_size": 8, **options})
    return module, arrays


def test_points_are_bright_pixels_drawn_equally_often(tmp_path):
    module, arrays = mnist(tmp_path / "set", num_points=1000)
    (batch,) = module.test_dataloader()
    assert batch.mask.all() and batch.label.tolist() == arrays["t10k"][1].tolist()
    for points, image in zip(batch.points, arrays["t10k"][0], strict=True):
        rows, columns = np.nonzero(image > 127.5)
        expected = {(2 * c - 27, 27 - 2 * r) for r, c in zip(rows, columns, strict=True)}
        places, times = points.mul(28).round().unique(dim=0, return_counts=True)
        assert {tuple(place) for place in places.tolist()} == expected
        assert times.sum() == 1000 and times.max() - times.min() <= 1
        torch.testing.assert_close(points * 28, points.mul(28).round(), rtol=0, atol=1e-4)


def test_fewer_points_than_pixels_are_drawn_without_replacement(tmp_path):
    module, _ = mnist(tmp_path / "set", num_points=3)
    for batch in module.train_dataloader():
        assert all(len(points.unique(dim=0)) == 3 for points in batch.points)


def test_jitter_is_clipped_and_of_its_size():
    still, moved = (studies.ImagePointSets(num_points=64, jitter=jitter, seed=3) for jitter in (0.0, 0.02))
    pairs = zip(still.val_dataloader(), moved.val_dataloader(), strict=True)
    noise = torch.cat([b.points - a.points for a, b in pairs])
    assert noise.abs().max() <= 0.06 + 1e-6 and 0.0197 < noise.std() < 0.0202


def test_draws_are_a_function_of_seed_split_epoch_and_batch():
    def first(split="train", epoch=0, seed=0, **options):
        module = studies.ImagePointSets(num_points=16, seed=seed, batch_size=32, eval_batch_size=32, **options)
        loader = getattr(module, f"{split}_dataloader")()
        loader.set_epoch(epoch)
        torch.manual_seed(epoch + 17)  # the global generator must have no effect
        return next(iter(loader)).points

    torch.testing.assert_close(first(), first(), rtol=0, atol=0)
    torch.testing.assert_close(first("val", epoch=1), first("val"), rtol=0, atol=0)
    for other in (first(epoch=1), first(seed=1), first("val"), first("test")):
        assert not torch.equal(other, first())
    assert not torch.equal(first("val"), first("test")), "of the same images, but drawn by themselves"


def test_ranks_cover_each_image_once_per_epoch():
    module = studies.ImagePointSets(num_points=4, batch_size=10)
    module.setup()
    loaders = [module.train_dataloader() for _ in range(2)]
    for rank, loader in enumerate(loaders):
        loader.num_replicas, loader.rank = 2, rank
    labels = torch.cat([batch.label for loader in loaders for batch in loader])
    expected = module.splits["train"].y
    assert labels.bincount().tolist() == expected.bincount().tolist()
    assert not torch.equal(next(iter(loaders[0])).points, next(iter(loaders[1])).points)


def test_an_image_without_bright_pixels_is_an_empty_set():
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 1, 2] = 1.0
    pixels, counts = studies.bright_pixels(images, 0.5)
    assert pixels.tolist() == [[0], [6]] and counts.tolist() == [0, 1]
    batch = studies.ImagePointSets(num_points=3).draw(pixels, counts, torch.tensor([0, 1]), torch.Generator())
    assert batch.mask.tolist() == [[False] * 3, [True] * 3] and (batch.points[0] == 0).all()


def test_validation_split_and_describe():
    module = studies.ImagePointSets(num_points=8, val_size=100)
    assert module.num_classes == 10 and module.num_features == 2
    sizes = [sum(len(batch.label) for batch in getattr(module, f"{s}_dataloader")()) for s in ("train", "val", "test")]
    assert sizes == [1337, 100, 360]
    assert "8 points" in module.describe() and "1337 train, 100 val, 360 test" in module.describe()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": "cifar"}, "images='cifar' .*digits.*mnist"),
        ({"root": "here"}, "root='here' .* images='digits'"),
        ({"num_points": 0}, "num_points=0 .* 1"),
        ({"jitter": -1.0}, "jitter=-1.0 .* 0"),
        ({"threshold": 1.0}, "threshold=1.0 .* 1"),
        ({"seed": -1}, "seed=-1 .* 0"),
    ],
)
def test_wrong_arguments_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        studies.ImagePointSets(**arguments)
