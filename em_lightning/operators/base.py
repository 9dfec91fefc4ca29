"""The protocol that all EM operators share: forward, iterate, fit, objective."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.checks import check_at_least, check_choice, check_counts
from em_lightning.mixture import em
from em_lightning.mixture.backends.reference import has_values
from em_lightning.mixture.initialization import CENTERS
from em_lightning.mixture.points import Parameters
from em_lightning.operators import gradients


class SetOperator(nn.Module):
    """A layer that fits one mixture to each point set by T iterations.

    Args:
        num_components: K.
        num_features: D.
        num_iters: T, iterations per call.
        init: how the initial centers are chosen.
        gradient: how gradients pass through the loop; see :func:`~em_lightning.operators.gradients.iterate`.
    """

    inits_known: tuple[str, ...] = tuple(CENTERS)
    gradients_known: tuple[str, ...] = ("unrolled", "checkpoint", "last")
    shown: tuple[str, ...] = ("num_iters", "init", "gradient")  # arguments in the repr

    def __init__(self, num_components: int, num_features: int, num_iters: int, init: str, gradient: str) -> None:
        super().__init__()
        check_counts(1, num_components=num_components, num_features=num_features)
        check_counts(0, num_iters=num_iters)
        check_choice("init", init, self.inits_known)
        check_choice("gradient", gradient, self.gradients_known)
        self.num_components = num_components
        self.num_features = num_features
        self.num_iters = num_iters
        self.init = init
        self.gradient = gradient

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: Any = None,
        num_iters: int | None = None,
    ) -> Any:
        """Return the mixtures after the last iteration.

        Args:
            x: points (B, N, D).
            mask: (B, N), false where a row is padding, which may hold any value.
            weights: (B, N), not negative; a common factor has no effect.
            init: mixtures to start from instead of the operator's own start.
            num_iters: T for this call.
        """
        for sets, state in self._loop(x, mask, weights, init, num_iters):  # noqa: B007
            pass
        return self._mixture(sets, state)

    def iterate(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: Any = None,
        num_iters: int | None = None,
    ) -> Iterator[Any]:
        """Yield the start and the mixtures after each iteration; arguments are those of :meth:`forward`."""
        for sets, state in self._loop(x, mask, weights, init, num_iters):
            yield self._mixture(sets, state)

    def _loop(
        self, x: Tensor, mask: Tensor | None, weights: Tensor | None, init: Any, num_iters: int | None
    ) -> Iterator[tuple[Any, Parameters]]:
        num_iters = self.num_iters if num_iters is None else num_iters
        check_counts(0, num_iters=num_iters)
        x = check_sets(x, mask, weights, self.num_features)
        inputs = (x, *self.parameters()) if weights is None else (x, weights, *self.parameters())
        trains = self.training and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        with torch.autocast(x.device.type, enabled=False):
            sets = self._prepare(x, mask, weights)
            state = self._start(sets, try_several=not trains) if init is None else self._enter(sets, init)
        yield sets, state  # outside of the context, so that the caller's autocast applies to the body of its loop

        def step(state: Parameters, progress: float) -> Parameters:
            with torch.autocast(x.device.type, enabled=False):
                return self._step(sets, state, progress)[0]

        for after in gradients.iterate(step, state, num_iters, self.gradient):
            yield sets, after

    def fit(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: Any = None,
        max_iters: int = 100,
        tol: float = 1e-3,
    ) -> tuple[Any, Tensor]:
        """Iterate each set until its objective changes by less than ``tol`` per point; return mixtures and steps (B,).

        The objective per point is :meth:`objective` divided by the number of points of positive weight; ``tol`` is in
        nats, as in scikit-learn. A set that has converged keeps its mixture, so that its result does not depend on the
        other sets; one with ``max_iters`` steps may not have converged. With ``torch.compile`` use :meth:`forward`,
        whose iterations are fixed. Other arguments are those of :meth:`forward`.
        """
        check_at_least(0, max_iters=max_iters, tol=tol)
        x = check_sets(x, mask, weights, self.num_features)
        with torch.autocast(x.device.type, enabled=False):
            sets = self._prepare(x, mask, weights)
            state = self._start(sets, try_several=True) if init is None else self._enter(sets, init)
            num_points = sets.mass.clamp(min=1.0)  # of positive weight, as their mean weight is 1

            def step(state: Parameters, _: int) -> tuple[Parameters, Tensor]:  # each may be the last: progress is 1
                after, objective = self._step(sets, state, progress=1.0, with_objective=True)
                return after, objective / num_points

            result = em.fit(step, state, max_iters=max_iters, tol=tol)
            return self._mixture(sets, Parameters(*result.state)), result.steps

    def objective(self, x: Tensor, mixture: Any, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the objective (B,) of given mixtures, which iterations increase; weights are divided by their mean."""
        x = check_sets(x, mask, weights, self.num_features)
        with torch.autocast(x.device.type, enabled=False):
            sets = self._prepare(x, mask, weights)
            return self._objective(sets, self._enter(sets, mixture)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the main arguments."""
        options = [f"{name}={getattr(self, name)!r}" for name in self.shown]
        return ", ".join([str(self.num_components), str(self.num_features), *options])

    # To be defined by a subclass; ``sets`` is a named tuple of the inputs of all iterations, with a ``mass`` (B,).

    _prepare: Callable[[Tensor, Tensor | None, Tensor | None], Any]  # (x, mask, weights) -> sets
    _start: Callable[..., Parameters]  # (sets, try_several) -> state
    _enter: Callable[[Any, Any], Parameters]  # (sets, mixture) -> state
    # (sets, state, progress, with_objective=False) -> (next state, objective (B,) of the given state or 0 if not
    # requested); progress is the fraction of the iterations up to and including this one, 1 in the last.
    _step: Callable[..., tuple[Parameters, Tensor]]
    _objective: Callable[[Any, Parameters], Tensor]  # (sets, state) -> (B,)
    _mixture: Callable[[Any, Parameters], Any]  # (sets, state) -> mixture


def build(argument: str, cls: type[Any], value: Any) -> Any:
    """Build an instance from a mapping of its arguments; return instances and ``None`` unchanged."""
    if isinstance(value, Mapping):
        try:
            return cls(**value)
        except TypeError as error:
            signature = f"{cls.__name__}{inspect.signature(cls)}"
            raise TypeError(f"{argument}={dict(value)!r} must be arguments of {signature}: {error}") from error
    if value is not None and not isinstance(value, cls):
        raise TypeError(f"{argument}={value!r} must be a {cls.__name__}, a dict or None")
    return value


def check_sets(x: Tensor, mask: Tensor | None, weights: Tensor | None, num_features: int) -> Tensor:
    """Check points (B, N, D), mask and weights (B, N); return the points in at least float32."""
    for name, value in (("x", x), ("mask", mask), ("weights", weights)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value)}; convert NumPy arrays with torch.from_numpy")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.ndim != 3 or x.shape[-1] != num_features or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, N, {num_features}) with N >= 1")
    for name, value in (("mask", mask), ("weights", weights)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(x.shape[:2])}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, got {mask.dtype}")
    if has_values(x) and not x.detach().sum().isfinite():  # a sum takes little time, but can also overflow
        finite = x.detach().isfinite().all(-1)
        _check_all(finite if mask is None else finite | ~mask, "x must be finite", x)
    if weights is not None and has_values(weights):
        _check_all((weights >= 0) & weights.isfinite(), "weights must be finite and not negative", weights)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_all(valid: Tensor, rule: str, values: Tensor) -> None:
    if not valid.all():
        which, row = (~valid).nonzero()[0].tolist()
        raise ValueError(f"{rule}: set {which}, row {row} is {values[which, row].tolist()}")
