"""IDX files, also malformed ones; TensorDataModule and TensorBatches on one rank and on several."""

import gzip
import hashlib
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch.utils.data import DataLoader, TensorDataset

from em_lightning import data
from em_lightning.data import images

REAL = Path(os.environ.get("MNIST", Path(__file__).parents[2] / "shared/data/mnist"))


def idx(array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write_set(folder, train=40, test=10, size=28, pack=False):
    """Write the four files of a data set of random images, and return its arrays."""
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[part] = draw.integers(0, 256, (count, size, size), np.uint8), np.arange(count, dtype=np.uint8) % 3
        for name, array in zip(("images-idx3", "labels-idx1"), arrays[part], strict=True):
            content = idx(array)
            path = folder / f"{part}-{name}-ubyte{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(content, mtime=0) if pack else content)
    return arrays


# Files.


@settings(deadline=None)  # the machine may be busy
@given(values=st.data())
def test_idx_arrays_round_trip(tmp_path_factory, values):
    array = values.draw(arrays(np.uint8, array_shapes(max_dims=4, max_side=4)))
    path = tmp_path_factory.mktemp("idx") / "file"
    content = idx(array)
    path.write_bytes(gzip.compress(content, mtime=0) if len(content) % 2 else content)
    found = data.read_idx(path)
    np.testing.assert_array_equal(found.numpy(), array)
    assert found.dtype == torch.uint8


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "IDX"),
        (b"\x00\x00", "IDX"),
        (b"P5 28 28 255", "IDX"),
        (b"\x00\x00\x07\x01" + bytes(8), "IDX"),
        (b"\x00\x00\x0b\x01\x00\x00\x00\x01\x00\x00", "IDX"),
        (b"\x00\x00\x08\x00", "IDX"),
        (GOOD[:-1], r"size 5 .*\(2,\s?3\)"),
        (GOOD + b"\x00", r"size 7 .*\(2,\s?3\)"),
        (GOOD[:10], "IDX"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "IDX"),
        (b"\x00\x00\x08\xff" + b"\x00\x00\x00\x02" * 255, "IDX"),
        (PACKED[:-9], "damaged"),
        (PACKED[:-8] + b"12345678", "damaged"),
        (b"\x1f\x8b" + b"garbage of some length", "damaged"),
    ],
)
def test_malformed_files_raise_with_their_name(tmp_path, content, message):
    path = tmp_path / "bad-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad-idx3-ubyte: .*{message}"):
        data.read_idx(path)


def test_missing_file_raises_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        data.read_idx(tmp_path / "gone")


# Batches.


def test_batches_are_those_of_a_data_loader():
    x, y = torch.randn(10, 3), torch.arange(10)
    expected = DataLoader(TensorDataset(x, y), batch_size=4)
    batches = data.TensorBatches([x, y], batch_size=4, shuffle=False)
    assert len(batches) == len(expected) == 3
    for found, (a, b) in zip(batches, expected, strict=True):
        assert torch.equal(found[0], a) and torch.equal(found[1], b)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        batches = data.TensorBatches([torch.arange(50)], batch_size=8, seed=seed)
        batches.sampler.set_epoch(epoch)
        return torch.cat([batch for (batch,) in batches]).tolist()

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert sorted(order(1, 1)) == list(range(50))


@pytest.mark.parametrize("size", [64, 61, 57])
def test_ranks_share_each_batch_of_a_single_process(size):
    one = list(data.TensorBatches([torch.arange(size)], batch_size=8, seed=5))
    parts = [list(data.TensorBatches([torch.arange(size)], 4, num_replicas=2, rank=rank, seed=5)) for rank in (0, 1)]
    assert len(one) == len(parts[0]) == len(parts[1])
    for (whole,), (left,), (right,) in zip(one, *parts, strict=True):
        assert set(left.tolist()) | set(right.tolist()) == set(whole.tolist()) or len(whole) == 1
        assert len(left) and len(right)  # also for the last batch, which has fewer items than ranks


def test_uint8_is_converted_to_0_to_1():
    (pixels,) = next(iter(data.TensorBatches([torch.tensor([[0, 51, 255]], dtype=torch.uint8)], 1)))
    assert pixels.dtype == torch.float32 and torch.equal(pixels, torch.tensor([[0, 51, 255]]) / 255)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.TensorBatches([torch.zeros(2), torch.zeros(3)], 1), r"\[2, 3\]"),
        (lambda: data.TensorBatches([torch.zeros(2)], 1, num_replicas=3), "2 rows .* 3 ranks"),
        (lambda: data.TensorBatches([torch.zeros(2)], 0), "batch_size=0"),
        (lambda: data.Digits(val_size=-1), "val_size=-1"),
        (lambda: data.Digits(val_size=1437).setup(), "val_size=1437 .* 1437"),
        (lambda: data.MNIST("nowhere").setup(), "root='nowhere' .* train-images"),
    ],
)
def test_wrong_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Data modules.


def test_digits_are_split_in_the_order_of_the_file():
    digits = data.Digits()
    x, y = digits.whole("train")
    assert x.shape == (1437, 1, 8, 8) and (x.min(), x.max()) == (0, 1) and y.dtype == torch.int64
    assert len(digits.whole("test").y) == 360 and digits.num_features == 64 and digits.num_classes == 10
    assert torch.equal(digits.whole("val").x, digits.whole("test").x)
    assert "digits" in digits.describe() and "1437 train, 360 test" in digits.describe()


def test_validation_split_does_not_depend_on_the_seed():
    splits = []
    for seed in (0, 1):
        digits = data.Digits(val_size=100, seed=seed)
        train, val = digits.whole("train"), digits.whole("val")
        assert (len(train.y), len(val.y)) == (1337, 100)
        assert not {tuple(x.flatten().tolist()) for x in val.x} & {tuple(x.flatten().tolist()) for x in train.x}
        splits.append(val.x)
    assert torch.equal(*splits)


@pytest.mark.parametrize("pack", [False, True])
def test_mnist_reads_four_files(tmp_path, pack):
    arrays = write_set(tmp_path, pack=pack)
    mnist = data.MNIST(str(tmp_path), batch_size=16, eval_batch_size=4)
    assert (mnist.shape, mnist.num_features, mnist.num_classes) == ((1, 28, 28), 784, 10)
    x, y = mnist.whole("train")
    np.testing.assert_allclose(x.numpy()[:, 0], arrays["train"][0] / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(y.numpy(), arrays["train"][1])
    assert [len(part) for part, _ in mnist.train_dataloader()] == [16, 16, 8]
    assert [len(part) for part, _ in mnist.test_dataloader()] == [4, 4, 2]
    assert str(tmp_path) in mnist.describe() and "40 train, 10 test" in mnist.describe()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "t10k-labels-idx1-ubyte").unlink(), "has no t10k-labels-idx1-ubyte or"),
        (
            lambda root: (root / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((10, 4, 4), np.uint8))),
            r"t10k .*\(10, 4, 4\)",
        ),
        (
            lambda root: (root / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(9, np.uint8))),
            r"t10k .*\(9,\)",
        ),
        (lambda root: (root / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(10, 17, np.uint8))), "label 17"),
    ],
)
def test_mismatched_files_raise(tmp_path, spoil, message):
    write_set(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.MNIST(str(tmp_path)).setup()


@pytest.fixture
def mirror(tmp_path, monkeypatch, serve):
    """Serve a small data set under the names of MNIST, with the hashes of its files."""
    write_set(tmp_path / "served", pack=True)
    hashes = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in (tmp_path / "served").iterdir()}
    monkeypatch.setattr(images, "MNIST_HASHES", {name: hashes[name] for name in images.MNIST_HASHES})
    monkeypatch.setattr(images, "MNIST_URL", serve(tmp_path / "served"))
    monkeypatch.setattr(images, "CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_download_is_verified_and_cached(mirror):
    mnist = data.MNIST()
    mnist.prepare_data()
    for path in (mirror / "served").iterdir():
        path.unlink()
    assert "40 train, 10 test" in mnist.describe()  # from the cache
    assert len(list((mirror / "cache").rglob("*"))) == 5


def test_download_with_a_wrong_hash_raises(mirror, monkeypatch):
    monkeypatch.setitem(images.MNIST_HASHES, "t10k-labels-idx1-ubyte", "0" * 32)
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz.*pass their folder as root"):
        data.MNIST().prepare_data()
    assert len(list((mirror / "cache").rglob("*.gz"))) == 3


def test_failed_download_names_the_remedy(mirror, monkeypatch):
    monkeypatch.setattr(images, "MNIST_URL", images.MNIST_URL + "gone/")
    with pytest.raises(ConnectionError, match="gone/train-images.*pass their folder as root"):
        data.MNIST().prepare_data()


def test_ranks_of_a_data_module_share_batches():
    digits = data.Digits(batch_size=32)
    digits.trainer = SimpleNamespace(world_size=2, global_rank=1)
    assert len(digits.train_dataloader()) == 23 and digits.train_dataloader().rank == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="needs MNIST beside the project")
def test_the_published_files():
    mnist = data.MNIST(str(REAL))
    assert mnist.source == f"images in {REAL}" and mnist.shape == (1, 28, 28)
