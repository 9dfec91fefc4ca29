"""How gradients pass through a loop of EM iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from em_lightning.mixture.parameters import Parameters

GRADIENTS = ("unrolled", "checkpoint", "last", "implicit")

# The largest change of an iteration at a fixed point, in standard deviations of a component.
_CONVERGED = 1e-5
# The linear system of the implicit gradient: relative residual, and the largest number of products with the Jacobian.
_RESIDUAL = 1e-8
_PRODUCTS = 300

Step = Callable[[Parameters, float], Parameters]
Changes = Callable[[Parameters, Parameters], Tensor]


def iterate(step: Step, state: Parameters, steps: int, gradient: str, changes: Changes) -> Iterator[Parameters]:
    r"""Yield the states after each iteration ``step(state, progress)``, differentiable in one of four ways.

    - ``"unrolled"``: exact. An iteration keeps its parameters (B, K, .), nothing of the size of the points.
    - ``"checkpoint"``: exact. An iteration keeps its result alone and computes the rest again.
    - ``"last"``: of the last iteration alone, whose start is taken as a constant. It is neither the gradient of T
      iterations nor that of the converged mixture, and costs one iteration.
    - ``"implicit"``: of the fixed point :math:`z = f(z, x)`, exact at convergence whatever the number of iterations:
      :math:`(I - \partial f / \partial z)^\top u = v` is solved by GMRES for each set, and ``u`` replaces the incoming
      gradient ``v``. The start has no gradient.

    Args:
        step: an iteration. ``progress`` is the share of the loop that is done after it; it is 1 in every iteration
            under an implicit gradient, as a fixed point belongs to one map.
        state: the start.
        steps: T.
        gradient: one of ``GRADIENTS``.
        changes: how much an iteration changed each set (B,), in standard deviations.

    Raises:
        RuntimeError: the implicit gradient of a loop that has not converged is asked for.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, 2019 (implicit); Saad and Schultz, GMRES, 1986.
    """
    for count in range(1, steps + 1):
        if gradient in ("last", "implicit") and count < steps:
            with torch.no_grad():
                state = step(state, 1.0 if gradient == "implicit" else count / steps)
        elif gradient == "checkpoint" and torch.is_grad_enabled():
            state = checkpoint(step, state, count / steps, use_reentrant=False, preserve_rng_state=False)
        elif gradient == "implicit":
            state = _at_fixed_point(step, state, changes)
        else:
            state = step(state, count / steps)
        yield state


def _at_fixed_point(step: Step, before: Parameters, changes: Changes) -> Parameters:
    before = _unpack(_pack(before).detach(), before)
    after = step(before, 1.0)
    if not after.means.requires_grad or not len(after.means):
        return after
    _check_converged(changes, before, after)
    packed = _pack(after)
    center = packed.detach()

    def solve(grad: Tensor) -> Tensor:
        with torch.enable_grad():
            place = center.clone().requires_grad_()
            again = _pack(step(_unpack(place, before), 1.0))

        def apply(vector: Tensor) -> Tensor:
            return vector - torch.autograd.grad(again, place, vector, retain_graph=True)[0]

        return gmres(apply, grad)

    packed.register_hook(solve)
    return _unpack(packed, before)


def gmres(apply: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Solve ``A_b u_b = v_b`` for all sets b at once, given products (B, P) of the matrices with vectors.

    Raises:
        RuntimeError: the residual does not become small, as where a matrix is singular.
    """
    size = torch.linalg.vector_norm(target, dim=1, keepdim=True)
    scale = torch.where(size > 0, size, 1.0)
    basis = [target / scale]
    columns: list[Tensor] = []
    worst = torch.inf
    limit = min(target.shape[1], _PRODUCTS)
    for count in range(1, limit + 1):
        vector = apply(basis[-1])
        known = torch.stack(basis, 2)
        column = torch.zeros_like(target[:, :1]).expand(-1, count)
        for _ in range(2):  # orthogonal to rounding only after the second time
            part = (vector.unsqueeze(1) @ known).squeeze(1)
            vector = vector - (known @ part.unsqueeze(2)).squeeze(2)
            column = column + part
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        # A set whose Krylov space is exhausted is solved; zeros leave it as it is.
        ended = length <= torch.finfo(target.dtype).eps * torch.linalg.vector_norm(column, dim=1, keepdim=True)
        columns.append(torch.cat([column, torch.where(ended, 0.0, length)], 1))
        basis.append(torch.where(ended, 0.0, vector / torch.where(ended, 1.0, length)))
        if count % 10 == 0 or count == limit or bool(ended.all()):
            matrix = torch.stack([torch.nn.functional.pad(c, (0, count + 1 - c.shape[1])) for c in columns], 2)
            first = torch.zeros_like(matrix[..., :1])
            first[:, 0] = 1.0
            weights = torch.linalg.pinv(matrix) @ first
            residual = torch.linalg.vector_norm(first - matrix @ weights, dim=(1, 2))
            worst = float(torch.where(size.squeeze(1) > 0, residual, 0.0).max())
            if worst <= _RESIDUAL or bool(ended.all()):
                break
    if not worst <= 1e3 * _RESIDUAL:
        raise RuntimeError(
            f"the implicit gradient's linear system keeps a relative residual of {worst:.1e}: the fixed point is not "
            f"isolated, as with more components than the points can tell apart; use gradient='unrolled'"
        )
    return scale * (torch.stack(basis[:-1], 2) @ weights).squeeze(2)


@torch.no_grad()
def _check_converged(changes: Changes, before: Parameters, after: Parameters) -> None:
    change = changes(before, after)
    late = ~(change <= _CONVERGED)
    if late.any():
        worst = int(change.argmax())
        raise RuntimeError(
            f"gradient='implicit' needs a converged loop: the last iteration changed {int(late.sum())} of "
            f"{len(late)} sets, set {worst} by {float(change[worst]):.1e} where {_CONVERGED:g} is allowed; "
            f"raise num_iters, or use gradient='unrolled'"
        )


def _pack(state: Parameters) -> Tensor:
    return torch.cat([part.flatten(1) for part in state], 1)


def _unpack(packed: Tensor, like: Parameters) -> Parameters:
    flat = packed.split([math.prod(part.shape[1:]) for part in like], 1)
    parts: Any = (part.view(shaped.shape) for part, shaped in zip(flat, like, strict=True))
    return Parameters(*parts)
