"""Differentiation of a loop of EM iterations: unrolled, checkpointed, last iteration, implicit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from em_lightning.mixture.points import Parameters

GRADIENTS = ("unrolled", "checkpoint", "last", "implicit")

# Largest change of parameters in a converged iteration, of points in [-1, 1]^D. This and the next four are chosen.
_CONVERGED = 1e-6
# Relative residuals of GMRES: it stops below the first, which float32 cannot resolve, and raises above the second.
_SUFFICIENT_RESIDUAL, _LARGEST_RESIDUAL = 1e-8, 1e-5
# Largest number of products with the Jacobian, to bound memory and time; every tenth is followed by a solution.
_LARGEST_PRODUCTS, _CHECK_INTERVAL = 300, 10

Step = Callable[[Parameters, float], Parameters]


def iterate(step: Step, state: Parameters, steps: int, gradient: str) -> Iterator[Parameters]:
    r"""Yield the states after each iteration ``step(state, progress)``, differentiable in one of four ways.

    - ``"unrolled"``: exact; stores the parameters of each iteration.
    - ``"checkpoint"``: exact; stores the result of each iteration and recomputes the rest.
    - ``"last"``: the gradient of the last iteration, at the cost of one; the state before it is a constant.
    - ``"implicit"``: the gradient of the fixed point :math:`z = f(z, x)` of an iteration f, with parameters z of a set
      and points x, exact at convergence. For the gradient v of a loss with respect to z, GMRES solves
      :math:`(I - \partial f / \partial z)^\top u = v` for each set. The start has no gradient.

    ``progress`` is the fraction of completed ``steps``, always 1 for ``"implicit"``.

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
            state = _implicit_step(step, state)
        else:
            state = step(state, count / steps)
        yield state


def _implicit_step(step: Step, state: Parameters) -> Parameters:
    """Return the parameters after one more iteration, with the gradient of the fixed point, see :func:`iterate`.

    Differentiating the iteration at a constant z gives the factor ``df/dx``. A hook on its result multiplies the
    incoming gradient by the other factor of ``dz/dx = (I - df/dz)^-1 df/dx``.
    """
    before = _pack(state).detach()
    state = _unpack(before, state)
    after = step(state, 1.0)
    if not after.means.requires_grad or not len(after.means):  # no gradient, or no sets
        return after
    packed = _pack(after)
    fixed_point = packed.detach()
    change = (fixed_point - before).abs().amax(1)
    if not (change <= _CONVERGED).all():
        raise RuntimeError(
            f"gradient='implicit' needs a converged loop, but the last iteration changed set {int(change.argmax())} by "
            f"{float(change.max()):.1e} > {_CONVERGED:g}; raise num_iters, or use gradient='unrolled'"
        )

    def solve(grad: Tensor) -> Tensor:
        with torch.enable_grad():
            z = fixed_point.clone().requires_grad_()
            f = _pack(step(_unpack(z, state), 1.0))

        def product(vector: Tensor) -> Tensor:
            return vector - torch.autograd.grad(f, z, vector, retain_graph=True)[0]

        with torch.autocast(grad.device.type, enabled=False):
            return gmres(product, grad)

    packed.register_hook(solve)
    return _unpack(packed, state)


def gmres(product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Solve ``A_b u_b = v_b`` for all sets b at once, given ``product(u)`` = A u and the ``target`` v (B, P).

    The solution has the smallest residual in the Krylov space, which ``v, A v, A A v, ...`` span.
    """
    norm = torch.linalg.vector_norm(target, dim=1, keepdim=True)
    scale = torch.where(norm > 0, norm, 1.0)
    basis = (target / scale).unsqueeze(2)
    unit_target, products = basis, basis[..., :0]
    limit = min(target.shape[1], _LARGEST_PRODUCTS)
    for count in range(1, limit + 1):
        newest = product(basis[..., -1])
        products = torch.cat([products, newest.unsqueeze(2)], 2)
        if count == limit or count % _CHECK_INTERVAL == 0:
            coefficients = torch.linalg.pinv(products) @ unit_target
            residual = float(torch.linalg.vector_norm(unit_target - products @ coefficients, dim=(1, 2)).max())
            solution = scale * (basis @ coefficients).squeeze(2)
            if residual <= _SUFFICIENT_RESIDUAL:
                break
        # The part of the newest product that is orthogonal to the basis; any direction if there is none.
        direction = torch.linalg.qr(torch.cat([basis, newest.unsqueeze(2)], 2)).Q[..., -1:]
        basis = torch.cat([basis, direction], 2)
    if not residual <= _LARGEST_RESIDUAL:
        raise RuntimeError(
            f"gradient='implicit' failed: GMRES left a relative residual of {residual:.1e}. The fixed point is not "
            f"isolated, for instance because components coincide; use gradient='unrolled'"
        )
    return solution


def _pack(state: Parameters) -> Tensor:
    """Return all parameters of each set as one vector, (B, P)."""
    return torch.cat([part.flatten(1) for part in state], 1)


def _unpack(packed: Tensor, like: Parameters) -> Parameters:
    """Return parameters with the shapes of ``like``; the inverse of :func:`_pack`."""
    parts = packed.split([math.prod(old.shape[1:]) for old in like], 1)
    return Parameters(*(part.view(old.shape) for part, old in zip(parts, like, strict=True)))
