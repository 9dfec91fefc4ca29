"""Activations in which each unit has its own two hypotheses: signed and gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from em_lightning.activations.base import ACTIVATIONS, Activation, times
from em_lightning.checks import positive_number
from em_lightning.competition import Posterior, softmin
from em_lightning.distributed import accumulation_dtype
from em_lightning.kernels import KERNELS, GaussianKernel, Kernel, LaplaceKernel, StudentTKernel


@ACTIVATIONS.register("signed")
class SignedActivation(Activation):
    r"""Posterior mean of a sign: hypotheses -1 and +1 with centers -m and +m under a scalar kernel.

    y = r_+ - r_- = tanh((d(z, -m) - d(z, +m)) / 2T) with z the pre-activation, m the margin, T the temperature, and s
    the scale of the kernel. At T = 1 it is tanh(m z / s^2) for the Gaussian, tanh(clip(z, -m, m) / s) for Laplace, and
    2 m z / (df s^2 + z^2 + m^2), which tends to 0 for outliers, for Student-t. For the logistic kernel y < 0.

    Values lie in (-1, 1). Units do not compete with each other: the Jacobian is diagonal,
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
        kernel, m, t = self.kernel, self.margin, self.temperature
        if type(kernel) is GaussianKernel:
            return torch.tanh(times(z, m / (kernel.positive("scale", z.dtype) ** 2 * t)))
        if type(kernel) is LaplaceKernel:
            limit = z.new_full((), m)
            clipped = torch.minimum(torch.maximum(z, -limit), limit)  # unlike clamp, with the derivative 1/2 at a limit
            return torch.tanh(times(clipped, 1 / (kernel.positive("scale", z.dtype) * t)))
        if type(kernel) is StudentTKernel and not kernel.density and isinstance(t, float) and t == 1:
            variance = kernel.positive("df", z.dtype) * kernel.positive("scale", z.dtype) ** 2
            return 2 * m * z / (z.square() + (variance + m * m))
        # The difference of the two energies cancels far from the hypotheses.
        return self.generic(z.to(accumulation_dtype(z))).to(z.dtype)

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, {super().extra_repr()}"


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
