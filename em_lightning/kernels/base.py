"""What every kernel is: a module from items and centers to energies, with positive shape parameters."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.registry import Registry

KERNELS: Registry[Kernel] = Registry("kernel", "kernels", nn.Module)


class NoDensityError(ValueError):
    """The kernel's exp(-energy) has no finite integral; the message says why."""


class Kernel(nn.Module):
    r"""An energy :math:`d(x, \mu)` between items and centers; low energy wins.

    A subclass writes :meth:`energy` on checked floating-point tensors, declares its shape parameters with
    :meth:`add_positive`, and where exp(-d) is integrable gives :meth:`log_normalizer`. It owns no centers, so learned
    prototypes, M-step means and fixed hypotheses can all share one kernel.

    Half-precision inputs, and any input under autocast, are computed in float32 or the wider of the input dtypes;
    energies come back in the inputs' dtype, in float16 no higher than its largest finite number. An energy beyond the
    range of float32 is infinite, as is that of a kernel of the squared distance where the square is (beyond 1e19): it
    excludes its hypothesis, and no gradient is NaN.

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
            TypeError: an input is no floating-point tensor.
            ValueError: the shapes do not fit.
        """
        check_inputs(x, centers)
        dtype = torch.promote_types(x.dtype, centers.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        with _no_autocast(x.device.type):
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
            NoDensityError: the integral is infinite or depends on what the kernel does not know.
        """
        raise NoDensityError(f"{type(self).__name__} gives no log_normalizer: it claims no integrable exp(-energy)")

    def add_positive(self, name: str, value: float, learnable: bool = False) -> None:
        """Declare a shape parameter that stays positive.

        A learnable one is ``value * exp(log_<name>)`` with the parameter ``log_<name>`` of shape (1,) starting at zero,
        so the value is exact at the start and weight decay pulls toward it. A fixed one is a number: exact in every
        dtype, on every device. Both are part of the ``state_dict``.

        Raises:
            TypeError: the value is no number.
            ValueError: the value is not positive and finite.
        """
        self._initial[name] = positive_number(name, value)
        if learnable:
            self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(1)))

    def positive(self, name: str, dtype: torch.dtype | None = None) -> Tensor | float:
        """Return a declared shape parameter: a number where fixed, else a tensor (1,) in ``dtype``."""
        log_ratio: Tensor | None = self._parameters.get(f"log_{name}")
        if log_ratio is None:
            return self._initial[name]
        return self._initial[name] * log_ratio.to(dtype or log_ratio.dtype).exp()

    def positive_tensor(self, name: str) -> Tensor:
        """Return a declared shape parameter as a tensor: (1,) where learnable, else () in float64.

        A tensor without dimensions never promotes the dtype of what it meets, and may meet tensors on any device.
        """
        value = self.positive(name)
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)

    def get_extra_state(self) -> Tensor:
        """Return the declared values for the ``state_dict``: one row each, that sums to it in float64."""
        # Not a float64 tensor, which some devices cannot load, nor a number, which tensor-only formats cannot save.
        rest = torch.tensor(list(self._initial.values()), dtype=torch.float64)
        parts = []
        for _ in range(3):
            parts.append(rest.float())
            rest = rest - parts[-1]
        return torch.stack(parts, dim=-1)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the declared values from a ``state_dict``."""
        if len(state) != len(self._initial):
            raise ValueError(
                f"the state has {len(state)} shape parameters and {type(self).__name__} has {len(self._initial)} "
                f"({', '.join(self._initial)}); build the kernel that was saved"
            )
        self._initial = dict(zip(self._initial, state.cpu().double().sum(-1).tolist(), strict=True))

    def extra_repr(self) -> str:
        """Show each shape parameter, and whether it is learned."""
        with torch.no_grad():
            return ", ".join(
                f"{name}={float(self.positive(name)):g}" + (" (learnable)" if f"log_{name}" in self._parameters else "")
                for name in self._initial
            )


def positive_number(name: str, value: Any) -> float:
    """Return ``value`` as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} is no number; give a positive one such as 1.0") from None
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}={value!r} must be positive and finite, such as 1.0")
    return number


def check_inputs(x: Tensor, centers: Tensor) -> None:
    """Raise TypeError or ValueError unless x (..., N, D) and centers (..., K, D) fit."""
    for name, value in (("x", x), ("centers", centers)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, not {found}; convert it with .float()")
        if value.dim() < 2:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it needs at least two dimensions, (..., "
                f"{'N' if name == 'x' else 'K'}, D): for items of one feature add a last axis with .unsqueeze(-1)"
            )
    if x.shape[-1] != centers.shape[-1]:
        raise ValueError(
            f"x {tuple(x.shape)} has {x.shape[-1]} features and centers {tuple(centers.shape)} {centers.shape[-1]}; "
            f"their last axes must be equal"
        )
    for size, other in zip(reversed(x.shape[:-2]), reversed(centers.shape[:-2]), strict=False):
        if size != other and size != 1 and other != 1:
            raise ValueError(
                f"the leading dimensions of x {tuple(x.shape)} and centers {tuple(centers.shape)} do not broadcast; "
                f"make them equal or 1"
            )


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device_type)  # not on "meta", where shapes are worked out
    return torch.autocast(device_type, enabled=False) if available else nullcontext()
