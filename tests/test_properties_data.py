"""Property tests of data: loaders visit each item once; normalization and file formats round-trip."""

import functools
import gzip
import io
import math
import struct
import tempfile
from pathlib import Path

import drawing
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from em_lightning.data import (
    EpochSampler,
    PointCloudBatch,
    RandomDataset,
    Shape,
    Table,
    TableBatch,
    TableBlocks,
    TabularDataModule,
    TensorBatches,
    TensorDataModule,
    Tensors,
    collate_clouds,
    draw_cloud,
    parse_points,
    random_rotation,
    read_idx,
    read_points,
    unit_ball,
)
from em_lightning.studies import (
    FAMILIES,
    ImagePointSets,
    MixtureSetBatch,
    MixtureSets,
    PointSetBatch,
    bright_pixels,
    random_surface,
)


@given(values=st.data())
def test_ranks_cover_all_items(values):
    items, size, ranks, epoch = (values.draw(st.integers(least, 9)) for least in (0, 0, 1, 0))
    pair = [torch.arange(items), values.draw(drawing.tensors((items, 2), torch.float32))]
    try:
        loaders = [
            TensorBatches(pair, size, values.draw(st.booleans()), ranks, rank, values.draw(st.integers(0, 3)))
            for rank in range(1)
        ]
        shuffle, seed = loaders[0].shuffle, loaders[0].seed
        loaders = [TensorBatches(pair, size, shuffle, ranks, rank, seed) for rank in range(ranks)]
    except ValueError as error:
        assert size < 1 or items < max(ranks, 1), error
        return
    for loader in loaders:
        loader.set_epoch(epoch)
    shares = [list(loader) for loader in loaders]
    assert {len(share) for share in shares} == {len(loaders[0])}
    seen = torch.cat([batch[0] for share in shares for batch in share])
    assert set(seen.tolist()) == set(range(items))
    # At most ranks - 1 items are repeated, so that every rank has an item in the last batch.
    assert 0 <= len(seen) - items < ranks
    assert all(torch.equal(x, pair[1][index]) for share in shares for index, x in share)
    assert all(len(index) <= size for share in shares for index, _ in share)
    again = TensorBatches(pair, size, shuffle, ranks, 0, seed)
    again.set_epoch(epoch)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, shares[0], strict=True))


class Numbers(TensorDataModule):
    shape = (2,)
    class_names = ["a", "b"]

    def load(self, train):
        items = 7 if train else 3
        return Tensors(torch.arange(2 * items).reshape(items, 2).to(torch.uint8), torch.arange(items) % 2)

    source = "numbers"


@given(values=st.data())
def test_splits_of_tensors(values):
    aside, size = values.draw(st.integers(-1, 8)), values.draw(st.integers(0, 9))
    try:
        data = Numbers(batch_size=size, val_size=aside)
        data.setup()
    except ValueError as error:
        assert size < 1 or not 0 <= aside < 7, error
        return
    parts = [data.whole(split) for split in ("train", "val")]
    assert len(parts[0].y) == 7 - aside and len(parts[1].y) == (aside or 3)
    if aside:
        rows = torch.cat([part.x for part in parts])
        assert sorted((255 * rows[:, 0]).round().tolist()) == [0, 2, 4, 6, 8, 10, 12]
    assert sum(len(y) for _, y in data.train_dataloader()) == 7 - aside
    assert data.num_features == 2 and data.num_classes == 2 and "numbers" in data.describe()


@given(values=st.data())
def test_blocks_of_tables_cover_all_rows(values):
    rows, width, ranks, size = (values.draw(st.integers(least, 9)) for least in (0, 0, 1, 1))
    dtype = values.draw(st.sampled_from((torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)))
    x = values.draw(drawing.tensors((rows, width), torch.float32, -3, 2)).abs().clamp(max=200).to(dtype)
    weights = values.draw(drawing.counts((rows,)))
    cuts = sorted(values.draw(st.integers(0, rows)) for _ in range(values.draw(st.integers(0, 2))))
    with tempfile.TemporaryDirectory() as folder:
        source = x
        if cuts:  # in shards
            for number, part in enumerate(np.split(x.numpy(), cuts)):
                np.save(Path(folder) / f"{number}.npy", part)
            source = folder
        try:
            table = Table(source)
        except ValueError as error:
            assert not rows or not width, error
            assert "data has shape" in str(error)
            return
        own = None if weights is None else Table(weights, ndim=1)
        options = {"block_rows": size, "shuffle": values.draw(st.booleans()), "num_replicas": ranks}
        try:
            loaders = [TableBlocks(table, own, rank=rank, **options) for rank in range(ranks)]
        except ValueError as error:
            assert rows < ranks, error
            return
        expected = x if x.is_floating_point() else x.float()
        blocks = [block for loader in loaders for block in loader]
        assert all(isinstance(block, TableBatch) for block in blocks) and len({len(loader) for loader in loaders}) == 1
        found = torch.cat([block.points for block in blocks])
        assert len(found) == rows == len(table) and found.dtype.is_floating_point
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))
        lengths = [len(block.points) for block in blocks]
        assert max(lengths) - min(lengths) <= 1 and max(lengths) <= size + 1
        if weights is not None:
            assert torch.cat([block.weights for block in blocks]).sum().item() == pytest.approx(weights.sum().item())
        chosen = sorted(values.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
        assert torch.equal(table.take(torch.tensor(chosen)).to(expected.dtype), expected[chosen])
        assert len(loaders[0].sample(values.draw(st.integers(1, 20))).points) <= rows
        module = TabularDataModule(source if cuts else x, block_rows=size)
        module.setup()
        assert module.num_features == width and sum(len(b.points) for b in module.train_dataloader()) == rows


@given(values=st.data())
def test_bright_pixels_become_points(values):
    items, height, width = values.draw(st.integers(1, 3)), *(values.draw(st.integers(1, 4)) for _ in range(2))
    images = values.draw(drawing.tensors((items, 1, height, width), torch.float32, -3, 1)).abs().clamp(max=1)
    images = (255 * images).to(torch.uint8) if values.draw(st.booleans()) else images
    threshold = values.draw(st.sampled_from((0.0, 0.3, 1.0)))
    pixels, counts = bright_pixels(images, threshold)
    bound = threshold * (255 if images.dtype == torch.uint8 else 1)
    for row, count, image in zip(pixels, counts, images, strict=True):
        assert row[:count].tolist() == [n for n, value in enumerate(image.flatten().tolist()) if value > bound]
    number, jitter = values.draw(st.integers(1, 5)), values.draw(st.sampled_from((0.0, 0.1)))
    data = ImagePointSets(num_points=number, jitter=jitter)
    data.dataset.shape = (1, height, width)
    for rows in torch.arange(items).split(2):
        batch = data.draw(pixels[rows], counts[rows], rows, torch.Generator())
        assert isinstance(batch, PointSetBatch) and batch.points.shape == (len(batch.label), number, 2)
        assert batch.points.isfinite().all() and (batch.points.abs() <= 1 + 3 * jitter + 1e-6).all()
        assert torch.equal(batch.mask.any(1), counts[batch.label] > 0)
        if not jitter:
            unit = 2 / max(height, width)
            columns = (batch.points[..., 0] / unit + (width - 1) / 2).round().long()
            rows = ((height - 1) / 2 - batch.points[..., 1] / unit).round().long()
            for b, label in enumerate(batch.label):
                places = (rows[b] * width + columns[b])[batch.mask[b]].tolist()
                known = pixels[label, : counts[label]].tolist()
                assert set(places) <= set(known)
                # Counts differ by at most one.
                often = [places.count(place) for place in known]
                assert not known or max(often) - min(often) <= 1


@given(values=st.data())
def test_normalization_round_trip(values):
    items, features = values.draw(st.integers(1, 6)), values.draw(st.integers(1, 3))
    dtype = values.draw(st.sampled_from(drawing.WIDE))
    # The square of 10^18 is within the range of float32.
    most = 18 if dtype == torch.float32 else 30
    x = values.draw(drawing.tensors((items, features), dtype, -30, most))
    center, scale = unit_ball(x)
    there = (x - center) / scale
    eps = torch.finfo(dtype).eps
    assert there.isfinite().all() and 0 < scale < math.inf
    back, size = there * scale + center, float(x.abs().max())
    assert ((back - x).abs() <= 16 * eps * size + 8 * torch.finfo(dtype).smallest_normal).all()
    spread = float((x.amax(0) - x.amin(0)).max())
    if spread > 1e3 * eps * size and spread > 1e-10 * 10 ** (0 if dtype == torch.float32 else -100):
        assert there.norm(dim=-1).max().item() == pytest.approx(1, rel=1e-2)


@given(values=st.data())
def test_random_triangles_give_points_on_the_surface_or_raise(values):
    corners, triangles = values.draw(st.integers(0, 5)), values.draw(st.integers(0, 4))
    vertices = values.draw(drawing.tensors((corners, 3), torch.float64, -30, 30))
    faces = torch.tensor(
        [[values.draw(st.integers(-1, corners)) for _ in range(3)] for _ in range(triangles)], dtype=torch.long
    ).reshape(-1, 3)
    try:
        shape = Shape.of(vertices, faces, label=2)
    except ValueError as error:
        sides = [vertices[f] for f in faces.tolist() if all(0 <= i < corners for i in f)]
        areas = [torch.linalg.cross(b - a, c - a).norm().item() for a, b, c in sides]
        assert len(sides) < triangles or not areas or not 0 < sum(areas) < math.inf, error
        return
    points = shape.sample(4, torch.Generator().manual_seed(0))
    assert shape.label == 2 and points.norm(dim=-1).max() <= 1 + 1e-5
    points = points * shape.scale + shape.center
    low, high = vertices[faces].amin((0, 1)), vertices[faces].amax((0, 1))
    slack = 1e-6 * vertices.abs().max() + 1e-37
    assert ((points >= low - slack) & (points <= high + slack)).all()


@given(values=st.data())
def test_clouds_of_random_shapes(values):
    seed, number = values.draw(st.integers(0, 2**20)), values.draw(st.integers(1, 5))
    family = values.draw(st.sampled_from(sorted(FAMILIES)))
    mesh = random_surface(family, torch.Generator().manual_seed(seed))
    assert mesh[0].isfinite().all() and mesh[1].max() < len(mesh[0])
    rotation = random_rotation(torch.Generator().manual_seed(seed), values.draw(st.sampled_from(("so3", "z"))))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.linalg.det(rotation).item() == pytest.approx(1)
    loose = values.draw(drawing.tensors((values.draw(st.integers(2, 7)), 3), torch.float64, -9, 9))
    known = [Shape.of(*mesh, 1), Shape.of(loose, None, 2)]
    rotate = values.draw(st.sampled_from(("none", "z", "so3")))
    draw = functools.partial(draw_cloud, lambda index, _: known[index], number, 0.0, 0, rotate)
    data = RandomDataset(draw, 2, "train", seed)
    clouds = [data[values.draw(st.integers(0, 3)), index] for index in range(2)]
    for cloud in clouds:
        assert isinstance(cloud, PointCloudBatch) and cloud.points.isfinite().all() and cloud.held_out.isfinite().all()
        assert cloud.points.norm(dim=-1).max() <= 1 + 1e-5
    assert len(clouds[0].points) == number and len(clouds[1].points) == min(number, (len(loose) + 1) // 2)
    batch = collate_clouds(clouds)
    assert isinstance(batch, PointCloudBatch) and batch.mask.sum(1).tolist() == [len(c.points) for c in clouds]
    assert all(torch.equal(batch.points[b][batch.mask[b]], cloud.points) for b, cloud in enumerate(clouds))
    assert not batch.points[~batch.mask].any()
    sampler = EpochSampler(data, seed=seed)
    sampler.set_epoch(3)
    assert sorted(sampler) == [(3, 0), (3, 1)]


@given(values=st.data())
def test_readers_round_trip(values):
    shape = values.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    array = values.draw(drawing.tensors(shape, torch.float64, -2, 2)).abs().clamp(max=255).to(torch.uint8)
    data = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + array.numpy().tobytes()
    rows = values.draw(drawing.tensors((values.draw(st.integers(1, 4)), 3), torch.float64)).numpy()
    faces = [[0, 0, len(rows) - 1]] * values.draw(st.integers(0, 2))
    text = {
        "xyz": "\n".join(" ".join(map(repr, row)) for row in rows.tolist()),
        "off": f"OFF\n{len(rows)} {len(faces)} 0\n"
        + "\n".join(
            [" ".join(map(repr, row)) for row in rows.tolist()] + [" ".join(map(str, [3, *face])) for face in faces]
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "array.idx"
        path.write_bytes(gzip.compress(data, 1) if values.draw(st.booleans()) else data)
        assert torch.equal(read_idx(path), array)
        np.save(Path(folder) / "points.npy", rows)
        points, none = read_points(Path(folder) / "points.npy")
        np.testing.assert_array_equal(points, rows)
        assert none is None
        for ending, content in text.items():
            (Path(folder) / f"some.{ending}").write_text(content)
            points, triangles = read_points(Path(folder) / f"some.{ending}")
            np.testing.assert_array_equal(points, rows)
            assert (triangles is None) == (ending == "xyz" or not faces)
            assert triangles is None or triangles.tolist() == faces


ENDINGS = ("off", "ply", "obj", "stl", "xyz", "txt", "csv", "pts", "pcd", "npy", "npz")


@given(values=st.data())
def test_points_that_are_not_finite_are_dropped_or_named(values):
    rows = values.draw(drawing.tensors((values.draw(st.integers(1, 5)), 3), torch.float64)).numpy()
    kept = values.draw(drawing.holes((len(rows),)))
    kept = np.ones(len(rows), dtype=bool) if kept is None else kept.numpy()
    dirty = np.where(kept[:, None], rows, values.draw(st.sampled_from((np.nan, np.inf, -np.inf))))
    array = io.BytesIO()
    np.save(array, dirty)
    contents = {
        "a.npy": array.getvalue(),
        "a.xyz": "".join(" ".join(map(repr, row)) + "\n" for row in dirty.tolist()).encode(),
    }
    for name, content in contents.items():
        for drop in (False, True):
            if kept.all() or (drop and kept.any()):
                points, faces = parse_points(content, name, drop_non_finite=drop)
                np.testing.assert_array_equal(points, rows[kept])
                assert faces is None
            else:
                with pytest.raises(ValueError, match=f"^{name}: "):
                    parse_points(content, name, drop_non_finite=drop)


@given(values=st.data())
def test_any_content_is_points_or_an_error_that_names_the_file(values):
    name = f"a.{values.draw(st.sampled_from(ENDINGS))}"
    content = values.draw(st.binary(max_size=60) | st.text("0123456789.,-e \n", max_size=60).map(str.encode))
    try:
        points, faces = parse_points(content, name)
    except ValueError as error:
        assert str(error).startswith(f"{name}: "), error
        return
    assert points.dtype == np.float64 and points.shape[1:] == (3,) and len(points) and np.isfinite(points).all()
    assert faces is None or (faces.shape[1:] == (3,) and 0 <= faces.min() <= faces.max() < len(points))


@given(values=st.data())
def test_sets_of_drawn_mixtures(values):
    components, features, sets = (values.draw(st.integers(1, 3)) for _ in range(3))
    least = values.draw(st.integers(1, 4))
    scale = 10.0 ** values.draw(st.integers(-9, 9))
    data = MixtureSets(
        components,
        features,
        min_points=least,
        max_points=least + values.draw(st.integers(0, 3)),
        extent=10.0 ** values.draw(st.integers(-9, 9)),
        scale=scale,
        concentration=10.0 ** values.draw(st.integers(-3, 3)),
        batch_size=sets,
        val_sets=sets,
        held_out=2,
        seed=values.draw(st.integers(0, 99)),
    )
    (batch,) = data.val_dataloader()
    assert isinstance(batch, MixtureSetBatch) and batch.held_out.shape == (sets, 2, features)
    assert batch.mask.sum(1).ge(least).all()
    assert batch.points.isfinite().all() and not batch.points[~batch.mask].any()
    assert batch.truth.log_prob(batch.held_out).isfinite().all()
    assert (batch.labels < components).all() and batch.truth.weights.sum(-1).sub(1).abs().max() < 1e-4
    centers = batch.truth.means.gather(1, batch.labels.unsqueeze(-1).expand(-1, -1, features))
    gap = (batch.points - centers)[batch.mask].abs().max()
    assert gap <= 7 * scale + 1e-6 * centers.abs().max()
