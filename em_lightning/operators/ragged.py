"""EM of spherical mixtures for groups of rows of any size, in C++ if there is a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from em_lightning.mixture.backends import native
from em_lightning.operators.em import EMOperator

Tensors = tuple[Tensor, ...]

_ARGUMENTS = "Tensor x, Tensor index, SymInt num_groups, SymInt limit, int num_components, int num_iters"
_custom_op = functools.partial(torch.library.custom_op, mutates_args=(), device_types="cpu")


def _new_results(x: Tensor, index: Tensor, num_groups: int, limit: int, num_components: int, num_iters: int) -> Tensors:
    means = x.new_zeros(num_groups, num_components, x.shape[1], dtype=torch.float64)
    return means.new_zeros(means.shape[:2]), means, means.new_zeros(means.shape[:2])


@_custom_op("em_lightning::fit_groups", schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _fit_groups(*inputs: Any) -> Tensors:
    results = _new_results(*inputs)
    native.fit_groups(*inputs, *results, *[None] * 4)  # in place of the gradients of the results and of x
    return results


@_custom_op("em_lightning::fit_groups_gradient", schema=f"({_ARGUMENTS}, Tensor[] grads) -> Tensor")
def _gradient(*arguments: Any) -> Tensor:
    *inputs, grads = arguments
    grad_x = torch.zeros_like(inputs[0])
    native.fit_groups(*inputs, *[None] * 3, *grads, grad_x)  # no results
    return grad_x


_fit_groups.register_fake(_new_results)
_gradient.register_fake(lambda *arguments: torch.empty_like(arguments[0]))


def fit_groups(x: Tensor, index: Tensor, num_groups: int, limit: int, num_components: int, num_iters: int) -> Tensors:
    """Fit a spherical mixture to each group of rows by EM, without padding if there is a compiler.

    The result is that of ``EMOperator(K, D, covariance="spherical", residual=False, prior={"mean_strength": 0.0,
    "covariance_strength": 1.0})`` in float64: log-weights (G, K), means (G, K, D) and logarithms of the standard
    deviations (G, K); zeros for empty groups. ``x`` are the rows (E, D), ``index`` (E,) their groups. Rows of a group
    after its first ``limit`` rows are dropped.
    """
    fit = _fit_groups if native.fits_groups(x) else _fit_by_operator
    return fit(x, index, num_groups, limit, num_components, num_iters)


def _fit_by_operator(
    x: Tensor, index: Tensor, num_groups: int, limit: int, num_components: int, num_iters: int
) -> Tensors:
    prior = {"mean_strength": 0.0, "covariance_strength": 1.0}
    options: dict[str, Any] = {"num_iters": num_iters, "covariance": "spherical", "residual": False, "prior": prior}
    operator = EMOperator(num_components, x.shape[1], **options)

    def fit(x: Tensor, mask: Tensor) -> Tensors:
        log_weights, means, variances = (part.double() for part in operator(x, mask).parameters())
        return log_weights, means, 0.5 * variances.log()

    return map_groups(fit, x, index, num_groups, limit)


def map_groups(
    function: Callable[[Tensor, Tensor], Tensors], x: Tensor, index: Tensor, num_groups: int, limit: int
) -> Tensors:
    """Return tensors (G, ...) of groups of rows; zeros for empty groups.

    ``function(points, mask)`` is called for all groups of 2^n to 2^(n + 1) - 1 rows at once, for each n. It gets the
    groups, padded to the largest of them, as (B, N, D) and (B, N), and returns tensors (B, ...). Other arguments are
    those of :func:`fit_groups`.
    """
    sizes = index.new_zeros(num_groups).scatter_add_(0, index, torch.ones_like(index))
    first_places, order = sizes.cumsum(0) - sizes, index.argsort(stable=True)  # group g: order[first_places[g] + ...]
    sizes = sizes.clamp(max=limit)
    exponents = torch.frexp(sizes.double()).exponent  # n + 1
    groups, results = [], []
    for exponent in exponents.unique():
        group = (exponents == exponent).nonzero().squeeze(1)
        largest = int(sizes[group].max())
        if largest:
            place = torch.arange(largest, device=x.device)
            mask = place < sizes[group].unsqueeze(1)
            rows = order[first_places[group].unsqueeze(1) + torch.where(mask, place, 0)]
            groups.append(group)
            results.append(function(x.index_select(0, rows.flatten()).view(*mask.shape, -1), mask))
    if not groups:  # data-parallel training needs a gradient of every parameter and of the rows, here of zero
        nothing = x.new_zeros(1, 1, x.shape[1]) + x[:0].sum()
        results = [tuple(part[:0] for part in function(nothing, torch.zeros_like(nothing[..., 0], dtype=torch.bool)))]
        groups = [index[:0]]
    parts = (torch.cat(part) for part in zip(*results, strict=True))
    return tuple(part.new_zeros(num_groups, *part.shape[1:]).index_copy(0, torch.cat(groups), part) for part in parts)


# Called with the inputs, the results (not needed) and their gradients; _fit_by_operator gives the second derivatives.
native.register_gradient(_fit_groups, lambda *arguments: [_gradient(*arguments[:-2], arguments[-1])], _fit_by_operator)
