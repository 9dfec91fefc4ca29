"""LightningModules as users write them, without em_lightning."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# Lightning's advice on small data.
QUIET = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The number of training batches",
    "ignore:`isinstance.treespec, LeafSpec.`",
)


class Task(pl.LightningModule):
    """Classification with Adam; subclasses build ``self.net``."""

    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader(x, classes=3, batch_size=8, seed=0):
    y = torch.randint(classes, (len(x),), generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class MLP(Task):
    def build(self):
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x))

    @staticmethod
    def data():
        return loader(normal(24, 6))


class ReusedMLP(MLP):
    """One activation on the LightningModule itself, called after each layer."""

    def build(self):
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 8)
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))))


class BasicBlock(nn.Module):
    """torchvision's block, whose relu is called twice."""

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, layers=(2, 2, 2, 2), width=4, num_classes=3):
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(width, layers[0])
        self.layer2 = self._make_layer(2 * width, layers[1], 2)
        self.layer3 = self._make_layer(4 * width, layers[2], 2)
        self.layer4 = self._make_layer(8 * width, layers[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)

    def _make_layer(self, planes, blocks, stride=1):
        downsample = None
        if stride != 1 or self.inplanes != planes:
            downsample = nn.Sequential(nn.Conv2d(self.inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        layers = [BasicBlock(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes
        layers += [BasicBlock(planes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ResNet18(Task):
    def build(self):
        self.net = ResNet()

    @staticmethod
    def data():
        return loader(normal(16, 3, 32, 32))


class Transformer(Task):
    """The activation is the function ``F.relu``, as ``nn.TransformerEncoderLayer`` has it by default."""

    def build(self):
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))

    @staticmethod
    def data():
        return loader(normal(24, 5, 8))


class LateMLP(MLP):
    """Builds its layers in ``configure_model``."""

    def build(self):
        self.encoder = None

    def configure_model(self):
        if self.encoder is None:
            super().build()


class SetupMLP(MLP):
    """Builds its head in ``__init__`` and its encoder in ``setup``."""

    def build(self):
        self.encoder = None
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def setup(self, stage):
        if self.encoder is None:
            self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU())


class TwoOptimizers(MLP):
    """Manual optimization: an autoencoder and a classifier, each with an optimizer of its own."""

    def build(self):
        super().build()
        self.decoder = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        code = self.encoder(x)
        loss = F.cross_entropy(self.head(code.detach()), y)
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        loss = F.mse_loss(self.decoder(code), x)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()

    def configure_optimizers(self):
        coder = [*self.encoder.parameters(), *self.decoder.parameters()]
        return torch.optim.Adam(coder, lr=1e-2), torch.optim.SGD(self.head.parameters(), lr=1e-1)


class Graphs(Task):
    """PyG's batches instead of tensors."""

    def forward(self, batch):
        from torch_geometric.nn import global_mean_pool

        return self.head(global_mean_pool(self.net(batch.x, batch.edge_index), batch.batch))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch), batch.y)
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch), batch.y), batch_size=batch.num_graphs)

    def predict_step(self, batch, batch_idx):
        return self(batch)

    @staticmethod
    def data():
        from torch_geometric.data import Data
        from torch_geometric.loader import DataLoader

        generator = torch.Generator().manual_seed(1)
        graphs = [
            Data(
                x=torch.randn(5, 6, generator=generator),
                edge_index=torch.randint(5, (2, 9), generator=generator),
                y=torch.tensor([i % 3]),
            )
            for i in range(12)
        ]
        return DataLoader(graphs, batch_size=4)


class GCN(Graphs):
    def build(self):
        from torch_geometric.nn import GCN as Net

        self.net = Net(6, 8, num_layers=3, out_channels=8)
        self.head = nn.Linear(8, 3)


class GIN(Graphs):
    def build(self):
        from torch_geometric.nn import GIN as Net

        self.net = Net(6, 8, num_layers=3, out_channels=8)
        self.head = nn.Linear(8, 3)


class PointNet(Graphs):
    """The network of PyG's tutorial, on a given graph."""

    def build(self):
        from torch_geometric.nn import PointNetConv

        self.conv1 = PointNetConv(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)))
        self.conv2 = PointNetConv(nn.Sequential(nn.Linear(11, 8), nn.ReLU(), nn.Linear(8, 8)))
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, batch):
        from torch_geometric.nn import global_max_pool

        pos = batch.x[:, :3]
        h = self.relu(self.conv1(x=pos, pos=pos, edge_index=batch.edge_index))
        h = self.relu(self.conv2(x=h, pos=pos, edge_index=batch.edge_index))
        return self.head(global_max_pool(h, batch.batch))


def trainer(folder, epochs=2, callbacks=(), **options):
    """Return a Trainer that prints nothing and writes only to a folder."""
    options = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


class Manual:
    """Manual optimization, to be mixed into a model with one optimizer."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


def fit(folder, model, *callbacks, epochs=1, **options):
    """Train a model on small random data, and return its Trainer."""
    made = trainer(folder, epochs, callbacks, **options)
    made.fit(model, MLP.data())
    return made
