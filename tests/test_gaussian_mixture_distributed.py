"""The mixture does not depend on the number of processes, and a resumed run ends where an uninterrupted one does."""

import socket
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from helpers import parts
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from test_gaussian_mixture import KINDS, assert_same, rows, sklearn_of, start_of, trainer
from torch.utils.data import DataLoader

import em_lightning
from em_lightning.callbacks import LayerwiseEMLoss
from em_lightning.checkpoints import RunCheckpoint
from em_lightning.data import TabularDataModule
from em_lightning.modules import GaussianMixtureModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
ITERATIONS = 20


def fit_on_ranks(rank, folder, weighted, resume):
    """Fit all covariance types under Lightning's DDP, and resume a run of two ranks within an epoch."""
    import warnings

    warnings.filterwarnings("ignore", ".*no .val_dataloader.*|Checkpoint directory.*")
    found = {}
    for kind in KINDS:
        module = GaussianMixtureModule(3, 3, covariance=kind, tol=0.0)
        module.start_from(torch.load(f"{folder}/start-{kind}.pt", weights_only=False))
        weights = f"{folder}/weights.npy" if weighted else None
        data = TabularDataModule(f"{folder}/shards", weights, block_rows=60)
        on_ranks(folder, max_epochs=ITERATIONS).fit(module, data)
        found[kind] = [*parts(module.mixture), module.log_likelihood]
    found["stopped"] = fit_until_it_stops(on_ranks(folder, max_epochs=300), folder)
    # 6 blocks an epoch on each of two ranks: step 15 is within the third epoch, step 12 ends the second.
    for step in (None, 15, 12) if resume else ():
        checkpoint = step and f"{folder}/None/step={step}.ckpt"
        found[f"resumed {step}"] = list(parts(checkpointed(on_ranks, f"{folder}/{step}", checkpoint, folder).mixture))
    return found


def fit_until_it_stops(fit, folder):
    module = GaussianMixtureModule(3, 3, tol=1e-4)
    fit.fit(module, TabularDataModule(f"{folder}/shards", block_rows=60))
    return [*parts(module.mixture), module.iterations]


def checkpointed(make, target, checkpoint, folder, block_rows=60):
    """Run five epochs with a checkpoint at each step, or resume from one."""
    module = GaussianMixtureModule(3, 3, tol=0.0)
    keep = ModelCheckpoint(target, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = make(target, max_epochs=5, enable_checkpointing=True, callbacks=[keep])
    fit.fit(module, TabularDataModule(f"{folder}/shards", block_rows=block_rows), ckpt_path=checkpoint)
    return module


def on_ranks(folder, **options):
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()

    class Spawned(LightningEnvironment):
        """This process is a rank already."""

        creates_processes_externally = True

        def world_size(self):
            return world

        def global_rank(self):
            return rank

        def local_rank(self):
            return rank

        def node_rank(self):
            return 0

        def set_world_size(self, size):
            pass

        def set_global_rank(self, rank):
            pass

    strategy = DDPStrategy(cluster_environment=Spawned(), process_group_backend="gloo")
    return trainer(folder, devices=world, strategy=strategy, **options)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards whose lengths have no common divisor, one of them without rows, and the starts."""
    folder = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    x = rows(701)
    (folder / "shards").mkdir()
    for number, (low, high) in enumerate(((0, 350), (350, 350), (350, 639), (639, 701))):
        np.save(folder / "shards" / f"{number}.npy", x[low:high].numpy())
    np.save(folder / "weights.npy", torch.ones(701).numpy())
    for kind in KINDS:
        torch.save(start_of(x, kind), folder / f"start-{kind}.pt")
    return folder, x


def test_two_and_four_processes_equal_scikit_learn(shards, tmp_path):
    folder, x = shards
    alone = fit_until_it_stops(trainer(tmp_path, max_epochs=300), folder)
    assert 1 < int(alone[3]) < 300
    for world in (2, 4):
        (tmp_path / str(world)).mkdir()
        arguments = (str(folder), world == 2, world == 2)
        first, *others = run_ranks(fit_on_ranks, *arguments, folder=tmp_path / str(world), world_size=world)
        for name, values in first.items():
            for other in others:
                assert all(torch.equal(one, two) for one, two in zip(values, other[name], strict=True))
        for kind in KINDS:
            start = torch.load(folder / f"start-{kind}.pt", weights_only=False)
            expected = sklearn_of(x, start, kind, ITERATIONS)
            assert_same(em_lightning.Mixture(*first[kind][:3]), expected, kind)
            assert float(first[kind][3]) == pytest.approx(expected.lower_bound_, abs=1e-10)
        assert int(first["stopped"][3]) == int(alone[3])
        assert all(torch.allclose(one, two, atol=1e-8) for one, two in zip(first["stopped"], alone, strict=True))
        for step in (15, 12) if world == 2 else ():
            for one, two in zip(first["resumed None"], first[f"resumed {step}"], strict=True):
                assert torch.equal(one, two)
    for block_rows, words in ((60, "from batch 3 of 6, .* has 12: "), (120, "2 processes.* 1")):
        with pytest.raises(ValueError, match=words):
            checkpointed(trainer, tmp_path / "alone", folder / "None" / "step=15.ckpt", folder, block_rows)


@pytest.mark.parametrize("method", ["em", "stochastic"])
@pytest.mark.parametrize("steps", [(1, 2), (4, 6, 9), (4, 8, 11), (7,), (12,)])
def test_one_process_resumes_from_any_block_bitwise(method, steps, tmp_path):
    torch.manual_seed(0)
    x = rows(220)
    data = TabularDataModule(x, held_out=x[:50], block_rows=70, shuffle=True)  # 4 blocks
    straight = None
    checkpoint = None
    for step in (*steps, None):
        keep = ModelCheckpoint(tmp_path / str(step), filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = GaussianMixtureModule(3, 3, method=method, tol=0.0)
        fit = trainer(tmp_path, max_epochs=3, callbacks=[keep], enable_checkpointing=True)
        fit.fit(module, data, ckpt_path=checkpoint)
        assert fit.global_step == 12 and int(module.iterations) == 3
        straight = straight or module
        checkpoint = tmp_path / str(step) / f"step={step}.ckpt"
        for name, value in straight.state_dict().items():
            assert torch.equal(value, module.state_dict()[name]), (name, step)


def fit_with_a_rank_without_rows(rank, folder):
    """Rank 1 of three has blocks without rows."""
    table = torch.load(f"{folder}/rows.pt", weights_only=True)
    shares = [table[:40], table[:0], table[40:]]
    module = GaussianMixtureModule(3, 3, tol=0.0)
    module.start_from(torch.load(f"{folder}/start.pt", weights_only=False))
    blocks = DataLoader(list(zip(shares[rank].tensor_split(4), strict=True)), batch_size=None)  # one block per item
    on_ranks(folder, max_epochs=5, use_distributed_sampler=False).fit(module, blocks)
    return [*parts(module.mixture), module.log_likelihood]


def test_a_rank_without_rows_takes_part(tmp_path):
    torch.manual_seed(0)
    x = rows(120)
    start = start_of(x, "full")
    torch.save(x, tmp_path / "rows.pt")
    torch.save(start, tmp_path / "start.pt")
    found = run_ranks(fit_with_a_rank_without_rows, str(tmp_path), folder=tmp_path, world_size=3)
    alone = GaussianMixtureModule(3, 3, tol=0.0)
    alone.start_from(start)
    trainer(tmp_path, max_epochs=5).fit(alone, TabularDataModule(x, block_rows=30))
    for values in found:
        for value, expected in zip(values, [*parts(alone.mixture), alone.log_likelihood], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def fit_until_a_shard_is_gone(rank, folder):
    """The shard of rank 1 is removed after its first epoch."""

    class Remove(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if rank == 1:
                Path(folder, "1", "1.npy").unlink()

    module = GaussianMixtureModule(3, 3, tol=0.0)
    try:
        on_ranks(folder, max_epochs=5, callbacks=[Remove()]).fit(
            module, TabularDataModule(f"{folder}/{rank}", block_rows=30)
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # as the end of the process does
    return "no error"


class Plain(lightning.LightningModule):
    """A module of a user, which has nothing of this library."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


DIFFERENCES = ["checkpoint", "number of items", "checkpoint callbacks", "LayerwiseEMLoss.options.weight"]


def fit_with_a_difference(rank, folder, difference):
    """Rank 1 differs from rank 0; return the error."""
    other = rank == 1 and difference
    keep = RunCheckpoint(
        f"{folder}/{rank if difference == 'checkpoint' else 0}",
        save_last=True,
        every_n_train_steps=3 if other == "checkpoint callbacks" else 2,
        enable_version_counter=False,
    )
    loss = LayerwiseEMLoss("layers.0", weight=1.0 if other == "LayerwiseEMLoss.options.weight" else 0.1)
    loader = DataLoader(torch.ones(39 if other == "number of items" else 40, 2), batch_size=4)
    for epochs in (1, 2):
        path = f"{folder}/{rank}/last.ckpt"
        callbacks = [keep, loss] if epochs == 1 else [RunCheckpoint(f"{folder}/{rank}")]
        fit = on_ranks(folder, max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks)
        try:
            fit.fit(Plain(), loader, ckpt_path=path if epochs == 2 and Path(path).exists() else None)
        except ValueError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_ranks_of_any_module_that_differ_end_before_training(difference, tmp_path):
    for message in run_ranks(fit_with_a_difference, str(tmp_path), difference, folder=tmp_path):
        assert f"the ranks must have the same {difference}" in message and "(rank 1)" in message
        copy = f"Copy {tmp_path}/0/last.ckpt from host {socket.gethostname()} (rank 0) to the same place on all hosts"
        assert (copy in message) == (difference == "checkpoint")


def test_a_shard_that_vanishes_on_one_rank_ends_all(tmp_path):
    torch.manual_seed(0)
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        for number, part in enumerate(rows(120).split(60)):
            np.save(tmp_path / rank / f"{number}.npy", part.numpy())
        torch.manual_seed(0)
    other, named = run_ranks(fit_until_a_shard_is_gone, str(tmp_path), folder=tmp_path)
    assert named.startswith("ValueError: data: ") and "1.npy does not exist" in named
    assert other.startswith("RuntimeError") and "closed" in other or "reset" in other
