"""Activations in which each unit has its own two hypotheses: signed and gated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from em_lightning import kernels
from em_lightning.activations.base import ACTIVATIONS, Activation, times
from em_lightning.checks import positive_number
from em_lightning.competition import Posterior, softmin
from em_lightning.kernels import KERNELS, Kernel


@ACTIVATIONS.register("signed")
class SignedActivation(Activation):
    r"""Posterior mean of a sign: hypotheses -1 and +1 with centers -m and +m under a scalar kernel.

    y = r_+ - r_- = tanh((d(z, -m) - d(z, +m)) / 2T) with z the pre-activation, m the margin, T the temperature, and s
    the scale of the kernel. At T = 1 it is tanh(m z / s^2) for the Gaussian, tanh(clip(z, -m, m) / s) for Laplace, and
    2 m z / (df s^2 + z^2 + m^2), which tends to 0 for outliers, for Student-t. The logistic kernel decreases: y < 0.

    Values lie in (-1, 1). Units do not compete with each other: the Jacobian is diagonal. With d' = dd/dz,
    dy/dz = (1 - y^2) (d'(z, -m) - d'(z, +m)) / 2T, for the Gaussian (1 - y^2) m / (s^2 T).

    Args:
        kernel: key, class, mapping or instance of a kernel.
        margin: m > 0.
        temperature, learnable, dim: as in :class:`Activation`; ``dim`` has no effect.

    Example:
        >>> SignedActivation()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.7616,  0.0000,  0.7616])
    """

    competes = False

    def __init__(
        self,
        kernel: str | Kernel | type[Kernel] | Mapping[str, Any] = "gaussian",
        margin: float = 1.0,
        temperature: float = 1.0,
        learnable: bool = False,
        dim: int = -1,
    ) -> None:
        super().__init__(temperature, learnable, dim)
        self.margin = positive_number("margin", margin)
        self.kernel = KERNELS.build(kernel)

    def posterior(self, z: Tensor) -> Posterior:
        centers = z.new_tensor([[-self.margin], [self.margin]])
        energies = self.kernel(z.reshape(-1, 1), centers).reshape(*z.shape, 2)
        return softmin(energies, self.temperature)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        return posterior.mean(z.new_tensor([-1.0, 1.0]))

    def closed_form(self, z: Tensor) -> Tensor:
        closed_form = _CLOSED_FORMS.get(type(self.kernel))
        return closed_form(self.kernel, z, self.margin, self.temperature) if closed_form else self.generic(z)

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, {super().extra_repr()}"


# Closed forms of the activation for a kernel, z, margin m and temperature t. They are as accurate as z, while the
# difference of the two energies, d(z, -m) - d(z, m), cancels near 0 and far from -m and m.


def _clip(z: Tensor, m: float) -> Tensor:
    """Return (abs(z + m) - abs(z - m)) / 2: z limited to [-m, m], with the derivative 1/2 at the limits."""
    limit = z.new_full((), m)
    return torch.minimum(torch.maximum(z, -limit), limit)


def _logistic(kernel: Kernel, z: Tensor, m: float, t: float | Tensor) -> Tensor:
    slope = kernel.positive("slope", z.dtype)
    low, high = slope * (z - m), slope * (z + m)
    # On each side of 0, the form without a difference of large numbers.
    above = functional.logsigmoid(low) - functional.logsigmoid(high)
    below = functional.logsigmoid(-low) - functional.logsigmoid(-high) - 2 * slope * m
    return torch.tanh(torch.where(z > 0, above, below) / (2 * t))


def _student_t(kernel: Kernel, z: Tensor, m: float, t: float | Tensor) -> Tensor:
    df_scale2 = kernel.positive("df", z.dtype) * kernel.positive("scale", z.dtype) ** 2
    # The energies differ by exponent * log(a) with the ratio a = (df s^2 + (z + m)^2) / (df s^2 + (z - m)^2).
    if not kernel.density and isinstance(t, float) and t == 1:  # tanh(log(a) / 2) = (a - 1) / (a + 1)
        return 2 * m * z / (z.square() + (df_scale2 + m * m))
    magnitude = torch.where(z < 0, -z, z)  # not abs, whose derivative at 0 is 0
    log_ratio = torch.log1p(4 * m * magnitude / (df_scale2 + (magnitude - m).square()))
    exponent = (kernel.positive("df", z.dtype) + 1) / 2 if kernel.density else 1.0
    return torch.tanh(torch.where(z < 0, -log_ratio, log_ratio) * (exponent / (2 * t)))


def _huber(kernel: Kernel, z: Tensor, m: float, t: float | Tensor) -> Tensor:
    delta = kernel.positive("delta", z.dtype)
    # With the energy delta abs(z) - delta^2 / 2 + relu(delta - abs(z))^2 / 2, the linear parts cancel analytically.
    quadratic_part = (delta - (z + m).abs()).relu().square() - (delta - (z - m).abs()).relu().square()
    return torch.tanh((delta * _clip(z, m) + quadratic_part / 4) / t)


def _pseudo_huber(kernel: Kernel, z: Tensor, m: float, t: float | Tensor) -> Tensor:
    delta = kernel.positive("delta", z.dtype)
    one = torch.ones_like(z)  # without cancellation: the difference of two roots is that of the squares over the sum
    sum_of_roots = torch.hypot((z + m) / delta, one) + torch.hypot((z - m) / delta, one)
    return torch.tanh(2 * m * (z / sum_of_roots) / t)


def _exponential(kernel: Kernel, z: Tensor, m: float, t: float | Tensor) -> Tensor:
    rate = kernel.positive("rate", z.dtype)
    # The energies differ by 2 exp(a) sinh(b) with a = rate max(|z|, m) and b = rate clip(z, -m, m), or by 2 exp(40) b
    # where the kernel is linear. Limits of 40 give the same tanh: for small b, sinh(b) is b; for larger b, tanh is 1.
    exp_a = (rate * torch.maximum(z.abs(), z.new_full((), m))).clamp(max=40.0).exp()
    return torch.tanh(exp_a * (rate * _clip(z, m)).clamp(-40.0, 40.0).sinh() / t)


_CLOSED_FORMS: dict[type[Kernel], Callable[..., Tensor]] = {  # of kernel, z, m and t; times() keeps the dtype of z
    kernels.GaussianKernel: lambda k, z, m, t: torch.tanh(times(z, m / (k.positive("scale", z.dtype) ** 2 * t))),
    kernels.DotProductKernel: lambda k, z, m, t: torch.tanh(times(z, k.positive("scale", z.dtype) * m / t)),
    kernels.LaplaceKernel: lambda k, z, m, t: torch.tanh(times(_clip(z, m), 1 / (k.positive("scale", z.dtype) * t))),
    kernels.LogisticKernel: _logistic,
    kernels.StudentTKernel: _student_t,
    kernels.HuberKernel: _huber,
    kernels.PseudoHuberKernel: _pseudo_huber,
    kernels.ExponentialKernel: _exponential,
}


@ACTIVATIONS.register("gated")
class GatedActivation(Activation):
    """Posterior mean over {on, off}, where on has energy -z and value z, and off has energy 0 and value 0.

    y = z sigmoid(z / T), which is SiLU at T = 1 and ReLU in the limit T -> 0. Minus the free energy is
    T softplus(z / T). Units do not compete with each other: the Jacobian is diagonal, dy/dz = r + (z / T) r (1 - r)
    with r = sigmoid(z / T). Arguments as in :class:`Activation`; ``dim`` has no effect.

    Example:
        >>> GatedActivation()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.2689,  0.0000,  0.7311])

    Source: Elfwing, Uchibe and Doya, "Sigmoid-weighted linear units", 2018.
    """

    competes = False

    def posterior(self, z: Tensor) -> Posterior:
        return softmin(torch.stack([-z, torch.zeros_like(z)], -1), self.temperature)

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        return z * posterior.responsibilities[..., 0]  # the value of off is 0

    def closed_form(self, z: Tensor) -> Tensor:
        scaled = self.tempered(z)  # z itself if T is fixed at 1
        return functional.silu(z) if scaled is z else z * scaled.sigmoid()
