"""Measure how much of EM's conditioning a layer keeps below a head and below other layers.

    em-lightning run benchmarks/composition.py --config sweep --data.root PATH/TO/mnist
    em-lightning run benchmarks/composition.py --config curve

The variants reproduce Oursland's study of supervised implicit EM (experiment 4) and answer its open questions: adam,
curve, depth, findings, heads, healthy_depth, mnist1d (needs the package mnist1d), supervised, sweep and width. A run
trains all arms and learning rates at once. The same command continues an interrupted table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from em_lightning.cli import Recipe
from em_lightning.competition import softmin
from em_lightning.data import TensorDataModule, Tensors
from em_lightning.scope import curvature
from em_lightning.studies import Findings, Report, StackedNetworks

RECORDS = 20  # gradients are averaged over the first and over the last 20 measurements
NEAR_BOUND = 0.499  # a curvature above this counts as saturated at 1/2
PROBE_BATCH_SIZE = 256
MAX_SCORED = 10_000  # items


class StudyReport(Report):
    """Report accuracy, linear probes, gradients, curvature and convergence of each run of :class:`StackedNetworks`.

    Args:
        every: epochs between two measurements of free energy and curvature.
        items: number of training items whose curvature is measured.
        split: the items that are scored: "test", or "val" to choose settings.
        probe_rate, probe_epochs: learning rate and epochs of the probes (Adam, scored at the last iterate).
        task_curvature: whether to compute the exact Hessian of the cross-entropy with respect to the energies.
    """

    figures = False  # the history has a list per epoch; benchmarks/draw_composition.py draws it

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
        self.gradients: list[Any] = []  # (2, L, R) per measurement

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the gradients."""
        return {**super().state_dict(), "gradients": self.gradients}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history and the gradients."""
        super().load_state_dict(state_dict)
        self.gradients = state_dict["gradients"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the gradients that the module measured in this step."""
        if pl_module.gradients is not None:
            self.gradients.append(pl_module.gradients.tolist())

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the mean free energy of the scored items, and the mean curvature of training items."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == trainer.max_epochs:
            energies, _ = pl_module(self._scored(trainer.datamodule).x.to(pl_module.device))
            free = [softmin(d).free_energy.mean(1).tolist() for d in energies]
            measured = pl_module(trainer.datamodule.whole("train").x[: self.items].to(pl_module.device))[0]
            curvatures = [curvature(softmin(d).responsibilities).mean(1).tolist() for d in measured]
            self.history.append({"epoch": epoch, "free_energy": free, "curvature": curvatures})

    def _scored(self, data: Any) -> Tensors:
        return Tensors(*(part[:MAX_SCORED] for part in data.whole(self.split)))

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        """Score the probes and summarize the measurements."""
        data = trainer.datamodule
        train, scored = data.whole("train"), self._scored(data)
        parts = [module(part.to(module.device))[0] for part in train.x.split(MAX_SCORED)]
        features = [torch.cat(layer, 1).cpu() for layer in zip(*parts, strict=True)]
        scored_features, logits = module(scored.x.to(module.device))
        gradients = torch.tensor(self.gradients)
        columns: dict[str, Any] = {"accuracy %": 100 * (logits.cpu().argmax(-1) == scored.y).float().mean(1)}
        for i, d in enumerate(features):
            other = scored_features[i].cpu()
            raw, standardized = probes(d, train.y, other, scored.y, self.probe_epochs, self.probe_rate)
            free = zip(*(row["free_energy"][i] for row in self.history), strict=True)
            of_layer = {
                "probe %": 100 * raw,
                "standardized %": 100 * standardized,
                **layer_values(d[:, : self.items]),
                "dead_units": (other.var(1) < 0.01).sum(1).float(),
                "variance": other.var(1).mean(1),
                "ratio early": gradients[:RECORDS, 0, i].mean(0),
                "ratio late": gradients[-RECORDS:, 0, i].mean(0),
                "cosine": gradients[:, 1, i].mean(0),
                "convergence": torch.tensor([self.history[converged(series)]["epoch"] for series in free]),
            }
            prefix = f"layer {i + 1} " if len(features) > 1 else ""
            columns.update({prefix + name: values for name, values in of_layer.items()})
        if self.task_curvature:
            norms = task_curvature(module, features[-1][:, : self.items].to(module.device), train.y[: self.items])
            columns["task_curvature"] = torch.tensor(norms)
        rows = [
            {"run": run, **{name: float(values[r]) for name, values in columns.items()}}
            for r, run in enumerate(module.runs)
        ]
        values = {f"{row['run']}: {name}": row[name] for row in rows for name in columns}
        notes = [
            f"Data: {data.describe()}. Seed {data.seed}, {trainer.current_epoch} epochs, {len(rows)} runs at once."
        ]
        best = max(rows, key=lambda row: row["accuracy %"])
        verdict = f"Best accuracy: {best['accuracy %']:.2f} % ({best['run']})."
        facts = {"values": values, "history": self.history, "gradients": self.gradients}
        return Findings("Composition", notes, rows, verdict, facts=facts)


def layer_values(energies: Tensor) -> dict[str, Tensor]:
    """Return, per run, the curvature of energies (R, N, K), and how much of it is due to ties for the lowest energy."""
    value = curvature(softmin(energies).responsibilities)
    tied = (energies == energies.amin(-1, keepdim=True)).sum(-1)
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


@torch.enable_grad()
def probes(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, epochs: int, rate: float
) -> tuple[Tensor, Tensor]:
    """Return test accuracies (R,) of linear classifiers of raw and of standardized features (R, N, K)."""
    std, mean = torch.std_mean(features, 1, keepdim=True)
    std = torch.where(std > 0, std, 1.0)
    x, test_x = (torch.cat([part, (part - mean) / std]) for part in (features, test_features))
    x = x.movedim(1, 0).contiguous()  # (N, 2 R, K), because batches are rows
    torch.manual_seed(0)
    layer = nn.Linear(x.shape[-1], int(labels.max()) + 1)
    weight = layer.weight.detach().expand(x.shape[1], -1, -1).clone().requires_grad_()
    bias = layer.bias.detach().expand(x.shape[1], 1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=rate, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(PROBE_BATCH_SIZE):
            logits = torch.baddbmm(bias, x[rows].movedim(1, 0), weight.mT)
            targets = labels[rows].expand(len(logits), -1).flatten()
            loss = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = torch.baddbmm(bias, test_x, weight.mT).argmax(-1) == test_labels
    raw, standardized = right.float().mean(1).chunk(2)
    return raw, standardized


def task_curvature(module: StackedNetworks, energies: Tensor, labels: Tensor) -> list[float]:
    """Return, per run, the largest spectral norm of an item's Hessian of the cross-entropy by its energies (R, N, K).

    Items do not interact (except through the norm "batch", which is ignored), so this is the norm for all items.
    """
    norms = []
    for run in range(len(energies)):

        def loss(d: Tensor, label: Tensor, run: int = run) -> Tensor:
            h = module.pass_on(d.expand(len(energies), 1, -1))
            return functional.cross_entropy(module.logits(h)[run, 0], label)

        hessians = torch.vmap(torch.func.hessian(loss), chunk_size=64)(energies[run], labels)
        norms.append(float(torch.linalg.eigvalsh(hessians.detach()).abs().amax()))
    return norms


recipe = Recipe(
    __file__,
    model=StackedNetworks,
    data=TensorDataModule,
    report=StudyReport,
    data_to_model=["num_features", "num_classes"],
    threads=1,  # more threads are slower for networks of this size
)

if __name__ == "__main__":
    recipe.main()
