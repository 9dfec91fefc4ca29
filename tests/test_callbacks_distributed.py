"""Two processes against one on the same global batch, under DDP and FSDP2."""

import os
import socket
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import user_models as users
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from em_lightning.callbacks import LayerwiseEMLoss, SwapActivations
from em_lightning.surgery import swap_activations

SIZES = ((5, 3), (2, 6), (4, 4))  # items of either rank, batch by batch
WEIGHT = 0.01


class Shares(BatchSampler):
    """Hands each rank its share of the global batches; a single process gets both."""

    def __init__(self, ranks):
        self.ranks = ranks

    def __iter__(self):
        start = 0
        for sizes in SIZES:
            ends = [start, start + sizes[0], start + sum(sizes)]
            yield [i for rank in self.ranks for i in range(ends[rank], ends[rank + 1])]
            start = ends[-1]

    def __len__(self):
        return len(SIZES)


class Net(pl.LightningModule):
    """Its own loss is the mean over the global batch; its first hidden layer has a mean of 1,000."""

    def __init__(self, operate=False):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Identity(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            self.encoder[0].bias += 1000.0
            self.encoder[2].weight /= 1000.0
        self.sharded = False
        if operate:
            swap_activations(self, "signed", learnable=True)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        errors = F.cross_entropy(self(x), y, reduction="sum")
        return errors * self.trainer.world_size / sum(SIZES[batch_idx])

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.encoder, mesh=mesh)
            fully_shard(self, mesh=mesh)
            self.sharded = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def data(ranks):
    x = users.normal(sum(map(sum, SIZES)), 6)
    y = torch.arange(len(x)) % 3
    return DataLoader(TensorDataset(x, y), batch_sampler=Shares(ranks))


def losses():
    return [LayerwiseEMLoss("encoder.1", weight=WEIGHT), LayerwiseEMLoss("encoder.3", weight="auto")]


def fit(folder, model, ranks, callbacks, **options):
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(model, data(ranks))
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }


def _rank(rank, port, folder, kind):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    if kind != "fsdp2":
        options = {"static_graph": {"static_graph": True}, "unused": {"find_unused_parameters": True}}.get(kind, {})
        state = fit(
            folder,
            Net(),
            [rank],
            [SwapActivations("signed", arguments={"learnable": True}), *losses()],
            strategy=DDPStrategy(**options),
            devices=2,
        )
    else:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        state = fit(folder, Net(operate=True), [rank], losses(), strategy=strategy, devices=2)
    torch.save(state, f"{folder}/{rank}.pt")
    # Caches of PyTorch keep the group of a sharded model alive, and with it threads that now and then abort the process
    # while the interpreter is taken down: so it is not.
    os._exit(0)


@pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:`isinstance.treespec, LeafSpec.`",
)
@pytest.mark.parametrize("kind", ["ddp", "static_graph", "unused", "fsdp2"])
def test_two_processes_equal_one(kind, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, str(tmp_path), kind), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    callbacks = [SwapActivations("signed", arguments={"learnable": True}), *losses()] if kind != "fsdp2" else losses()
    single = fit(tmp_path, Net(operate=kind == "fsdp2"), [0, 1], callbacks, devices=1)
    for name, value in Net(operate=kind == "fsdp2").named_parameters():
        assert (first[name] - value).norm() > 1e-4, name  # it has been trained
    for name, value in single.items():
        error = ((first[name] - value).norm() / value.norm().clamp_min(1.0)).item()
        print(kind, name, error)  # for the record
        assert error < 1e-6, name
