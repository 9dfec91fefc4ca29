"""Tables in memory and in files, and loaders of their blocks."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch

from em_lightning.data import (
    EpochSampler,
    RandomDataset,
    ResumableLoader,
    Table,
    TableBlocks,
    TabularDataModule,
    TensorBatches,
)
from em_lightning.studies import GaussianBlobs

ROOT = Path(__file__).parents[1]


def shards(folder, x, cuts):
    folder.mkdir()
    bounds = [0, *cuts, len(x)]
    for number, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
        np.save(folder / f"{number:03d}.npy", x[low:high].numpy())
    return folder


@pytest.fixture
def x():
    return torch.randn(101, 4)


def tables(x, folder):
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "columns_first.npy", np.asfortranarray(x.numpy()))
    return [
        Table(x),
        Table(x.numpy()),
        Table(folder / "x.npy"),
        Table(str(folder / "columns_first.npy")),
        Table(shards(folder / "shards", x, [1, 60, 100])),
    ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("third", [101 * 5 * 4, 101 * 5 * 4 - 1])  # of the free memory
def test_a_table_that_fits_is_copied_to_the_gpu(x, weighted, third, tmp_path, monkeypatch):
    """The CPU stands for the GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * third, 0))
    weights = torch.rand(101) if weighted else None
    folder = shards(tmp_path / "shards", x, [1, 60, 100])
    blocks = TableBlocks(Table(folder), None if weights is None else Table(weights, 1, "weights"), 20, shuffle=True)
    expected, sample = list(blocks), blocks.sample(30)
    blocks.keep_on(torch.device("cpu"))
    copied = third == 101 * 5 * 4 or not weighted
    assert isinstance(blocks.table.parts[0], torch.Tensor) == copied
    if copied:
        for shard in folder.iterdir():
            shard.unlink()
    torch.testing.assert_close(list(blocks), expected, rtol=0, atol=0)
    torch.testing.assert_close(blocks.sample(30), sample, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_loaders_of_a_trainer_on_a_gpu_keep_their_tables_there(x, kind, monkeypatch):
    copied = []
    monkeypatch.setattr(TableBlocks, "keep_on", lambda self, device: copied.append(device.type))
    data = TabularDataModule(x, held_out=x[:50])
    data.trainer = SimpleNamespace(
        world_size=1, global_rank=0, strategy=SimpleNamespace(root_device=torch.device(kind))
    )
    data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.blocks()
    assert copied == ["cuda"] * 3 * (kind == "cuda")


def test_rows_do_not_depend_on_the_storage(x, tmp_path):
    chosen = torch.tensor([0, 1, 2, 59, 60, 99, 100])
    for table in tables(x, tmp_path):
        assert len(table) == 101 and table.shape == (101, 4)
        for start, stop in ((0, 101), (0, 1), (1, 60), (30, 100), (59, 61), (100, 101)):
            assert torch.equal(table.rows(start, stop), x[start:stop])
        assert torch.equal(table.take(chosen), x[chosen])


def test_blocks_in_memory_are_views_and_blocks_of_files_are_copies(x, tmp_path):
    assert Table(x).rows(3, 50).data_ptr() == x[3:].data_ptr()
    np.save(tmp_path / "x.npy", x.numpy())
    Table(tmp_path / "x.npy").rows(0, 5).zero_()
    assert torch.equal(Table(tmp_path / "x.npy").rows(0, 5), x[:5])


@pytest.mark.parametrize(
    "dtype, expected",
    [("f4", "float32"), ("f8", "float64"), ("f2", "float32"), ("i2", "float32"), ("i8", "float64"), (">f4", "float32")]
    + [("longdouble", "float64")],
)
def test_dtype_conversions_keep_values(dtype, expected, tmp_path):
    numbers = np.arange(12).reshape(6, 2).astype(dtype)
    np.save(tmp_path / "x.npy", numbers)
    rows = Table(tmp_path / "x.npy").rows(2, 5)
    assert str(rows.dtype) == f"torch.{expected}" and np.array_equal(rows.numpy(), numbers[2:5].astype(expected))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world, block_rows", [(1, 1000), (1, 7), (2, 30), (4, 8), (5, 1), (101, 3)])
def test_every_row_is_in_one_block_of_one_rank(world, block_rows, shuffle, x):
    counts = torch.arange(101.0)
    seen, lengths = [], set()
    for rank in range(world):
        blocks = TableBlocks(Table(x), Table(counts, ndim=1), block_rows, shuffle, world, rank)
        batches = list(blocks)
        assert len(batches) == len(blocks)
        lengths.add(len(blocks))
        for points, weights in batches:
            assert 0 < len(points) <= max(block_rows, 2) and torch.equal(points, x[weights.long()])
            seen.append(weights)
    assert len(lengths) == 1 and torch.equal(torch.cat(seen).sort().values, counts)
    sizes = {len(weights) for weights in seen}
    assert max(sizes) - min(sizes) <= 1


def test_shuffling_is_a_function_of_seed_and_epoch(x):
    def order(seed, epoch):
        blocks = TableBlocks(Table(x), block_rows=10, shuffle=True, seed=seed)
        blocks.set_epoch(epoch)
        return torch.cat([points for points, _ in blocks])

    assert torch.equal(order(1, 3), order(1, 3))
    assert not torch.equal(order(1, 3), order(1, 4)) and not torch.equal(order(1, 3), order(2, 3))


def test_resumed_loader_continues_after_its_last_block(x):
    straight = TableBlocks(Table(x), block_rows=10, shuffle=True)
    straight.set_epoch(2)
    blocks = list(straight)
    for given in range(len(blocks) + 1):
        first = TableBlocks(Table(x), block_rows=10, shuffle=True)
        first.set_epoch(2)
        iterator = iter(first)
        for _ in range(given):
            next(iterator)
        second = TableBlocks(Table(x), block_rows=10, shuffle=True)
        second.load_state_dict(first.state_dict())
        iterator = iter(second)
        second.set_epoch(2)  # Lightning calls set_epoch after it has created the iterator
        rest = blocks[given:] or blocks
        assert all(torch.equal(one.points, two.points) for one, two in zip(rest, iterator, strict=True))
        assert len(list(second)) == len(blocks)


def test_sample_covers_the_table_and_is_equal_on_all_ranks(x):
    numbers = Table(torch.arange(1000.0)[:, None])
    samples = [TableBlocks(numbers, None, 100, False, 4, rank).sample(50, seed=3).points for rank in range(4)]
    assert all(torch.equal(samples[0], other) for other in samples)
    assert torch.equal((samples[0][:, 0] / 20).floor(), torch.arange(50.0))
    assert torch.equal(TableBlocks(Table(x)).sample(10**6).points, x)


@pytest.mark.parametrize("folder", [None, "made"])
def test_blobs_do_not_depend_on_the_storage(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"num_points": 1001, "num_features": 3, "true_components": 4, "held_out_points": 50, "seed": 2}
    data = GaussianBlobs(**options, folder=folder, block_rows=300)
    data.prepare_data()
    found = torch.cat([points for points, _ in data.train_dataloader()])
    assert torch.equal(found, torch.cat([points for points, _ in GaussianBlobs(**options).train_dataloader()]))
    assert sum(len(points) for points, _ in data.val_dataloader()) == 50
    assert "1,001 x 3 from a mixture of 4 Gaussians" in data.describe() and data.num_features == 3
    if folder:
        assert len({len(np.load(path)) for path in (tmp_path / "made").glob("*/*.npy")}) == 3
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "made").rglob("*.npy"))]
    data.prepare_data()
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "made").rglob("*.npy"))]
    # The rows follow the true mixture: the mean of log p is minus its entropy.
    truth = data.truth()
    assert truth.weights.sum().item() == pytest.approx(1.0)
    other = truth.sample(2000).float()
    assert truth.log_prob(found[None]).mean().item() == pytest.approx(truth.log_prob(other).mean().item(), abs=0.2)


def test_data_module_has_loaders_for_every_stage(x):
    data = TabularDataModule(x, torch.ones(101), x[:20], block_rows=40, shuffle=True)
    assert data.describe() == "101 x 4 from a tensor of float32, weighted; 20 held out"
    assert [len(batch.points) for batch in data.test_dataloader()] == [20]
    assert next(iter(data.val_dataloader())).weights is None and next(iter(data.train_dataloader())).weights is not None
    plain = TabularDataModule(x)
    assert sum(len(points) for points, _ in plain.predict_dataloader()) == 101
    assert "101 x 4" in plain.describe()
    assert isinstance(plain, lightning.LightningDataModule)


def test_hidden_files_are_not_shards(x, tmp_path):
    folder = shards(tmp_path / "shards", x, [50])
    np.save(folder / ".hidden.npy", np.zeros((4, 9)))
    assert len(Table(folder)) == 101


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: Table(f / "gone.npy"), ["data=", "gone.npy", "neither an .npy file nor a folder"]),
        (lambda f: Table(f / "empty"), ["data=", "neither an .npy file nor a folder"]),
        (lambda f: Table(torch.zeros(3)), ["data has shape (3,)", "(N, D)"]),
        (lambda f: Table(torch.zeros(0, 3)), ["shape (0, 3)", "at least one row"]),
        (lambda f: Table(torch.zeros(3, 2), ndim=1, name="weights"), ["weights has shape (3, 2)", "(N,)"]),
        (lambda f: Table(f / "objects.npy"), ["objects.npy", "numpy.save"]),
        (lambda f: Table(f / "text.npy"), ["text.npy", "numpy.save"]),
        (lambda f: Table(f / "complex.npy"), ["complex.npy", "complex128"]),
        (lambda f: Table(f / "uneven"), ["shape (4, 3) in 001.npy", "the same D in all shards"]),
        (lambda f: TableBlocks(Table(torch.zeros(3, 2)), Table(torch.ones(2), 1)), ["weights", "2 and 3"]),
        (lambda f: TableBlocks(Table(torch.zeros(3, 2)), num_replicas=4), ["3 rows", "4 ranks"]),
        (lambda f: TableBlocks(Table(torch.zeros(3, 2)), block_rows=0), ["block_rows=0"]),
        (
            lambda f: list(TableBlocks(Table(torch.zeros(2, 2)), Table(torch.tensor([1.0, -1.0]), 1))),
            ["weights", "-1.0 in row 1"],
        ),
        (
            lambda f: TabularDataModule(torch.zeros(3, 2), held_out=torch.zeros(3, 4)).setup(),
            ["held_out", "(3, 4) and (3, 2)"],
        ),
        (lambda f: GaussianBlobs(num_points=0), ["num_points=0"]),
        (lambda f: GaussianBlobs(true_components=0), ["true_components=0"]),
        (lambda f: TabularDataModule(torch.zeros(3, 2), seed=-1), ["seed=-1"]),
    ],
)
def test_wrong_data_raise(call, words, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("1,2,3")
    np.save(tmp_path / "complex.npy", np.zeros((3, 2), dtype=complex))
    (tmp_path / "empty").mkdir()
    shards(tmp_path / "uneven", torch.zeros(9, 2), [5])
    np.save(tmp_path / "uneven" / "001.npy", np.zeros((4, 3)))
    with pytest.raises(ValueError) as caught:
        call(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.fixture
def sharded(x, tmp_path):
    """A folder of three shards with 40, 20 and 41 rows."""
    return shards(tmp_path / "shards", x, [40, 60])


@pytest.mark.parametrize(
    "change", ["other rows", "shorter", "empty", "wider", "another type", "truncated", "removed", "a folder"]
)
def test_a_shard_that_changes_during_a_run_is_named(change, sharded, x):
    blocks = iter(TableBlocks(Table(sharded), block_rows=10))
    next(blocks)
    path = sharded / "001.npy"
    content = {
        "other rows": x[:20],
        "shorter": x[:15],
        "empty": x[:0],
        "wider": torch.zeros(20, 5),
        "another type": x[:20].double(),
    }
    if change in content:
        np.save(path, content[change].numpy())
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.unlink()
        if change == "a folder":
            path.mkdir()
    with pytest.raises(ValueError, match=r"data: .*001\.npy"):
        list(blocks)


def test_what_is_no_shard_is_refused_or_left_out(sharded, x):
    (sharded / ".hidden.npy").write_text("not read")
    assert len(Table(sharded)) == 101
    for name in ("001 (copy).npy", "001 (1).npy", "001 copy.npy", "001 - Copy.npy"):
        np.save(sharded / name, x[:3].numpy())
        with pytest.raises(ValueError, match=re.escape(name)):
            Table(sharded)
        (sharded / name).unlink()
    np.save(sharded / "002 more rows.npy", x[:3].numpy())
    with pytest.raises(ValueError, match="002 more rows.npy"):
        Table(sharded)
    (sharded / "002 more rows.npy").rename(sharded / "more rows.npy")  # a blank alone does not make a copy
    assert len(Table(sharded)) == 104


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="os.mkfifo does not exist on this system")
def test_a_pipe_is_refused(sharded):
    os.mkfifo(sharded / "003.npy")
    for source in (sharded, sharded / "003.npy"):
        with pytest.raises(ValueError, match="003.npy is not a regular file"):
            Table(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_located(value, sharded, x):
    array = np.load(sharded / "001.npy")
    array[7, 2] = value
    np.save(sharded / "001.npy", array)
    blocks = TableBlocks(Table(sharded), block_rows=30)
    for read in (lambda: list(blocks), lambda: blocks.sample(101)):
        with pytest.raises(ValueError, match=r"data must be finite, got \[.*(nan|inf).*\] in row 7 of .*001.npy"):
            read()
    weights = torch.ones(101)
    weights[47] = 0.0
    assert len(list(TableBlocks(Table(sharded), Table(weights, 1), block_rows=30))) == 4


def test_shards_without_rows_are_skipped(x, tmp_path):
    table = Table(shards(tmp_path / "shards", x, [0, 40, 40, 101]))
    assert torch.equal(table.rows(0, 101), x) and torch.equal(table.take(torch.arange(101)), x)
    assert table.locate(40).endswith("row 0 of " + str(tmp_path / "shards" / "003.npy"))


@pytest.mark.parametrize("kind", ["DataLoader", "batches", "blocks"])
@pytest.mark.parametrize("position", [0, 2, 7])
def test_a_loader_resumes_within_an_epoch_and_then_starts_at_the_beginning(kind, position):
    items = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    dataset = RandomDataset(lambda index, generator: items[index] + torch.rand(2, generator=generator), 20, "train")
    make = {
        "DataLoader": lambda: ResumableLoader(dataset, 3, sampler=EpochSampler(dataset)),
        "batches": lambda: TensorBatches([items], 3),
        "blocks": lambda: TableBlocks(Table(items), block_rows=3, shuffle=True),
    }[kind]

    def values(loader):
        return [batch if isinstance(batch, torch.Tensor) else batch[0] for batch in loader]

    straight, loader = values(make()), make()
    loader.load_state_dict({"position": position, "length": 7})
    resumed = values(loader)
    assert len(straight) == 7 and len(resumed) == 7 - position % 7
    assert all(map(torch.equal, resumed, straight[position % 7 :]))
    next(iter(loader))  # an epoch that ends early
    assert loader.state_dict() == {"position": 1, "length": 7} and all(map(torch.equal, values(loader), straight))
    with pytest.raises(ValueError, match="from batch 2 of 9, .* has 7: "):  # other data or another batch size
        loader.load_state_dict({"position": 2, "length": 9})
    loader.load_state_dict({"position": 9, "length": 9})  # the end of an epoch
    assert all(map(torch.equal, values(loader), straight))


LARGE = """
import re, resource, sys
import lightning, torch
from em_lightning.data import TabularDataModule
from em_lightning.modules import GaussianMixtureModule
torch.set_num_threads(1)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
def fit(rows):
    module = GaussianMixtureModule(2, 4, covariance="diag", tol=0.0)
    lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(module, TabularDataModule(rows, block_rows=2**14))
    return module
fit(torch.rand(1000, 4))  # imports and compiles what is needed
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
print(float(fit(sys.argv[1]).log_likelihood))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory in /proc, as Linux has")
def test_a_table_larger_than_the_memory_is_fitted(tmp_path):
    """12 shards of 24 MiB are read with 96 MiB of address space; a read of all rows needs more."""
    generator = np.random.default_rng(0)
    for number in range(12):
        np.save(tmp_path / f"{number:02}.npy", generator.random((24 * 2**16, 4), dtype=np.float32))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LARGE, str(tmp_path), str(96 * 2**20)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    table = Table(tmp_path)
    assert len(table) * 4 * 4 == 12 * 24 * 2**20
    assert -1.0 < float(done.stdout.splitlines()[-1]) < 0.0  # 0 is that of the uniform distribution
