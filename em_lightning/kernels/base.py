"""Base classes of kernels (energies between items and centers) and of kernels that define an elliptical density."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.checks import positive_number
from em_lightning.registry import Registry

KERNELS: Registry[Kernel] = Registry("kernel", "kernels", nn.Module)


class NoDensityError(ValueError):
    """The integral of exp(-energy) is infinite or unknown."""


class Kernel(nn.Module):
    r"""An energy :math:`d(x, \mu)` between items and centers; low energy wins.

    A subclass defines :meth:`energy`, passes its positive shape parameters to this constructor, and defines
    :meth:`log_normalizer` if exp(-d) is integrable. Centers are an argument of each call.

    Energies are computed in float32 or float64, under autocast as well, and returned in the inputs' dtype. In float16,
    energies above its largest number, 65504, are returned as 65504.

    Args:
        learnable: make the shape parameters learnable. Each is then ``value * exp(log_<name>)`` with a parameter
            ``log_<name>`` of shape (1,). It starts at zero, so that the initial value is exact and weight decay pulls
            towards it. Otherwise they are Python numbers. The ``state_dict`` contains them in both cases.
        **shape: positive initial value of each shape parameter; ``kernel.<name>`` is its current value, of shape ().

    Shape:
        x (..., N, D) and centers (..., K, D) give energies (..., N, K); :class:`LearnedEnergyKernel` has no centers.

    Example:
        >>> from em_lightning.kernels import pairwise
        >>> class CubicKernel(Kernel):
        ...     def __init__(self, scale=1.0, learnable=False):
        ...         super().__init__(learnable, scale=scale)
        ...
        ...     def energy(self, x, centers):
        ...         return ((pairwise(x, centers) / self.positive("scale", x.dtype)).abs() ** 3).sum(-1)
        >>> CubicKernel(scale=2.0)(torch.tensor([[4.0]]), torch.tensor([[0.0], [2.0]]))
        tensor([[8., 1.]])
    """

    no_density = "log_normalizer is not defined"  # the reason that a NoDensityError gives

    def __init__(self, learnable: bool = False, **shape: float) -> None:
        super().__init__()
        self._learnable = learnable
        self._initial = {name: positive_number(name, value) for name, value in shape.items()}
        for name in shape if learnable else ():
            self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(1)))

    def forward(self, x: Tensor, centers: Tensor) -> Tensor:
        """Return energies (..., N, K) of items (..., N, D) and centers (..., K, D); leading axes broadcast.

        Raises:
            TypeError: an input is not a floating-point tensor.
            ValueError: the shapes do not fit.
        """
        for name, value in (("x", x), ("centers", centers)):
            if not value.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
            if value.dim() < 2:
                raise ValueError(f"{name} {tuple(value.shape)} must have at least two axes, (..., rows, features)")
        if x.shape[-1] != centers.shape[-1]:
            raise ValueError(f"x {tuple(x.shape)} and centers {tuple(centers.shape)} must have equal last axes")
        dtype = torch.promote_types(x.dtype, centers.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        # torch.autocast raises on the device "meta"; PyTorch 2.6 cannot compile is_autocast_available.
        has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if has_autocast else nullcontext():
            energies = self.energy(x.to(wide), centers.to(wide))
        if dtype == torch.float16:
            energies = energies.clamp(max=torch.finfo(dtype).max)
        return energies.to(dtype)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        """Return energies (..., N, K) of checked inputs of one dtype, float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} must define energy(x, centers)")

    def log_normalizer(self, num_features: int) -> Tensor:
        r"""Return the scalar :math:`\log \int e^{-d(x, \mu)} dx`; NoDensityError if it is infinite or unknown."""
        raise NoDensityError(f"{type(self).__name__} has no density (num_features={num_features}): {self.no_density}")

    def positive(self, name: str, dtype: torch.dtype | None = None) -> Tensor | float:
        """Return a shape parameter: a number if fixed, else a tensor () in ``dtype``, float64 by default."""
        if not self._learnable:
            return self._initial[name]
        log_ratio: Tensor = getattr(self, f"log_{name}")
        dtype = dtype or (torch.float32 if log_ratio.is_mps else torch.float64)  # MPS devices have no float64
        return self._initial[name] * log_ratio.to(dtype).exp().reshape(())

    def __getattr__(self, name: str) -> Any:
        """Return a shape parameter, such as ``kernel.scale``, as a tensor of shape (), or another attribute."""
        if name not in self.__dict__.get("_initial", ()):
            return super().__getattr__(name)
        value = self.positive(name)
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)

    def get_extra_state(self) -> Tensor:
        # As integers, so that a conversion of the floating-point entries of a state_dict does not round them.
        return torch.tensor(list(self._initial.values()), dtype=torch.float64).view(torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        values, names = state.cpu().view(torch.float64).tolist(), list(self._initial)
        if len(values) != len(names):
            raise ValueError(f"the state_dict has {len(values)} shape parameters, {type(self).__name__} has {names}")
        self._initial = dict(zip(names, values, strict=True))

    def extra_repr(self) -> str:
        learnable = " (learnable)" if self._learnable else ""
        return ", ".join(f"{name}={getattr(self, name).item():g}{learnable}" for name in self._initial)


class EllipticalKernel(Kernel):
    r"""A kernel that can be a mixture component with an estimated covariance.

    With the squared Mahalanobis distance :math:`y = (x - \mu)^\top \Sigma^{-1} (x - \mu)` the component is

    .. math:: p(x) = \frac{e^{-\rho(y)}}{Z_D \, |\Sigma|^{1/2}}, \qquad Z_D = \int_{\mathbb{R}^D} e^{-\rho(|x|^2)} dx

    The M-step is iteratively reweighted least squares (IRLS): each point has the weight :math:`u(y) = 2 \rho'(y)`. It
    never decreases the likelihood where :math:`\rho` is concave (majorize-minimize).

    For Laplace, Huber and pseudo-Huber, :math:`\rho` is the energy of one feature at squared difference :math:`y`; for
    Gaussian and Student-t, that of all D features, a function of :math:`y`. A ``scale`` :math:`s` divides the distance,
    :math:`\rho(y / s^2)`, and only changes the unit of an estimated :math:`\Sigma`; the Gaussian ignores it. Below the
    distance 1e-4 s the Laplace energy is a parabola, because its IRLS weight would tend to infinity there.

    Source: Kent and Tyler, "Redescending M-estimates of multivariate location and scatter", Annals of Statistics 19
    (1991); Laplace (exponential power): Gómez, Gómez-Villegas and Marín, Communications in Statistics 27 (1998).
    """

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:
        """Return the energy as a function of the squared Mahalanobis distance, of the same shape and dtype."""
        raise NotImplementedError

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:
        """Return the IRLS weight, twice the derivative of rho, with finite derivatives also at distance 0."""
        raise NotImplementedError

    def log_normalizer(self, num_features: int) -> Tensor:
        return num_features * self.elliptical_log_normalizer(1)  # if the energy is a sum over features; others override

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:
        """Return the log of the integral of exp(-rho(|x|^2)) over R^D, or raise NoDensityError if it is infinite."""
        raise NotImplementedError


def density_kernel(spec: Any) -> Kernel:
    """Return ``KERNELS.build(spec)``, with the default ``density=True`` if the kernel's class has this argument."""
    if isinstance(spec, (str, type, Mapping)) and "density" in inspect.signature(KERNELS.resolve(spec)[0]).parameters:
        return KERNELS.build(spec, density=True)
    return KERNELS.build(spec)
