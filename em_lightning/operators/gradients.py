"""Differentiation of a loop of EM iterations: unrolled, checkpointed, last iteration, implicit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from em_lightning.mixture.parameters import Parameters

GRADIENTS = ("unrolled", "checkpoint", "last", "implicit")

# Largest change of a converged iteration, in standard deviations of a component.
_CONVERGED = 1e-5
# GMRES: relative residual, and largest number of products with the Jacobian.
_RESIDUAL = 1e-8
_PRODUCTS = 300

Step = Callable[[Parameters, float], Parameters]
Changes = Callable[[Parameters, Parameters], Tensor]


def iterate(step: Step, state: Parameters, steps: int, gradient: str, changes: Changes) -> Iterator[Parameters]:
    r"""Yield the states after each iteration ``step(state, progress)``, differentiable in one of four ways.

    - ``"unrolled"``: exact; stores the parameters of each iteration.
    - ``"checkpoint"``: exact; stores the result of each iteration and recomputes the rest.
    - ``"last"``: the gradient of the last iteration, at the cost of one; the state before it is a constant.
    - ``"implicit"``: the gradient of the fixed point :math:`z = f(z, x)`, exact at convergence. For an incoming
      gradient v, GMRES solves :math:`(I - \partial f / \partial z)^\top u = v` for each set. The start has no gradient.

    ``progress`` is the fraction of completed ``steps``, always 1 for ``"implicit"``. ``changes`` returns how much an
    iteration changed each set (B,), in standard deviations.

    Raises:
        RuntimeError: the gradient is ``"implicit"`` and the loop has not converged.

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
    """Return the parameters after one more step, with the gradient of the fixed point."""
    before = _unpack(_pack(before).detach(), before)
    after = step(before, 1.0)
    if not after.means.requires_grad or not len(after.means):
        return after
    _check_converged(changes, before, after)
    packed = _pack(after)
    fixed_point = packed.detach()

    def solve(grad: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = fixed_point.clone().requires_grad_()
            outputs = _pack(step(_unpack(inputs, before), 1.0))

        def apply(vector: Tensor) -> Tensor:
            return vector - torch.autograd.grad(outputs, inputs, vector, retain_graph=True)[0]

        return gmres(apply, grad)

    packed.register_hook(solve)
    return _unpack(packed, before)


def gmres(apply: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Solve ``A_b u_b = v_b`` for all sets b at once, given products (B, P) of the matrices with vectors."""
    size = torch.linalg.vector_norm(target, dim=1, keepdim=True)
    scale = torch.where(size > 0, size, 1.0)
    basis, images = [target / scale], []
    first, eps = basis[0].unsqueeze(2), torch.finfo(target.dtype).eps
    limit = min(target.shape[1], _PRODUCTS)
    for count in range(1, limit + 1):
        vector = apply(basis[-1])
        images.append(vector)
        bound = eps * torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        known = torch.stack(basis, 2)
        for _ in range(2):  # the second pass removes rounding errors of the first
            vector = vector - (known @ (known.mT @ vector.unsqueeze(2))).squeeze(2)
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        # A set whose Krylov space is exhausted is solved; its further basis vectors are zero.
        ended = length <= bound
        basis.append(torch.where(ended, 0.0, vector / torch.where(ended, 1.0, length)))
        if count % 10 == 0 or count == limit or bool(ended.all()):
            matrix = torch.stack(images, 2)
            weights = torch.linalg.pinv(matrix) @ first
            worst = float(torch.linalg.vector_norm(first - matrix @ weights, dim=(1, 2)).max())
            if worst <= _RESIDUAL or bool(ended.all()):
                break
    if not worst <= 1e3 * _RESIDUAL:
        raise RuntimeError(
            f"gradient='implicit' failed, with a relative residual of {worst:.1e} of GMRES: the fixed point is not "
            f"isolated, for instance because components coincide; use gradient='unrolled'"
        )
    return scale * (known @ weights).squeeze(2)


@torch.no_grad()
def _check_converged(changes: Changes, before: Parameters, after: Parameters) -> None:
    change = changes(before, after)
    late = ~(change <= _CONVERGED)
    if late.any():
        worst = int(change.argmax())
        raise RuntimeError(
            f"gradient='implicit' needs a converged loop: the last iteration changed {int(late.sum())} of "
            f"{len(late)} sets, set {worst} by {float(change[worst]):.1e} > {_CONVERGED:g}; raise num_iters, or use "
            f"gradient='unrolled'"
        )


def _pack(state: Parameters) -> Tensor:
    return torch.cat([part.flatten(1) for part in state], 1)


def _unpack(packed: Tensor, like: Parameters) -> Parameters:
    flat = packed.split([math.prod(part.shape[1:]) for part in like], 1)
    parts: Any = (part.view(shaped.shape) for part, shaped in zip(flat, like, strict=True))
    return Parameters(*parts)
