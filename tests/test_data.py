"""Point clouds: uniform sampling, reproducibility, data modules of shapes and folders, wrong arguments."""

import hashlib
import math
import os
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from scipy import stats

from em_lightning import data, studies
from em_lightning.data import folders
from em_lightning.modules import PointCloudGMM

OFF = "OFF\n4 4 0\n0 0 0\n2 0 0\n0 2 0\n0 0 2\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
REAL = Path(os.environ.get("GEOMETRIC_SHAPES", Path(__file__).parents[2] / "shared/data/geometric_shapes/raw.zip"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    return torch.equal(a.points, b.points) and torch.equal(a.held_out, b.held_out)


# Sampling and normalization.


def sample(vertices, faces, size, source=None):
    """Return points of a mesh in its own units."""
    shape = data.Shape.of(vertices, faces)
    points = shape.sample(size, source)
    assert points.dtype == torch.float32 and points.shape == (size, 3)
    assert points.norm(dim=1).max() <= 1 + 1e-6
    return points * shape.scale + shape.center


def test_triangles_are_drawn_by_area_and_points_uniformly_in_them():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 1], [9, 0, 1], [5, 1, 1]])
    faces = torch.tensor([[0, 1, 2], [0, 0, 1], [3, 4, 5]])  # areas 1/2, 0 and 2
    points = sample(vertices, faces, 20_000, generator())
    first = points[points[:, 2] < 0.5]
    assert stats.binomtest(len(first), 20_000, 0.2).pvalue > 1e-3
    # In a uniform triangle each barycentric coordinate is distributed as Beta(1, 2).
    for coordinate in (first[:, 0], first[:, 1], 1 - first[:, 0] - first[:, 1]):
        assert stats.kstest(coordinate.numpy(), stats.beta(1, 2).cdf).pvalue > 1e-3


def test_sphere_and_torus_are_uniform_by_area():
    vertices, faces = studies.random_surface("sphere", generator())
    z = sample(vertices, faces, 5000, generator(1))[:, 2]
    assert stats.kstest(z.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3  # Archimedes
    vertices, faces = studies.random_surface("torus", generator())
    ring = sample(vertices, faces, 20_000, generator(1))[:, :2].norm(dim=1)
    minor = float(vertices[:, 2].max())
    # The mean distance of a torus surface from its axis is R + r^2 / (2 R), with R = 1.
    assert abs(ring.mean() - (1 + minor**2 / 2)) < 5 * ring.std() / math.sqrt(20_000) + 2e-3


def test_sampling_is_a_function_of_the_generator():
    surface = studies.random_surface("chair", generator())
    draws = [sample(*surface, 10, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("vertices", "faces", "message"),
    [
        (torch.zeros(3, 2), torch.tensor([[0, 1, 2]]), r"\(V, 3\).*\(3, 2\)"),
        (torch.eye(3), torch.tensor([[0, 1, 3]]), "faces .* 0 to 2 .* got 0 to 3"),
        (torch.ones(3, 3), torch.tensor([[0, 1, 2]]), "area .* 0.0"),
        (torch.eye(3), torch.empty(0, 3, dtype=torch.long), "at least one"),
        (torch.eye(3) * math.nan, torch.tensor([[0, 1, 2]]), "area .* nan"),
    ],
)
def test_bad_surfaces_raise(vertices, faces, message):
    with pytest.raises(ValueError, match=message):
        data.Shape.of(vertices, faces)


def test_clouds_fill_the_unit_ball():
    x = torch.randn(50, 3, dtype=torch.float64) * 4 + 7
    center, scale = data.unit_ball(x)
    assert ((x - center) / scale).norm(dim=1).max() == pytest.approx(1)
    torch.testing.assert_close(center, (x.amax(0) + x.amin(0)) / 2)
    assert data.unit_ball(torch.ones(4, 3))[1] == 1


@pytest.mark.parametrize("axis", ["z", "so3"])
def test_rotations(axis):
    rotations = torch.stack([data.random_rotation(generator(seed), axis) for seed in range(400)])
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).double().expand(400, 3, 3))
    assert (torch.linalg.det(rotations) > 0).all()
    angle = torch.atan2(rotations[:, 1, 0], rotations[:, 0, 0])
    assert stats.kstest(angle.numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3
    if axis == "z":
        torch.testing.assert_close(rotations[:, 2, 2], torch.ones(400).double())
    else:  # the image of an axis is uniform on the sphere
        assert stats.kstest(rotations[:, 2, 2].numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("family", studies.FAMILIES)
def test_families(family):
    for seed in range(20):
        vertices, faces = studies.random_surface(family, generator(seed))
        assert sample(vertices, faces, 64, generator(seed)).isfinite().all()
    again = studies.random_surface(family, generator(19))[0]
    assert torch.equal(vertices, again)
    assert family == "sphere" or not torch.equal(again, studies.random_surface(family, generator(18))[0])


def test_unknown_family():
    with pytest.raises(ValueError, match="family='cube' .*sphere"):
        studies.random_surface("cube", generator())


# Data modules: items are a function of (seed, split, epoch, index).


def epochs(module, count, **options):
    """Return the first batch of each epoch that a trainer with these options sees."""
    seen = []

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, index):
            if index == 0:
                seen.append(batch)
            return self.weight * batch.points.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=count,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **{key: value for key, value in options.items() if key != "ckpt_path"},
        )
        trainer.fit(Model(), datamodule=module, ckpt_path=options.get("ckpt_path"))
    return seen, trainer


def shapes_of(root, **options):
    """Return the data module of the configs geometric_shapes."""
    return data.PointCloudFolder(str(root), **{"val_fraction": 0.0, "clouds_per_file": 16, **options})


def small(**options):
    return studies.ProceduralSurfaces(**{"num_points": 8, "batch_size": 4, "train_clouds": 6, **options})


def test_training_clouds_change_every_epoch_and_resume_exactly(tmp_path):
    straight, _ = epochs(small(), 3)
    first, second = straight[:2]
    shared = set(first.index.tolist()) & set(second.index.tolist())  # four of six items each
    for item in shared:
        assert not torch.equal(first.points[first.index == item], second.points[second.index == item])
    assert shared
    _, trainer = epochs(small(), 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = epochs(small(), 3, ckpt_path=tmp_path / "two.ckpt")
    assert len(resumed) == 1 and same(resumed[0], straight[2])


def test_clouds_do_not_depend_on_the_number_of_workers():
    by_workers = []
    for num_workers in (0, 2):
        loader = small(num_workers=num_workers).train_dataloader()
        batches = []
        for epoch in range(2):  # persistent workers must resample in the second epoch
            loader.sampler.set_epoch(epoch)
            batches += list(loader)
        by_workers.append(batches)
    assert all(same(a, b) for a, b in zip(*by_workers, strict=True))
    assert not same(by_workers[1][0], by_workers[1][2])


def test_ranks_share_an_epoch():
    shares = []
    for rank in range(2):
        module = small()
        module.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        shares += [index for batch in module.train_dataloader() for index in batch.index.tolist()]
    assert sorted(shares) == list(range(6))


def test_evaluation_is_fixed_and_splits_differ():
    first, second = small(), small()
    for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        batches = [next(iter(loader)) for loader in (getattr(first, name)(), getattr(second, name)())]
        assert same(*batches)
    assert not same(first.datasets["val"][0], first.datasets["test"][0])
    assert not same(first.datasets["val"][0], small(seed=1).val_dataloader().dataset[0])
    with pytest.raises(IndexError, match="index=6 .* 0 to 5 .* train"):
        first.datasets["train"][6]


def test_held_out_points_are_other_points_of_the_same_shape():
    module = small(num_points=500, families=["sphere"])
    batch = next(iter(module.train_dataloader()))
    assert batch.points.shape == batch.held_out.shape == (4, 500, 3) and batch.points.dtype == torch.float32
    assert torch.cdist(batch.points, batch.held_out).amin() > 0
    for points in (batch.points, batch.held_out):
        assert (points.norm(dim=-1) - 1).abs().max() < 1e-2
    assert (batch.scale - 1).abs().max() < 1e-5  # a unit sphere
    noisy = next(iter(small(num_points=500, families=["sphere"], noise=0.1).train_dataloader()))
    assert (noisy.points.norm(dim=-1) - 1).std() == pytest.approx(0.1, rel=0.1)


def test_describe_of_the_default_data():
    module = small()
    assert "18 families" in module.describe() and "6 train, 64 val, 64 test clouds of 8 points" in module.describe()
    assert module.class_names == list(studies.FAMILIES)


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for scale, name in enumerate(["ball", "cube", "cone"], 1):
            for split in ("train", "test"):
                file.writestr(f"raw/{name}/{split}/{name}.off", OFF.replace("2 0 0\n0", f"{2 * scale} 0 0\n0"))
    return tmp_path / "raw.zip"


def test_geometric_shapes_from_archive_and_folder(archive, tmp_path):
    modules = [shapes_of(archive, num_points=16)]
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "unpacked")
    modules.append(shapes_of(tmp_path / "unpacked" / "raw", num_points=16))
    for module in modules:
        module.setup()
        assert module.class_names == ["ball", "cone", "cube"]
        assert [len(module.datasets[split]) for split in ("train", "val", "test")] == [48, 3, 3]
        assert same(module.datasets["train"][4], modules[0].datasets["train"][4])
        assert not same(module.datasets["train"][4], module.datasets["train"][7])  # two clouds of one mesh
    assert archive.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["raw.zip", "unpacked"]


def test_geometric_shapes_keeps_classes_for_the_test(archive):
    module = shapes_of(archive, num_points=4, clouds_per_file=2, held_out_classes=1)
    module.setup()
    labels = {split: {int(cloud.label) for cloud in module.datasets[split]} for split in module.datasets}
    assert labels["train"] == labels["val"] and len(labels["test"]) == 1
    assert labels["train"] | labels["test"] == {0, 1, 2} and not labels["train"] & labels["test"]


def test_a_split_that_loses_its_only_class_to_the_test_raises(tmp_path):
    held_out = ["ball", "cube"][int(torch.randperm(2, generator=generator())[0])]
    for name in ("train/ball", "train/cube", f"val/{held_out}", "test/ball", "test/cube"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "part.off").write_text(OFF)
    shapes_of(tmp_path).setup()
    with pytest.raises(ValueError, match=r"no files for \['val'\] with held_out_classes=1"):
        shapes_of(tmp_path, held_out_classes=1).setup()


def test_geometric_shapes_rotates_only_training_clouds(archive):
    for rotate, fixed in (("none", 3), ("z", 1), ("so3", 0)):
        plain, turned = (shapes_of(archive, num_points=8, rotate=r) for r in ("none", rotate))
        plain.setup(), turned.setup()
        assert same(plain.datasets["test"][1], turned.datasets["test"][1])
        a, b = plain.datasets["train"][1].points, turned.datasets["train"][1].points
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1))
        assert int(torch.isclose(a, b, atol=1e-5).all(0).sum()) == fixed


@pytest.mark.skipif(not REAL.exists(), reason="the published archive is not at hand")
def test_the_published_archive():
    module = shapes_of(REAL, num_points=32)
    module.setup()
    assert len(module.class_names) == 40
    assert [len(module.datasets[split]) for split in ("train", "val", "test")] == [640, 40, 40]
    assert all(cloud.points.isfinite().all() for cloud in module.datasets["test"])


def test_archives_are_downloaded_and_verified(monkeypatch, tmp_path, archive, serve):
    monkeypatch.setattr(folders, "CACHE", str(tmp_path / "cache"))
    url = serve(archive.parent) + "raw.zip"
    with pytest.raises(ValueError, match=r"raw.zip.* pass the file as root"):
        shapes_of(url, sha256="0" * 64).prepare_data()
    assert not list((tmp_path / "cache").rglob("*.zip"))
    module = shapes_of(url, num_points=4, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    module.prepare_data()
    archive.unlink()
    module.setup()
    assert len(module.datasets["train"]) == 48 and url in module.describe()
    module.path.unlink()
    with pytest.raises(ConnectionError, match=r"raw.zip could not be downloaded.* pass the file as root"):
        module.prepare_data()


# A folder of the user's own files.


def folder(path, names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(OFF)


def test_folder_splits_by_name(tmp_path):
    folder(tmp_path, [f"{kind}/{i}.off" for kind in ("a", "b") for i in range(10)] + ["a/.hidden.off", "a/notes.md"])
    module = data.PointCloudFolder(root=str(tmp_path), num_points=16)
    module.setup()
    assert [len(module.datasets[split]) for split in ("train", "val", "test")] == [16, 2, 2]
    files = module.files
    assert len({name for names in files.values() for name in names}) == 20
    assert module.class_names == ["a", "b"] and {int(c.label) for c in module.datasets["train"]} == {0, 1}
    again = data.PointCloudFolder(root=str(tmp_path))
    again.setup()
    assert again.files == files


def test_folder_with_train_and_test(tmp_path):
    folder(tmp_path, [f"a/train/{i}.off" for i in range(9)] + ["a/test/x.off", "test/b/y.off"])
    module = data.PointCloudFolder(root=str(tmp_path), num_points=16, clouds_per_file=2)
    module.setup()
    assert [len(module.datasets[split]) for split in ("train", "val", "test")] == [16, 1, 2]
    assert [int(cloud.label) for cloud in module.datasets["test"]] == [0, 1]
    folder(tmp_path, ["stray.off"])
    with pytest.raises(ValueError, match="'stray.off'"):
        data.PointCloudFolder(root=str(tmp_path)).setup()


def test_folder_with_only_a_test_split(tmp_path):
    folder(tmp_path, ["test/a.off"])
    with pytest.raises(ValueError, match="no files for .*train.*val"):
        data.PointCloudFolder(root=str(tmp_path)).setup()


def test_sets_of_points_are_halved_and_padded(tmp_path):
    for size in (1, 7, 100):
        np.save(tmp_path / f"{size}.npy", np.random.default_rng(size).normal(5, 3, (size, 4)))
    module = data.PointCloudFolder(root=str(tmp_path), num_points=16, batch_size=3)
    for split in ("train", "val", "test"):
        (batch,) = getattr(module, f"{split}_dataloader")()
        sizes = {(int(a.sum()), int(b.sum())) for a, b in zip(batch.mask, batch.held_out_mask, strict=True)}
        assert sizes <= {(1, 0), (4, 3), (16, 16)}
        assert not batch.points[~batch.mask].any() and not batch.held_out[~batch.held_out_mask].any()
        original = {len(points): points for points in (np.load(p)[:, :3] for p in tmp_path.glob("*.npy"))}
        for i in range(len(batch.mask)):
            fit, held = batch.mask[i].sum(), batch.held_out_mask[i].sum()
            both = torch.cat([batch.points[i][batch.mask[i]], batch.held_out[i][batch.held_out_mask[i]]])
            found = torch.cdist(
                both * batch.scale[i] + batch.center[i],
                torch.from_numpy(original[{1: 1, 4: 7, 16: 100}[int(fit)]]),
            )
            # Every point is from the file and occurs once, so the held-out points are not fitted.
            assert found.amin(1).max() < 1e-4 and len(found.argmin(1).unique()) == fit + held
            assert batch.points[i].norm(dim=-1).max() == pytest.approx(1 if fit > 1 else 0, abs=1e-5)


def test_pattern_selects_files(tmp_path):
    folder(tmp_path, [f"{kind}/{i}.off" for kind in ("a", "b") for i in range(5)])
    (tmp_path / "a" / "damaged.txt").write_text("no numbers")
    np.savetxt(tmp_path / "b" / "cloud.txt", np.eye(3))
    for pattern, count in (("*.off", 10), ("b/*", 6), ("b/*.txt", 3)):
        module = data.PointCloudFolder(root=str(tmp_path), num_points=16, pattern=pattern)
        module.setup()
        assert sum(len(part) for part in module.datasets.values()) == count
    with pytest.warns(UserWarning, match="damaged.txt"):
        data.PointCloudFolder(root=str(tmp_path), pattern="*.txt").setup()
    with pytest.raises(ValueError, match=r"'\*.ply' matches no"):
        data.PointCloudFolder(root=str(tmp_path), pattern="*.ply").setup()


def test_points_far_from_the_origin_stay_distinct(tmp_path):
    cloud = np.random.default_rng(0).random((600, 3))
    for name, offset in {"0": 0.0, "1": 8e5, "2": 5e6}.items():
        np.save(tmp_path / f"{name}.npy", cloud + offset)
        np.savetxt(tmp_path / f"{name}.xyz", cloud + offset, fmt="%.9f")
    module = data.PointCloudFolder(root=str(tmp_path), num_points=256, val_fraction=0.4, test_fraction=0.4)
    module.setup()
    for dataset in module.datasets.values():
        for item in dataset:
            assert all(len(item.points[:, axis].unique()) == 256 for axis in range(3))
            back = item.points * item.scale + item.center - item.center.round(decimals=-2)  # without the offset
            assert torch.cdist(back, torch.from_numpy(cloud)).amin(1).max() < 1e-6


def test_mixtures_are_returned_in_units_of_a_survey(tmp_path):
    """The resolution of float32 at 5e6 is half a meter."""
    cloud = np.random.default_rng(0).random((600, 3))
    for name, offset in {"a": [8e5, 5e6, 100.0], "b": [0.0, 0.0, 0.0]}.items():
        np.save(tmp_path / f"{name}.npy", cloud + offset)
    module = data.PointCloudFolder(root=str(tmp_path), num_points=256, batch_size=2)
    mixture = PointCloudGMM(num_components=4).eval().predict_step(next(iter(module.val_dataloader())), 0)
    assert (mixture.means[0] - torch.tensor([8e5, 5e6, 100.0]) - 0.5).abs().max() < 0.5
    points = torch.from_numpy(np.load(tmp_path / "a.npy"))[None]
    far, near = mixture[0].log_prob(points), mixture[1].log_prob(points - points.mean(1) + 0.5)
    assert abs(far.mean() - near.mean()) < 0.5


OTHERS = {
    "README.txt": "These clouds come from a scanner.\n2 files, 600 points each.\n",
    "a/LICENSE.txt": "Permission is granted, free of charge, 2024.",
    "train_list.txt": "a_0001\na_0002\n",
    "empty.csv": "",
    "b/notes.csv": "file,operator,date\nx,Å…,2024-01-01\n",
    ".hidden.txt": "1 2 3\n",
    "a/.cache/old.xyz": "1 2 3\n",
}


def test_files_that_are_no_clouds_are_skipped(tmp_path):
    folder(tmp_path, [f"{kind}/{i}.off" for kind in ("a", "b") for i in range(3)])
    np.savetxt(tmp_path / "b" / "scan.txt", np.random.rand(9, 3), header="x y z", encoding="utf-16")
    for name, content in OTHERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    module = data.PointCloudFolder(root=str(tmp_path), num_points=4)
    with pytest.warns(UserWarning, match="README.txt.*a/LICENSE.txt.*b/notes.csv.*empty.csv.*train_list.txt"):
        module.setup()
    assert sum(len(part) for part in module.datasets.values()) == 7 and module.class_names == ["a", "b"]


def test_damaged_texts_are_no_readme(tmp_path):
    for i in range(4):
        np.savetxt(tmp_path / f"{i}.txt", np.random.rand(9, 3))
    (tmp_path / "2.txt").write_text("# scan\n1 2 3\n1 2\n")
    with pytest.raises(ValueError, match="2.txt"):
        data.PointCloudFolder(root=str(tmp_path)).setup()


def test_non_finite_points_of_a_folder_are_dropped_on_request(tmp_path):
    cloud = np.random.default_rng(0).random((40, 3))
    cloud[::4] = np.nan
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", cloud)
    with pytest.raises(ValueError, match="a.npy: point 0 .*drop_non_finite=True"):
        data.PointCloudFolder(root=str(tmp_path)).setup()
    module = data.PointCloudFolder(root=str(tmp_path), drop_non_finite=True)
    module.setup()
    assert len(module.datasets["train"][0].points) == 15 and module.datasets["train"][0].points.isfinite().all()


def test_setup_raises_for_bad_files(tmp_path):
    folder(tmp_path, ["a.off", "b.off", "c.off"])
    (tmp_path / "b.off").write_text(OFF.replace("3 1 2 3", "3 1 2 9"))
    with pytest.raises(ValueError, match=r"b\.off: .*(index|point 9)"):
        data.PointCloudFolder(root=str(tmp_path)).setup()
    (tmp_path / "b.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n")
    with pytest.raises(ValueError, match=r"b\.off: .*area .* 0.0"):
        data.PointCloudFolder(root=str(tmp_path)).setup()


def test_bad_archives_raise(tmp_path, archive):
    content = archive.read_bytes()
    for name, damaged in {
        "cut.zip": content[: len(content) // 2],
        "flipped.zip": content[:60] + bytes([content[60] ^ 0xFF]) + content[61:],
        "text.zip": b"not an archive",
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            shapes_of(tmp_path / name).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_points": 0}, "num_points=0 .* 1"),
        ({"batch_size": 0}, "batch_size=0 .* 1"),
        ({"num_workers": -1}, "num_workers=-1 .* 0"),
        ({"seed": -1}, "seed=-1 .* 0"),
        ({"noise": -0.1}, "noise=-0.1 .* 0"),
        ({"noise": math.nan}, "noise=nan .* 0"),
        ({"rotate": "x"}, "rotate='x' .*none.*z.*so3"),
        ({"train_clouds": 0}, "train_clouds=0 .* 1"),
        ({"families": ["cube"]}, r"families=\['cube'\] .* sphere"),
        ({"families": []}, r"families=\[\] .* sphere"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        studies.ProceduralSurfaces(**arguments)


def test_bad_arguments_of_folders_and_archives_raise(tmp_path, archive):
    with pytest.raises(ValueError, match="root='/no/such' .*zip archive"):
        shapes_of("/no/such").setup()
    with pytest.raises(ValueError, match="held_out_classes=3 .* 3 classes"):
        shapes_of(archive, held_out_classes=3).setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="root='/no/such' .* .off, .ply"):
        data.PointCloudFolder("/no/such").setup()
    with pytest.raises(ValueError, match="root=.* .off, .ply"):
        data.PointCloudFolder(str(tmp_path / "empty")).setup()
    with pytest.raises(ValueError, match="test_fraction=0.6 .* 0.5"):
        data.PointCloudFolder(str(tmp_path), test_fraction=0.6)


@pytest.mark.parametrize("cls", [studies.ProceduralSurfaces, data.PointCloudFolder])
def test_the_command_line_knows_every_argument(cls):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(cls, "data")
    text = parser.format_help()
    for argument in ("num_points", "batch_size", "num_workers", "seed", "noise", "rotate"):
        assert f"--data.{argument}" in text
    assert "points per cloud to fit; as many are held out" in text


def test_sampler_uses_an_epoch_that_is_set_after_iter():
    loader = torch.utils.data.DataLoader(Keys(), batch_size=None, sampler=data.EpochSampler(Keys(), seed=1))
    iterator = iter(loader)
    loader.sampler.set_epoch(3)
    found = list(iterator)
    loader.sampler.set_epoch(0)
    assert [epoch for epoch, _ in found] == [3] * 6 and [key for _, key in found] != [key for _, key in loader]


class Keys(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, key):
        return key
