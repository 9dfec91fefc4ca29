"""Measure how much of EM's conditioning a layer keeps below a head and below other layers.

    em-lightning run benchmarks/composition.py --config sweep --data.root PATH/TO/mnist
    em-lightning run benchmarks/composition.py --config curve

The configs reproduce Oursland's study of supervised implicit EM (experiment 4) and answer its open questions: adam,
curve, depth, findings, heads, healthy_depth, mnist1d (needs the package mnist1d), supervised, sweep and width. A run
trains all arms and learning rates at once. The same command continues an interrupted table.

A column of a table is named ``arm, learning rate: quantity``. "probe %" and "standardized %" are the accuracies of a
linear classifier of a layer's features, raw or standardized; "accuracy %" is that of the network. "ratio early" and
"ratio late" are the norm of the gradient of the cross-entropy over that of the weighted EM loss, means of the first and
of the last 20 measurements. "task_curvature" is the largest spectral norm of an item's Hessian of the cross-entropy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from em_lightning.checks import check_at_least, check_choice, check_positive
from em_lightning.cli import Recipe
from em_lightning.competition import softmin
from em_lightning.data import TensorDataModule, Tensors
from em_lightning.losses import EMLoss
from em_lightning.modules import EMModule
from em_lightning.scope import curvature
from em_lightning.studies import Findings, Report

RECORDS = 20  # gradients are averaged over the first and over the last 20 measurements
NEAR_BOUND = 0.499  # a curvature above this (chosen) counts as saturated at 1/2
PROBE_BATCH_SIZE = 256
MAX_ITEMS = 10_000  # that are scored, and that one forward pass of the report takes
DEAD_VARIANCE = 0.01  # units with a smaller variance are dead, as in em_lightning.metrics.DeadUnits
KERNELS = {"relu": torch.relu, "softplus": functional.softplus}


@dataclasses.dataclass
class Arm:
    """How networks are trained.

    ``weight`` is that of the EM losses. ``stop`` stops gradients behind each layer. ``greedy`` trains layer l only in
    the l-th of equal parts of the epochs. ``activation`` passes on d + logsumexp(-d) instead of the energies d.
    """

    weight: float = 1.0
    stop: bool = False
    greedy: bool = False
    activation: bool = True


class StackedNetworks(EMModule):
    r"""R networks of L energy layers, one per learning rate and arm, trained at once on the same batches.

    Layer l computes :math:`d_l = \phi(W_l h_{l-1} + b_l)`, :math:`y_l = d_l + \log \sum_j e^{-d_{lj}}` and
    :math:`h_l = \mathrm{norm}(y_l)` from the items :math:`h_0`. The logits are :math:`\mathrm{LayerNorm}(V h_L + c)`.
    The loss of a run is the cross-entropy CE plus :math:`w \sum_l L_\mathrm{EM}(d_l)` with the weight w of its arm.
    Runs have equal initial weights and batches, so their differences are paired. Run r has learning rate
    ``rates[r // len(arms)]`` and arm ``r % len(arms)``.

    Args:
        arms: the arms by name, each an :class:`Arm` or a mapping of its fields.
        rates: learning rates.
        num_features, num_components, num_classes, num_layers: D, K, C and L.
        kernel: phi, "relu" or "softplus".
        norm: "none", "layer" (over the units of an item) or "batch" (over the items that are passed together, also in
            evaluation).
        head: "linear", or "row_stochastic" for V = softmax(free parameters) and c = 0.
        head_norm: whether the logits pass a LayerNorm.
        variance: the term against dead units, "variance" or "bounded_variance".
        optimizer: as in :class:`~em_lightning.modules.EMModule`.
        every: training steps between two measurements of ``gradients``.

    Attributes:
        gradients: norm of the gradient of CE with respect to d_l over that of w L_EM, and their cosine: (2, L, R);
            ``None`` if the last step was not measured.

    Example:
        >>> networks = StackedNetworks({"joint": {"weight": 0.1}, "stop": {"stop": True}}, rates=[0.1, 0.01])
        >>> energies, logits = networks(torch.rand(5, 1, 28, 28))
        >>> energies[0].shape, logits.shape  # (R, N, K) and (R, N, C)
        (torch.Size([4, 5, 25]), torch.Size([4, 5, 10]))

    Source: Oursland, 2026, github.com/alanoursland/implicit_em_in_neural_activations (supervised_study),
    experiment 4.
    """

    weight: Tensor
    stop: Tensor
    greedy: Tensor
    activation: Tensor

    def __init__(
        self,
        arms: dict[str, Arm],
        rates: list[float],
        num_features: int = 784,
        num_components: int = 25,
        num_classes: int = 10,
        num_layers: int = 1,
        kernel: Literal["relu", "softplus"] = "relu",
        norm: Literal["none", "layer", "batch"] = "none",
        head: Literal["linear", "row_stochastic"] = "linear",
        head_norm: bool = True,
        variance: Literal["variance", "bounded_variance"] = "variance",
        optimizer: Literal["adam", "sgd"] = "sgd",
        every: int = 100,
    ) -> None:
        check_positive(**{f"rates[{i}]": rate for i, rate in enumerate(rates)})
        super().__init__(max(rates, default=1.0), optimizer=optimizer)  # an empty list is refused below
        check_at_least(1, num_features=num_features, num_components=num_components, num_layers=num_layers, every=every)
        check_at_least(1, num_arms=len(arms), num_rates=len(rates))
        check_at_least(2, num_classes=num_classes)
        check_choice("kernel", kernel, tuple(KERNELS))
        check_choice("norm", norm, ("none", "layer", "batch"))
        check_choice("head", head, ("linear", "row_stochastic"))
        self.arms = {name: arm if isinstance(arm, Arm) else Arm(**arm) for name, arm in arms.items()}
        self.rates, self.kernel, self.norm, self.every = list(rates), kernel, norm, every
        self.head, self.head_norm = head, head_norm
        for field in dataclasses.fields(Arm):
            values = [getattr(arm, field.name) for arm in self.arms.values()] * len(rates)
            self.register_buffer(field.name, torch.tensor(values)[:, None, None], persistent=False)
        widths = [num_features, *[num_components] * num_layers, num_classes]
        linears = [nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)]
        self.weights = nn.ModuleList(self._copies(linear.weight) for linear in linears)
        self.biases = nn.ModuleList(self._copies(linear.bias[None]) for linear in linears)
        self.gain = self._copies(torch.ones(1, num_classes))
        self.shift = self._copies(torch.zeros(1, num_classes))
        bounded = variance == "bounded_variance"
        self.loss = EMLoss(variance=1.0 - bounded, bounded_variance=float(bounded), reduction="mean")
        self.gradients: Tensor | None = None

    @property
    def runs(self) -> list[str]:
        """The names of the runs, such as ``"joint, 0.1"``."""
        return [f"{arm}, {rate:g}" for rate in self.rates for arm in self.arms]

    def _copies(self, tensor: Tensor) -> nn.ParameterList:
        """Return a parameter (arms, ...) per learning rate, because a group of an optimizer has one rate."""
        shape = (len(self.arms), *tensor.shape)
        return nn.ParameterList(nn.Parameter(tensor.detach().expand(shape).clone()) for _ in self.rates)

    def parameter_groups(self) -> list[dict[str, Any]]:
        lists: list[Any] = [*self.weights, *self.biases, self.gain, self.shift]
        return [{"params": [of_rates[i] for of_rates in lists], "lr": rate} for i, rate in enumerate(self.rates)]

    def pass_on(self, energies: Tensor) -> Tensor:
        """Return the input (R, N, K) of the next layer for energies (R, N, K)."""
        h = torch.where(self.activation, -functional.log_softmax(-energies, -1), energies)
        if self.norm != "none":
            variance, mean = torch.var_mean(h, -1 if self.norm == "layer" else -2, keepdim=True, unbiased=False)
            h = (h - mean) * (variance + 1e-5).rsqrt()  # 1e-5 as in nn.LayerNorm and nn.BatchNorm1d
        return torch.where(self.stop, h.detach(), h)

    def logits(self, h: Tensor) -> Tensor:
        """Return the logits (R, N, C) of the outputs h (R, N, K) of the last layer."""
        weight, bias = _stacked(self.weights[-1]), _stacked(self.biases[-1])
        if self.head == "row_stochastic":
            weight, bias = weight.softmax(-1), torch.zeros_like(bias)
        logits = torch.baddbmm(bias, h, weight.mT)
        if not self.head_norm:
            return logits
        return functional.layer_norm(logits, logits.shape[-1:]) * _stacked(self.gain) + _stacked(self.shift)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        h = x.flatten(1)
        energies: list[Tensor] = []
        for weights, biases in zip(self.weights[:-1], self.biases[:-1], strict=True):
            weight, bias = _stacked(weights), _stacked(biases)
            if energies:
                z = torch.baddbmm(bias, h, weight.mT)
            else:  # one product for all runs, which read the same items
                z = (h @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]).movedim(1, 0).contiguous() + bias
            energies.append(KERNELS[self.kernel](z))
            h = self.pass_on(energies[-1])
        return energies, self.logits(h)

    def step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        energies, logits = self(batch[0])
        labels = batch[1].expand(len(logits), -1)
        task = functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none").mean(1).sum()
        em = [(self._layer_weights(i, stage) * torch.vmap(self.loss.total)(d)).sum() for i, d in enumerate(energies)]
        self.gradients = None
        if stage == "train" and self.trainer.global_step % self.every == 0:
            self.gradients = torch.stack([_compared(task, loss, d) for loss, d in zip(em, energies, strict=True)], 1)
        terms = {"loss": task + torch.stack(em).sum(), "cross_entropy": task}
        return terms if stage == "train" else {**terms, **self._metrics(energies[-1], logits, batch[1])}

    def _metrics(self, energies: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return metrics of the last layer of each run."""
        posterior = softmin(energies)
        metrics = {
            "accuracy": (logits.argmax(-1) == labels).float().mean(1),
            "free_energy": posterior.free_energy.mean(1),
            "curvature": curvature(posterior.responsibilities).mean(1),
        }
        return {f"{run}: {name}": values[r] for r, run in enumerate(self.runs) for name, values in metrics.items()}

    def _layer_weights(self, layer: int, stage: str) -> Tensor:
        """Return the weight (R,) of the EM loss of a layer in this epoch."""
        if stage != "train" or not self.greedy.any():
            return self.weight.flatten()
        in_turn = layer == self.trainer.current_epoch * (len(self.weights) - 1) // (self.trainer.max_epochs or 1)
        return (self.weight if in_turn else self.weight * ~self.greedy).flatten()


def _stacked(parameters: Any) -> Tensor:
    """Return the parameters (arms, ...) of all learning rates as one tensor (R, ...)."""
    return torch.cat(list(parameters))


def _compared(task: Tensor, em: Tensor, energies: Tensor) -> Tensor:
    """Return the ratio of the norms of two losses' gradients by energies (R, N, K), and their cosine: (2, R)."""
    options: Any = {"retain_graph": True, "materialize_grads": True}
    of_task, of_em = (torch.autograd.grad(loss, energies, **options)[0].flatten(1) for loss in (task, em))
    return torch.stack([of_task.norm(dim=1) / of_em.norm(dim=1), functional.cosine_similarity(of_task, of_em)])


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
        return {**super().state_dict(), "gradients": self.gradients}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.gradients = state_dict["gradients"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.gradients is not None:
            self.gradients.append(pl_module.gradients.tolist())

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the mean free energy of the scored items, and the mean curvature of training items."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == trainer.max_epochs:
            energies, _ = pl_module(self._scored(trainer.datamodule).x.to(pl_module.device))
            free_energies = [softmin(d).free_energy.mean(1).tolist() for d in energies]
            train_energies, _ = pl_module(trainer.datamodule.whole("train").x[: self.items].to(pl_module.device))
            curvatures = [curvature(softmin(d).responsibilities).mean(1).tolist() for d in train_energies]
            self.history.append({"epoch": epoch, "free_energy": free_energies, "curvature": curvatures})

    def _scored(self, data: Any) -> Tensors:
        return Tensors(*(part[:MAX_ITEMS] for part in data.whole(self.split)))

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings:
        """Score the probes and summarize the measurements."""
        data = trainer.datamodule
        train, scored = data.whole("train"), self._scored(data)
        parts = [energies for energies, _ in (module(x.to(module.device)) for x in train.x.split(MAX_ITEMS))]
        features = [torch.cat(layer, 1).cpu() for layer in zip(*parts, strict=True)]
        scored_features, logits = module(scored.x.to(module.device))
        ratios, cosines = torch.tensor(self.gradients).unbind(1)  # (measurements, L, R) each
        columns: dict[str, Any] = {"accuracy %": 100 * (logits.cpu().argmax(-1) == scored.y).float().mean(1)}
        for i, d in enumerate(features):
            scored_d = scored_features[i].cpu()
            raw, standardized = probes(d, train.y, scored_d, scored.y, self.probe_epochs, self.probe_rate)
            free_energies = zip(*(row["free_energy"][i] for row in self.history), strict=True)
            of_layer = {
                "probe %": 100 * raw,
                "standardized %": 100 * standardized,
                **layer_values(d[:, : self.items]),
                "dead_units": (scored_d.var(1) < DEAD_VARIANCE).sum(1).float(),
                "variance": scored_d.var(1).mean(1),
                "ratio early": ratios[:RECORDS, i].mean(0),
                "ratio late": ratios[-RECORDS:, i].mean(0),
                "cosine": cosines[:, i].mean(0),
                "convergence": torch.tensor([self.history[converged(series)]["epoch"] for series in free_energies]),
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

    Items do not interact, so this is also the norm of the Hessian of the sum over items. This does not hold for the
    norm "batch".
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
