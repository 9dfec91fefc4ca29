"""StackedNetworks, networks of energy layers that are trained at once in several ways, and the data set MNIST-1D."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from em_lightning.checks import check_at_least, check_choice, check_positive
from em_lightning.competition import softmin
from em_lightning.data import TensorDataModule, Tensors
from em_lightning.losses import EMLoss
from em_lightning.modules import EMModule
from em_lightning.scope import curvature

KERNELS = {"relu": torch.relu, "softplus": functional.softplus}


@dataclasses.dataclass
class Arm:
    """How networks are trained: weight of the EM losses, gradients stopped behind each layer, layers one by one.

    ``greedy`` trains layer l only in the l-th of equal parts of the epochs. ``activation`` passes on the excess energy
    d + logsumexp(-d) instead of d.
    """

    weight: float = 1.0
    stop: bool = False
    greedy: bool = False
    activation: bool = True


class StackedNetworks(EMModule):
    r"""R networks of L energy layers, one per learning rate and arm, trained at once on the same batches.

    Layer l computes :math:`d_l = \phi(W_l h_{l-1} + b_l)`, :math:`y_l = d_l + \log \sum_j e^{-d_{lj}}` and
    :math:`h_l = \mathrm{norm}(y_l)`; the logits are :math:`\mathrm{LayerNorm}(V h_L + c)`. The loss of a run is
    :math:`\mathrm{CE} + w \sum_l L_\mathrm{EM}(d_l)`. Runs have equal initial weights and batches, so their differences
    are paired. Run r has learning rate ``rates[r // len(arms)]`` and arm ``r % len(arms)``.

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

    Source: Oursland, the supervised study of implicit EM, experiment 4.
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
        super().__init__(max(rates, default=1.0), optimizer=optimizer)
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
        return [{"params": [each[i] for each in lists], "lr": rate} for i, rate in enumerate(self.rates)]

    def pass_on(self, energies: Tensor) -> Tensor:
        """Return the input (R, N, K) of the next layer for energies (R, N, K)."""
        h = torch.where(self.activation, -functional.log_softmax(-energies, -1), energies)
        if self.norm != "none":
            variance, mean = torch.var_mean(h, -1 if self.norm == "layer" else -2, keepdim=True, unbiased=False)
            h = (h - mean) * (variance + 1e-5).rsqrt()
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
    return torch.cat(list(parameters))


def _compared(task: Tensor, em: Tensor, energies: Tensor) -> Tensor:
    options: Any = {"retain_graph": True, "materialize_grads": True}
    of_task, of_em = (torch.autograd.grad(loss, energies, **options)[0].flatten(1) for loss in (task, em))
    return torch.stack([of_task.norm(dim=1) / of_em.norm(dim=1), functional.cosine_similarity(of_task, of_em)])


class MNIST1D(TensorDataModule):
    """MNIST-1D: 5,000 sequences of 40 values in ten classes, generated by the package ``mnist1d``; no download.

    Source: Greydanus and Kobak, "Scaling down deep learning with MNIST-1D", 2024.
    """

    shape = (40,)
    class_names = list("0123456789")
    source = "MNIST-1D (generated)"

    def load(self, train: bool) -> Tensors:
        try:
            from mnist1d.data import get_dataset_args, make_dataset
        except ImportError as error:
            raise ImportError("MNIST1D needs the package mnist1d: pip install em-lightning[mnist1d]") from error
        data = make_dataset(get_dataset_args())
        x, y = (data["x"], data["y"]) if train else (data["x_test"], data["y_test"])
        return Tensors(torch.from_numpy(x).float(), torch.from_numpy(y).long())
