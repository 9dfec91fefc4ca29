"""Measure how much of EM's conditioning a layer keeps below a head and below other layers; default data: digits.

    em-lightning run composition
    em-lightning run composition --data MNIST --data.root PATH/TO/mnist --trainer.max_epochs=40
    em-lightning run composition --config sweep --data.root PATH/TO/mnist

A run trains all arms and learning rates at once. The variants adam, curve, depth, healthy_depth, heads and sweep
reproduce Oursland's study of supervised implicit EM (experiment 4) and answer its open questions; --data MNIST1D needs
the package mnist1d. Repeating the command resumes an interrupted table. Without --data.root MNIST is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from em_lightning.cli import Recipe
from em_lightning.competition import softmin
from em_lightning.data import TensorDataModule, Tensors
from em_lightning.plots.figures import figure_style, new_figure
from em_lightning.scope import curvature
from em_lightning.studies import Findings, Report, StackedNetworks

RECORDS = 20  # gradients are averaged over the first and the last 20 records
PROBE_BATCH_SIZE = 256
NEAR_BOUND = 0.499  # a curvature above this counts as saturated at 1/2


class StackReport(Report):
    """Report probes, gradient ratios, curvature and convergence of each run of :class:`StackedNetworks`.

    Probes are linear classifiers of frozen energies (Adam 1e-3, 15 epochs, batch 256, scored at the last iterate), on
    raw and on standardized features. The curvature is that of the free energy for the first training images.

    Args:
        every: epochs between two measurements of the free energy and the curvature.
        items: number of training images whose curvature is measured.
        split: "test", or "val" to choose settings; its first 10,000 items are scored.
        probe_rate, probe_epochs: learning rate and epochs of the probes.
        task_curvature: whether to compute the exact Hessian of the cross-entropy with respect to the energies.
    """

    def __init__(
        self,
        every: int = 1,
        items: int = 512,
        split: Literal["test", "val"] = "test",
        probe_rate: float = 1e-3,
        probe_epochs: int = 15,
        task_curvature: bool = True,
    ) -> None:
        super().__init__()
        self.every, self.items, self.split, self.task_curvature = every, items, split, task_curvature
        self.probe_rate, self.probe_epochs = probe_rate, probe_epochs
        self.gradients: list[Any] = []
        self.began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the measured gradients."""
        return {**super().state_dict(), "gradients": self.gradients}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history and the measured gradients."""
        super().load_state_dict(state_dict)
        self.gradients = state_dict["gradients"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the gradients that the module measured in this step."""
        if pl_module.gradients is not None:
            self.gradients.append(pl_module.gradients.tolist())

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the free energy of the scored items and the curvature of training items."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every and epoch != trainer.max_epochs:
            return
        energies = _in_parts(pl_module, self._scored(trainer.datamodule).x)[0]
        measured = pl_module(trainer.datamodule.whole("train").x[: self.items])[0]
        values = [curvature(softmin(d).responsibilities) for d in measured]
        self.history.append({
            "epoch": epoch,
            "lse": [softmin(d).free_energy.mean(1).tolist() for d in energies],
            "curvature": [value.mean(1).tolist() for value in values],
        })  # fmt: skip

    def _scored(self, data: Any) -> Tensors:
        return Tensors(*(part[:10_000] for part in data.whole(self.split)))

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        """Score probes, summarize the measurements and draw them."""
        seconds, data = time.perf_counter() - self.began, trainer.datamodule
        train, test = data.whole("train"), self._scored(data)
        (features, _), (test_features, logits) = _in_parts(module, train.x), _in_parts(module, test.x)
        rows: list[dict[str, Any]] = [{"run": run} for run in module.runs]

        def add(name: str, values: Any) -> None:
            for row, value in zip(rows, torch.as_tensor(values).tolist(), strict=True):
                row[name] = value

        for i, d in enumerate(features):
            prefix = f"layer {i + 1} " if len(features) > 1 else ""
            raw, standardized = probes(d, train.y, test_features[i], test.y, self.probe_epochs, self.probe_rate)
            add(f"{prefix}probe %", 100 * raw)
            add(f"{prefix}standardized %", 100 * standardized)
            for name, values in layer_values(d[:, : self.items]).items():
                add(prefix + name, values)
            add(f"{prefix}dead_units", (test_features[i].var(1) < 0.01).sum(1))
            add(f"{prefix}variance", test_features[i].var(1).mean(1))
            gradients = torch.tensor(self.gradients)[:, :, i]
            add(f"{prefix}ratio early", gradients[:RECORDS, 0].mean(0))
            add(f"{prefix}ratio late", gradients[-RECORDS:, 0].mean(0))
            add(f"{prefix}cosine", gradients[:, 1].mean(0))
            series = zip(*self._series("lse", i), strict=True)
            add(f"{prefix}convergence", [self.history[converged(values)]["epoch"] for values in series])
        if self.task_curvature:
            add("task_curvature", task_curvature(module, features[-1][:, : self.items], train.y[: self.items]))
        add("accuracy %", 100 * (logits.argmax(-1) == test.y).float().mean(1))
        values = {f"{row['run']}: {name}": value for row in rows for name, value in row.items() if name != "run"}
        notes = [
            f"Data: {data.describe()}. Seed {data.seed}, {trainer.current_epoch} epochs, {len(rows)} runs at once, "
            f"{seconds:.0f} s of training."
        ]
        facts = {"values": values, "history": self.history, "gradients": self.gradients, "seconds": seconds}
        best = max(rows, key=lambda row: row["accuracy %"])
        verdict = f"Best accuracy: {best['accuracy %']:.2f} % ({best['run']})."
        return Findings("Composition", notes, rows, verdict, {"training": self._draw(module.runs)}, facts)

    def _series(self, name: str, layer: int) -> list[list[float]]:
        return [row[name][layer] for row in self.history]

    @figure_style()
    def _draw(self, runs: list[str]) -> Figure:
        """Draw curvature and dominance of the last layer over training, a line per run."""
        figure, axes = new_figure(2, 2, width=4.0, height=3.0)
        epochs = [row["epoch"] for row in self.history]
        ratios = torch.tensor(self.gradients)[:, 0, -1]
        for i, (run, curvatures) in enumerate(zip(runs, zip(*self._series("curvature", -1), strict=True), strict=True)):
            axes[0].plot(epochs, curvatures, label=run)
            axes[1].plot(range(len(ratios)), ratios[:, i].clamp_min(1e-12))
        axes[0].set(title="mean curvature of the free energy", xlabel="epoch")
        axes[1].set(title="dominance of the task", xlabel="record", yscale="log")
        if len(runs) <= 16:
            axes[0].legend(fontsize=5)
        return figure


def _in_parts(module: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return energies and logits of many items; the norm "batch" takes its statistics from 10,000 items at a time."""
    parts = [module(part) for part in x.split(10_000)]
    layers = zip(*(energies for energies, _ in parts), strict=True)
    return [torch.cat(layer, 1) for layer in layers], torch.cat([logits for _, logits in parts], 1)


def layer_values(d: Tensor) -> dict[str, Tensor]:
    """Return, per run, the curvature of energies (R, N, K), with ties of units at the same lowest energy told apart."""
    value = curvature(softmin(d).responsibilities)
    tied = (d == d.amin(-1, keepdim=True)).sum(-1)
    saturated = value > NEAR_BOUND
    return {
        "curvature_mean": value.mean(1),
        "curvature_max": value.amax(1),
        "curvature_max_untied": torch.where(tied > 1, 0.0, value).amax(1),
        "untied": (tied == 1).float().mean(1),
        "saturated": saturated.float().mean(1),
        "two_tied": (saturated & (tied == 2)).sum(1) / saturated.sum(1).clamp_min(1),
    }


def converged(series: Sequence[float]) -> int:
    """Return the first index at which 95 % of the change from the first value to the mean of the last five is done."""
    last = series[-5:]
    final = sum(last) / len(last)
    done = [abs(value - final) <= 0.05 * abs(final - series[0]) for value in series]
    return done.index(True) if any(done) else len(series) - 1


def task_curvature(module: Any, energies: Tensor, labels: Tensor) -> list[float]:
    """Return, per run, the largest spectral norm of an item's Hessian of the cross-entropy by its energies (R, N, K).

    The items of the sum do not interact (except through the norm "batch", which is ignored here), so this is the norm
    of the Hessian for all items.
    """
    norms = []
    for run in range(len(energies)):

        def loss(d: Tensor, label: Tensor, run: int = run) -> Tensor:
            h = module.pass_on(d.expand(len(energies), 1, -1))
            return functional.cross_entropy(module.logits(h)[run, 0], label)

        hessians = torch.vmap(torch.func.hessian(loss), chunk_size=64)(energies[run], labels)
        norms.append(float(torch.linalg.eigvalsh(hessians.detach()).abs().amax()))
    return norms


@torch.enable_grad()
def probes(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, epochs: int, rate: float
) -> tuple[Tensor, Tensor]:
    """Return test accuracies (R,) of linear classifiers of raw and of standardized features (R, N, K)."""
    std, mean = torch.std_mean(features, 1, keepdim=True)
    std = torch.where(std > 0, std, 1.0)
    x, test_x = (torch.cat([part, (part - mean) / std]) for part in (features, test_features))
    x = x.movedim(1, 0).contiguous()  # (N, 2 R, K): a batch is a range of rows
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[-1], int(labels.max()) + 1)
    weight = layer.weight.detach().expand(x.shape[1], -1, -1).clone().requires_grad_()
    bias = layer.bias.detach().expand(x.shape[1], 1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=rate, fused=x.device.type == "cpu")
    for rows in _batches(len(x), PROBE_BATCH_SIZE, epochs):
        logits = torch.baddbmm(bias, x[rows].movedim(1, 0), weight.mT)
        targets = labels[rows].expand(len(logits), -1)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = torch.baddbmm(bias, test_x, weight.mT).argmax(-1) == test_labels
    raw, standardized = right.float().mean(1).chunk(2)
    return raw, standardized


def _batches(size: int, batch_size: int, epochs: int) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(size).split(batch_size)


recipe = Recipe(
    __file__,
    model=StackedNetworks,
    data=TensorDataModule,
    report=StackReport,
    data_to_model=["num_features", "num_classes"],
    threads=1,  # more threads are slower for networks of this size
)

if __name__ == "__main__":
    recipe.main()
