"""Cost of PosteriorMonitor in a transformer, a ResNet and a graph network, and the values that it logs there.

`python -m benchmarks.foreign_models` trains each model on the digits with and without the callback.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import GCN

from em_lightning import EMLoss
from em_lightning.callbacks import PosteriorMonitor
from em_lightning.data import Digits
from em_lightning.studies import markdown_table

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}

EVERY = 50  # steps between two measurements of the monitor


class Classifier(lightning.LightningModule):
    """Trains any network with cross-entropy; a batch is (inputs, labels)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return functional.cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Transformer(nn.Module):
    """Two encoder layers over the rows of a digit, of eight pixels each, or over its pixels."""

    def __init__(self, tokens: int = 8, width: int = 64) -> None:
        super().__init__()
        self.tokens = tokens
        self.embed = nn.Linear(64 // tokens, width)
        self.position = nn.Parameter(0.1 * torch.randn(tokens, width))
        layers = [
            nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        h = self.embed(images.reshape(len(images), self.tokens, -1)) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.relu = nn.ReLU()

    def forward(self, h: Tensor) -> Tensor:
        return self.relu(h + self.body(h))


def resnet(width: int = 32) -> nn.Module:
    """Three residual blocks on 8 x 8 images."""
    blocks = [Block(width) for _ in range(3)]
    stem = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class GraphNetwork(nn.Module):
    """A GCN of three layers over the graph of the ten nearest neighbours of each digit."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        graph = kneighbors_graph(x.flatten(1).numpy(), 10).tocoo()
        self.register_buffer("edges", torch.stack([torch.from_numpy(a).long() for a in (graph.row, graph.col)]))
        self.network = GCN(in_channels=64, hidden_channels=64, num_layers=3, out_channels=10, act=nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.flatten(1), self.edges)


class Values(Callback):
    """Keeps the last values that the monitor logged."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the logged values."""
        # The monitor measures in steps 0, EVERY, ...; global_step already counts the step that ends here.
        if trainer.global_step % EVERY == 1:
            found = trainer.callback_metrics.items()
            self.values.update({name: float(value) for name, value in found if name.startswith("em/")})


def fit(kind: str, steps: int, *, monitored: bool) -> tuple[float, dict[str, float]]:
    """Train a model; return processor seconds and the logged values."""
    torch.manual_seed(0)
    data = Digits().whole("train")
    model = {
        "transformer, 8 tokens": Transformer,
        "transformer, 64 tokens": lambda: Transformer(tokens=64),
        "ResNet": resnet,
        "GCN": lambda: GraphNetwork(data.x),
    }[kind]()
    if kind == "GCN":  # each batch is the whole graph, in order
        order, batch_size = torch.arange(len(data.x)).repeat(steps), len(data.x)
    else:
        batch_size = 64
        epochs = steps * batch_size // len(data.x) + 1
        order = torch.cat([torch.randperm(len(data.x)) for _ in range(epochs)])[: steps * batch_size]
    batches = [(data.x[rows], data.y[rows]) for rows in order.split(batch_size)]
    where = {"ResNet": nn.ReLU, "GCN": "network.network.convs.[01]"}.get(kind, "network.layers.*.linear1")
    values = Values()
    monitor = PosteriorMonitor(where, every_n_steps=EVERY, loss=EMLoss(reduction="mean"), verbose=False)
    callbacks = [monitor, values] if monitored else []
    trainer = lightning.Trainer(max_steps=steps, callbacks=callbacks, log_every_n_steps=EVERY, **QUIET)
    began = time.process_time()
    trainer.fit(Classifier(model), torch.utils.data.DataLoader(batches, batch_size=None))
    return time.process_time() - began, values.values


def foreign(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cost of the monitor in the models, and its last values by layer."""
    rows = []
    for kind in ("transformer, 8 tokens", "transformer, 64 tokens", "ResNet", "GCN"):
        ratios = []
        for _ in range(options.rounds):
            plain_seconds, _ = fit(kind, options.steps, monitored=False)
            seconds, values = fit(kind, options.steps, monitored=True)
            ratios.append(seconds / plain_seconds)
        ratio = statistics.median(ratios)
        layers = list(dict.fromkeys(name.split("/")[1] for name in values))
        for layer in layers:
            of_layer = {
                name: values[f"em/{layer}/{name}"] for name in ("curvature_mean", "curvature_max", "dead_units")
            }
            # Missing (NaN) for layers of which the monitor measured no gradients.
            of_gradients = {name: values.get(f"em/{layer}/{name}", float("nan")) for name in ("dominance", "cosine")}
            cost = f"{100 * (ratio - 1):+.1f} %"
            rows.append({"model": kind, "cost in processor time": cost, "layer": layer, **of_layer, **of_gradients})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(markdown_table(foreign(options)))


if __name__ == "__main__":
    main()
