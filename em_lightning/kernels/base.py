"""Base class of kernels: energies between items and centers, with positive shape parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.registry import Registry

KERNELS: Registry[Kernel] = Registry("kernel", "kernels", nn.Module)


class NoDensityError(ValueError):
    """The integral of exp(-energy) is infinite or unknown."""


class Kernel(nn.Module):
    r"""An energy :math:`d(x, \mu)` between items and centers; low energy wins.

    A subclass defines :meth:`energy`, declares its shape parameters with :meth:`add_positive`, and defines
    :meth:`log_normalizer` if exp(-d) is integrable. It owns no centers, so learned prototypes, M-step means and fixed
    hypotheses can share one kernel.

    Half-precision inputs, and any input under autocast, are computed in float32 or the wider of the input dtypes.
    Energies are returned in the inputs' dtype; float16 energies are clamped to its largest number. Energies beyond the
    range of float32 are infinite; for kernels of the squared distance this happens at distances beyond 1e19.

    Shape:
        x (..., N, D) and centers (..., K, D) give energies (..., N, K), for every kernel.

    Example:
        >>> from em_lightning.kernels import pairwise
        >>> class CubicKernel(Kernel):
        ...     '''d = sum over features of abs(x - mu)^3 / scale^3.'''
        ...
        ...     def __init__(self, scale=1.0, learnable=False):
        ...         super().__init__()
        ...         self.add_positive("scale", scale, learnable)
        ...
        ...     def energy(self, x, centers):
        ...         return ((pairwise(x, centers) / self.positive("scale", x.dtype)).abs() ** 3).sum(-1)
        >>> CubicKernel(scale=2.0)(torch.tensor([[4.0]]), torch.tensor([[0.0], [2.0]]))
        tensor([[8., 1.]])
    """

    no_density = "log_normalizer is not defined"  # the reason, in messages

    def __init__(self) -> None:
        super().__init__()
        self._initial: dict[str, float] = {}

    def forward(self, x: Tensor, centers: Tensor) -> Tensor:
        """Return the energy of every item under every center.

        Args:
            x: items (..., N, D).
            centers: centers (..., K, D); leading dimensions broadcast against those of ``x``, as in ``torch.cdist``.

        Returns:
            energies (..., N, K).

        Raises:
            TypeError: an input is not a floating-point tensor.
            ValueError: the shapes do not fit.
        """
        _check_inputs(x, centers)
        dtype = torch.promote_types(x.dtype, centers.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device)  # not on "meta"
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            energies = self.energy(x.to(wide), centers.to(wide))
        if dtype == torch.float16:
            energies = energies.clamp(max=torch.finfo(dtype).max)
        return energies.to(dtype)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        """Return energies (..., N, K) of checked inputs of one dtype, float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} must define energy(x, centers)")

    def log_normalizer(self, num_features: int) -> Tensor:
        r"""Return :math:`\log \int e^{-d(x, \mu)} dx` over items of ``num_features`` features, a tensor of shape ().

        Raises:
            NoDensityError: the integral is infinite or unknown.
        """
        raise NoDensityError(
            f"{type(self).__name__} has no density for num_features={num_features}: {self.no_density}"
        )

    def add_positive(self, name: str, value: float, learnable: bool = False) -> None:
        """Declare a shape parameter that stays positive.

        A learnable one is ``value * exp(log_<name>)`` with the parameter ``log_<name>`` of shape (1,), initially zero:
        the initial value is exact, and weight decay pulls towards it. A fixed one is a Python number. Both are part of
        the ``state_dict``.

        Raises:
            TypeError: the value is not a number.
            ValueError: the value is not positive and finite.
        """
        self._initial[name] = positive_number(name, value)
        if learnable:
            self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(1)))

    def positive(self, name: str, dtype: torch.dtype | None = None) -> Tensor | float:
        """Return a shape parameter: a number if fixed, else a tensor of shape () in ``dtype``.

        The default dtype is float64, on MPS float32. A tensor of shape () does not promote the dtype of other tensors.
        """
        log_ratio: Tensor | None = self._parameters.get(f"log_{name}")
        if log_ratio is None:
            return self._initial[name]
        dtype = dtype or (torch.float32 if log_ratio.is_mps else torch.float64)
        return self._initial[name] * log_ratio.to(dtype).exp().reshape(())

    def positive_tensor(self, name: str) -> Tensor:
        """Return a shape parameter as a tensor of shape (), in float64 (on MPS float32)."""
        value = self.positive(name)
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)

    def get_extra_state(self) -> Tensor:
        """Return the declared values for the ``state_dict``: float64, as integers, which load on every device."""
        return torch.tensor(list(self._initial.values()), dtype=torch.float64).view(torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Load the declared values from a ``state_dict``."""
        values = state.cpu().view(torch.float64).tolist()
        if len(values) != len(self._initial):
            raise ValueError(
                f"the state_dict has {len(values)} shape parameters, but {type(self).__name__} has "
                f"{len(self._initial)} ({', '.join(self._initial)})"
            )
        self._initial = dict(zip(self._initial, values, strict=True))

    def extra_repr(self) -> str:
        """Return the shape parameters, and which of them are learnable."""
        with torch.no_grad():
            return ", ".join(
                f"{name}={float(self.positive(name)):g}" + (" (learnable)" if f"log_{name}" in self._parameters else "")
                for name in self._initial
            )


def shape_parameter(name: str) -> Any:
    """Return a class attribute that reads a declared shape parameter as a tensor of shape ()."""
    return property(lambda kernel: kernel.positive_tensor(name))


def density_kernel(spec: Any) -> Kernel:
    """Build a kernel that is a density in any number of features, if it has that option.

    Kernels whose constructor has an argument ``density``, such as Student-t, get ``density=True`` unless a mapping sets
    it. Otherwise this is ``KERNELS.build(spec)``: instances are returned unchanged.

    Args:
        spec: a key, a class, a mapping or an instance.

    Example:
        >>> density_kernel("student_t"), density_kernel({"name": "student_t", "df": 3.0, "density": False})
        (StudentTKernel(df=1, scale=1, density=True), StudentTKernel(df=3, scale=1))
    """
    if isinstance(spec, (str, type, Mapping)) and "density" in inspect.signature(KERNELS.resolve(spec)[0]).parameters:
        return KERNELS.build(spec, density=True)
    return KERNELS.build(spec)


def positive_number(name: str, value: Any) -> float:
    """Return ``value`` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not positive and finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} must be a positive number") from None
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}={value!r} must be positive and finite")
    return number


def _check_inputs(x: Tensor, centers: Tensor) -> None:
    for name, value in (("x", x), ("centers", centers)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {found}")
        if value.dim() < 2:
            raise ValueError(f"{name} {tuple(value.shape)} must have at least two axes, (..., rows, features)")
    if x.shape[-1] != centers.shape[-1]:
        raise ValueError(f"x {tuple(x.shape)} and centers {tuple(centers.shape)} must have equal last axes")
    leading = zip(reversed(x.shape[:-2]), reversed(centers.shape[:-2]), strict=False)
    if any(size != other and size != 1 and other != 1 for size, other in leading):
        raise ValueError(f"leading axes of x {tuple(x.shape)} and centers {tuple(centers.shape)} do not broadcast")
