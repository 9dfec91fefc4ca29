"""Activations in which the units on one axis compete with each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from em_lightning.activations.base import ACTIVATIONS, Activation
from em_lightning.activations.fused import BLOCK, NegLogSoftmin, SoftmaxGate, in_blocks
from em_lightning.competition import Posterior, grouped, softmin, sparsemin
from em_lightning.statistics import STATISTICS


class _LogitActivation(Activation):
    """The units are hypotheses of energy -z: the highest pre-activation wins."""

    def posterior(self, z: Tensor) -> Posterior:
        """Return the softmin posterior over the units, of energy -z."""
        return softmin(-z, self.temperature, dim=self.dim)

    def softmax(self, z: Tensor) -> Tensor:
        """Return the responsibilities of the units."""
        return self.divided(z).softmax(self.dim)


@ACTIVATIONS.register("neg_log_softmin")
class NegLogSoftminActivation(Activation):
    """Excess energy of each unit, its input read as an energy: y = z + T logsumexp(-z / T), -log r at T = 1.

    Positive; the lowest input wins and comes out near 0, and differences between units are kept. Units compete:
    dy_i/dz_j = [i = j] - r_j with r = softmin(z), so a gradient is centred by the responsibilities.

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units that compete.

    Example:
        >>> NegLogSoftminActivation()(torch.tensor([0.0, 0.0, 5.0]))
        tensor([0.6965, 0.6965, 5.6965])

    Source: Oursland, the supervised study of implicit EM (neg-log-softmin).
    """

    def posterior(self, z: Tensor) -> Posterior:
        """Return the softmin posterior over the units, of energy z."""
        return softmin(z, self.temperature, dim=self.dim)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return d - F."""
        return STATISTICS.build("neg_log_responsibilities")(posterior, dim=self.dim)

    def closed_form(self, z: Tensor) -> Tensor:
        """Return -T log_softmax(-z / T)."""
        divided = self.divided(z)
        if divided.numel() > BLOCK and in_blocks(divided, self.dim):
            scaled = NegLogSoftmin.apply(divided)
        else:
            scaled = -functional.log_softmax(-divided, self.dim)
        temperature = self.temperature
        return scaled if isinstance(temperature, float) and temperature == 1 else scaled * temperature


@ACTIVATIONS.register("log_softmax")
class LogSoftmaxActivation(_LogitActivation):
    """Log-responsibility of each unit: y = log softmax(z / T), the highest input wins.

    Never positive. Units compete: dy_i/dz_j = ([i = j] - r_j) / T with r = softmax(z / T).

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units that compete.

    Example:
        >>> LogSoftmaxActivation()(torch.tensor([0.0, 0.0]))
        tensor([-0.6931, -0.6931])
    """

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return log r."""
        return STATISTICS.build("log_responsibilities")(posterior, dim=self.dim)

    def closed_form(self, z: Tensor) -> Tensor:
        """Return log_softmax(z / T)."""
        return functional.log_softmax(self.divided(z), self.dim)


@ACTIVATIONS.register("softmax_gated")
class SoftmaxGatedActivation(_LogitActivation):
    """Each unit gated by its responsibility: y = z softmax(z / T), whose sum is the posterior mean of z.

    Units compete: dy_i/dz_j = r_i [i = j] + (z_i / T) r_i ([i = j] - r_j) with r = softmax(z / T).

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units that compete.

    Example:
        >>> SoftmaxGatedActivation()(torch.tensor([2.0, 2.0]))
        tensor([1., 1.])
    """

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return z r."""
        return z * posterior.responsibilities

    def closed_form(self, z: Tensor) -> Tensor:
        """Return z softmax(z / T)."""
        if self.divided(z) is z and in_blocks(z, self.dim):
            return SoftmaxGate.apply(z, False)
        return z * self.softmax(z)


@ACTIVATIONS.register("relu_gated")
class ReLUGatedActivation(_LogitActivation):
    """Rectified unit gated by its responsibility: y = relu(z) softmax(z / T).

    The soft competition is inside the scope of implicit EM, the rectifier is not: units below 0 are exactly 0, though
    they still compete and so still receive gradient through the others. Units compete:
    dy_i/dz_j = [z_i > 0] r_i [i = j] + (relu(z_i) / T) r_i ([i = j] - r_j) with r = softmax(z / T).

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units that compete.

    Example:
        >>> ReLUGatedActivation()(torch.tensor([2.0, 2.0, -50.0]))
        tensor([1., 1., 0.])
    """

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return relu(z) r."""
        return z.relu() * posterior.responsibilities

    def closed_form(self, z: Tensor) -> Tensor:
        """Return relu(z) softmax(z / T)."""
        if self.divided(z) is z and in_blocks(z, self.dim):
            return SoftmaxGate.apply(z, True)
        return z.relu() * self.softmax(z)


@ACTIVATIONS.register("residual_softmax")
class ResidualSoftmaxActivation(_LogitActivation):
    """Each unit plus its responsibility: y = z + softmax(z / T).

    The identity carries the signal and the competition adds to it. Units compete:
    dy_i/dz_j = [i = j] + r_i ([i = j] - r_j) / T with r = softmax(z / T).

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units that compete.

    Example:
        >>> ResidualSoftmaxActivation()(torch.tensor([2.0, 2.0]))
        tensor([2.5000, 2.5000])
    """

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return z + r."""
        return z + posterior.responsibilities

    def closed_form(self, z: Tensor) -> Tensor:
        """Return z + softmax(z / T)."""
        return z + self.softmax(z)


@ACTIVATIONS.register("grouped")
class GroupedActivation(Activation):
    """Soft local winner-take-all: y = z r with r = softmax(z / T) inside groups of neighbouring units.

    A last group that is not full holds the units that are left. Units compete inside a group: the Jacobian is
    block-diagonal, in each block dy_i/dz_j = r_i [i = j] + (z_i / T) r_i ([i = j] - r_j).

    Args:
        group_size: units a group.
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units that compete.

    Raises:
        ValueError: the group size is less than 1.

    Example:
        >>> GroupedActivation(group_size=2)(torch.tensor([2.0, 2.0, 9.0, -9.0, 3.0]))
        tensor([ 1.0000e+00,  1.0000e+00,  9.0000e+00, -1.3707e-07,  3.0000e+00])

    Source: Srivastava et al., "Compete to compute", 2013 (the hard form).
    """

    def __init__(self, group_size: int = 2, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable, dim)
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1")
        self.group_size = group_size

    def posterior(self, z: Tensor) -> Posterior:
        """Return the grouped posterior over the units, of energy -z, the missing ones of the last group excluded."""
        axis = self.dim % z.ndim
        missing = -z.shape[axis] % self.group_size
        padding = [0, 0] * (z.ndim - 1 - axis) + [0, missing]
        energies = functional.pad(-z, padding, value=torch.inf) if missing else -z
        return grouped(energies, self.temperature, dim=axis, group_size=self.group_size)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return z r."""
        return z * posterior.responsibilities.narrow(self.dim, 0, z.shape[self.dim])

    def closed_form(self, z: Tensor) -> Tensor:
        """Return z softmax(z / T) in each group, the groups' axis brought to the front, where softmax is fast."""
        if z.shape[self.dim] % self.group_size:
            return self.generic(z)
        axis = self.dim % z.ndim
        groups = self.divided(z).unflatten(axis, (-1, self.group_size)).movedim(axis + 1, 0).contiguous()
        return z * groups.softmax(0).movedim(0, axis + 1).flatten(axis, axis + 1)

    def extra_repr(self) -> str:
        """Return the settings that a reader needs."""
        return f"group_size={self.group_size}, {super().extra_repr()}"


@ACTIVATIONS.register("sparsemin")
class SparseminActivation(Activation):
    """Sparse responsibilities of the units, their input read as an energy: y = relu(-z / T - tau), of sum 1.

    The lowest inputs win and all but a few come out as exactly 0, which then receive no gradient. Units compete:
    dy_i/dz_j = -([i = j] - 1 / S) / T on the support of S units, 0 elsewhere.

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units that compete.

    Example:
        >>> SparseminActivation()(torch.tensor([0.0, 0.5, 2.0]))
        tensor([0.7500, 0.2500, 0.0000])

    Source: Martins and Astudillo, "From softmax to sparsemax", 2016.
    """

    def posterior(self, z: Tensor) -> Posterior:
        """Return the sparsemin posterior over the units, of energy z."""
        return sparsemin(z, self.temperature, dim=self.dim)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return r."""
        return posterior.responsibilities


@ACTIVATIONS.register("direction")
class DirectionActivation(Activation):
    """Competition between directions that keeps the length: y = norm(z) softmax(z / (T norm(z))).

    Positively homogeneous, y(c z) = c y(z) for c > 0, and y(0) = 0, where the gradient is taken as 0. Units compete:
    with u = z / norm(z) and r = softmax(u / T), dy_i/dz_j = r_i u_j + (1 / T) sum_k r_i ([i = k] - r_k)
    ([k = j] - u_k u_j).

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units that compete.

    Example:
        >>> activation, z = DirectionActivation(), torch.tensor([3.0, 4.0])
        >>> activation(z), activation(10 * z)
        (tensor([2.2508, 2.7492]), tensor([22.5083, 27.4917]))
    """

    def posterior(self, z: Tensor) -> Posterior:
        """Return the softmin posterior over the units, of energy -z / norm(z)."""
        norm = self._norm(z)
        return softmin(-z / norm.clamp_min(torch.finfo(z.dtype).tiny), self.temperature, dim=self.dim)

    def closed_form(self, z: Tensor) -> Tensor:
        """Return norm(z) softmax(z / (T norm(z)))."""
        norm = self._norm(z)
        units = z / norm.clamp_min(torch.finfo(z.dtype).tiny)
        return norm * self.divided(units).softmax(self.dim)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return norm(z) r."""
        return self._norm(z) * posterior.responsibilities

    def _norm(self, z: Tensor) -> Tensor:
        # In units of the largest, whose square may lie outside the range of the dtype.
        largest = z.detach().abs().amax(self.dim, keepdim=True)
        unit = torch.where(largest > 0, largest, 1.0)
        return unit * torch.linalg.vector_norm(z / unit, dim=self.dim, keepdim=True)
