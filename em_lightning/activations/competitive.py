"""Activations in which the units on one axis compete with each other.

All of them take the arguments ``temperature``, ``learnable`` and ``dim`` of :class:`Activation`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from em_lightning.activations.base import ACTIVATIONS, Activation, times
from em_lightning.checks import check_at_least
from em_lightning.competition import Posterior, grouped, softmin, sparsemin
from em_lightning.kernels import unit_vectors
from em_lightning.statistics import STATISTICS


class _LogitActivation(Activation):
    """Activation whose units are hypotheses of energy -z, so the largest pre-activation wins."""

    def posterior(self, z: Tensor) -> Posterior:
        return softmin(-z, self.temperature, dim=self.dim)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        return self.combine(z, posterior.responsibilities)

    def combine(self, z: Tensor, r: Tensor) -> Tensor:
        """Return the activation as a function of z and the responsibilities r."""
        raise NotImplementedError

    def closed_form(self, z: Tensor) -> Tensor:
        return self.combine(z, self.tempered(z).softmax(self.dim))


@ACTIVATIONS.register("neg_log_softmin")
class NegLogSoftminActivation(Activation):
    """Excess energy of each unit, with energy z: y = z + T logsumexp(-z / T), which is -log r at T = 1.

    Never negative; the lowest input gives the output closest to 0, and differences between units are preserved. Units
    compete: dy_i/dz_j = [i = j] - r_j with r = softmax(-z / T).

    Example:
        >>> NegLogSoftminActivation()(torch.tensor([0.0, 0.0, 5.0]))
        tensor([0.6965, 0.6965, 5.6965])

    Source: Oursland, 2026, github.com/alanoursland/implicit_em_in_neural_activations (supervised_study).
    """

    def posterior(self, z: Tensor) -> Posterior:
        return softmin(z, self.temperature, dim=self.dim)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        return STATISTICS.build("neg_log_responsibilities")(posterior, dim=self.dim)

    def closed_form(self, z: Tensor) -> Tensor:
        return times(-functional.log_softmax(-self.tempered(z), self.dim), self.temperature)


@ACTIVATIONS.register("log_softmax")
class LogSoftmaxActivation(_LogitActivation):
    """Log-responsibility of each unit: y = log softmax(z / T).

    Never positive; the largest input gives the largest output. Units compete: dy_i/dz_j = ([i = j] - r_j) / T, r = e^y.

    Example:
        >>> LogSoftmaxActivation()(torch.tensor([0.0, 0.0]))
        tensor([-0.6931, -0.6931])
    """

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        return STATISTICS.build("log_responsibilities")(posterior, dim=self.dim)

    def closed_form(self, z: Tensor) -> Tensor:
        return functional.log_softmax(self.tempered(z), self.dim)


@ACTIVATIONS.register("softmax_gated")
class SoftmaxGatedActivation(_LogitActivation):
    """Each unit times its responsibility: y = z softmax(z / T), whose sum is the posterior mean of z.

    Units compete: dy_i/dz_j = r_i [i = j] + (z_i / T) r_i ([i = j] - r_j) with r = softmax(z / T).

    Example:
        >>> SoftmaxGatedActivation()(torch.tensor([2.0, 2.0]))
        tensor([1., 1.])
    """

    def combine(self, z: Tensor, r: Tensor) -> Tensor:
        return z * r


@ACTIVATIONS.register("relu_gated")
class ReLUGatedActivation(_LogitActivation):
    """Rectified unit times its responsibility: y = relu(z) softmax(z / T).

    The rectifier is not a statistic of the posterior: units below 0 have output 0, but still compete,
    dy_i/dz_j = [z_i > 0] r_i [i = j] + (relu(z_i) / T) r_i ([i = j] - r_j) with r = softmax(z / T).

    Example:
        >>> ReLUGatedActivation()(torch.tensor([2.0, 2.0, -50.0]))
        tensor([1., 1., 0.])
    """

    def combine(self, z: Tensor, r: Tensor) -> Tensor:
        return z.relu() * r


@ACTIVATIONS.register("residual_softmax")
class ResidualSoftmaxActivation(_LogitActivation):
    """Each unit plus its responsibility: y = z + softmax(z / T).

    Units compete: dy_i/dz_j = [i = j] + r_i ([i = j] - r_j) / T with r = softmax(z / T).

    Example:
        >>> ResidualSoftmaxActivation()(torch.tensor([2.0, 2.0]))
        tensor([2.5000, 2.5000])
    """

    def combine(self, z: Tensor, r: Tensor) -> Tensor:
        return z + r


@ACTIVATIONS.register("grouped")
class GroupedActivation(Activation):
    """Soft local winner-take-all: y = z r with r = softmax(z / T) within groups of neighbouring units.

    If the group size does not divide the number of units, the last group is smaller. Units compete within a group: the
    Jacobian is block-diagonal, with blocks dy_i/dz_j = r_i [i = j] + (z_i / T) r_i ([i = j] - r_j).

    Args:
        group_size: units per group, at least 1.
        temperature, learnable, dim: as in :class:`Activation`.

    Example:
        >>> GroupedActivation(group_size=2)(torch.tensor([2.0, 2.0, 9.0, -9.0, 3.0]))
        tensor([ 1.0000e+00,  1.0000e+00,  9.0000e+00, -1.3707e-07,  3.0000e+00])

    Source: Srivastava et al., "Compete to compute", 2013 (the hard form).
    """

    def __init__(self, group_size: int = 2, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable, dim)
        check_at_least(1, group_size=group_size)
        self.group_size = group_size

    def posterior(self, z: Tensor) -> Posterior:
        axis = self.dim % z.ndim
        # Complete the last group by units of infinite energy, which are excluded. The second argument of pad has the
        # numbers of units to add before and after, for each axis from the last to ``axis``.
        missing = -z.shape[axis] % self.group_size
        energies = functional.pad(-z, [0, 0] * (z.ndim - 1 - axis) + [0, missing], value=torch.inf)
        return grouped(energies, self.temperature, dim=axis, group_size=self.group_size)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        return z * posterior.responsibilities.narrow(self.dim, 0, z.shape[self.dim])

    def closed_form(self, z: Tensor) -> Tensor:
        if z.shape[self.dim] % self.group_size:
            return self.generic(z)
        axis = self.dim % z.ndim
        # A softmax over the first axis of a contiguous copy is faster than over a short inner axis.
        groups = self.tempered(z).unflatten(axis, (-1, self.group_size)).movedim(axis + 1, 0).contiguous()
        return z * groups.softmax(0).movedim(0, axis + 1).flatten(axis, axis + 1)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, {super().extra_repr()}"


@ACTIVATIONS.register("sparsemin")
class SparseminActivation(Activation):
    """Sparse responsibilities of units with energy z: y = relu(-z / T - tau), where tau makes their sum 1.

    The lowest inputs win; units at T or more above the lowest have output 0 and no gradient. Units compete:
    dy_i/dz_j = -([i = j] - 1 / S) / T between the S units of positive output, 0 elsewhere.

    Example:
        >>> SparseminActivation()(torch.tensor([0.0, 0.5, 2.0]))
        tensor([0.7500, 0.2500, 0.0000])

    Source: Martins and Astudillo, "From softmax to sparsemax", 2016.
    """

    def posterior(self, z: Tensor) -> Posterior:
        return sparsemin(z, self.temperature, dim=self.dim)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        return posterior.responsibilities


@ACTIVATIONS.register("direction")
class DirectionActivation(Activation):
    """Competition of the units of z / norm(z), scaled by the norm: y = norm(z) softmax(z / (T norm(z))).

    Positively homogeneous, y(c z) = c y(z) for c > 0; y(0) = 0 with gradient 0. Units compete: with u = z / norm(z) and
    r = softmax(u / T), dy_i/dz_j = r_i u_j + (1 / T) sum_k r_i ([i = k] - r_k) ([k = j] - u_k u_j).

    Example:
        >>> activation, z = DirectionActivation(), torch.tensor([3.0, 4.0])
        >>> activation(z), activation(10 * z)
        (tensor([2.2508, 2.7492]), tensor([22.5083, 27.4917]))
    """

    def posterior(self, z: Tensor) -> Posterior:
        return softmin(-unit_vectors(z, self.dim), self.temperature, dim=self.dim)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        norm = -(z * posterior.energies).sum(self.dim, keepdim=True)  # z . z / norm(z)
        return norm * posterior.responsibilities
