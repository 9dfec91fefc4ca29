"""How gradients pass through a loop of EM iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from em_lightning.mixture.factors import Factors, State

GRADIENTS = ("unrolled", "checkpoint", "last", "implicit")

# The largest change of an iteration, in standard deviations of a component and in the logarithm of its size, at which a
# loop has arrived at its fixed point; of weights, as they are.
_ARRIVED = 1e-5
# The solution of the linear system: relative residual, and products with the Jacobian at most.
_RESIDUAL = 1e-8
_PRODUCTS = 300

Step = Callable[[State, float], State]


def iterate(step: Step, state: State, steps: int, gradient: str) -> Iterator[State]:
    r"""Yield the states after each iteration ``step(state, progress)``, differentiable in one of four ways.

    - ``"unrolled"``: exact. An iteration keeps its parameters (B, K, .), nothing of the size of the points.
    - ``"checkpoint"``: exact. Of an iteration only its result is kept; the rest is computed again.
    - ``"last"``: of the last iteration alone, its start taken as constant. It is neither the gradient of T iterations
      nor of the converged mixture; it costs one iteration.
    - ``"implicit"``: of the fixed point :math:`z = f(z, x)`, exact at convergence whatever the number of iterations:
      :math:`(I - \partial f / \partial z)^\top u = v` is solved by GMRES, cloud by cloud, and ``u`` passed on in
      place of the incoming ``v``. The start has no gradient.

    Args:
        step: an iteration, which is told the share of the loop that is done after it. For an implicit gradient this
            is 1 at every iteration: a fixed point belongs to one map.
        state: the start.
        steps: T.
        gradient: one of ``GRADIENTS``.

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
            state = _at_fixed_point(step, state)
        else:
            state = step(state, count / steps)
        yield state


def _at_fixed_point(step: Step, before: State) -> State:
    before = _unpack(_pack(before).detach(), before)
    after = step(before, 1.0)
    if not after.means.requires_grad or not len(after.means):
        return after
    _check_arrived(before, after)
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
        # A set whose space is exhausted has its solution; zeros leave it as it is.
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
def _check_arrived(before: State, after: State) -> None:
    weights = (after.log_weights.exp() - before.log_weights.exp()).abs().amax(1)
    inverse, scale = after.factors.inverse, after.factors.scale
    if scale.ndim == 4:
        shift = (inverse @ (after.means - before.means).unsqueeze(-1)).squeeze(-1)
        growth = inverse @ (scale - before.factors.scale)
    else:
        shift, growth = inverse * (after.means - before.means), inverse * (scale - before.factors.scale)
    change = torch.stack([weights, shift.abs().flatten(1).amax(1), growth.abs().flatten(1).amax(1)]).amax(0)
    late = ~(change <= _ARRIVED)
    if late.any():
        cloud = int(change.argmax())
        raise RuntimeError(
            f"gradient='implicit' needs a converged loop: the last iteration still changed {int(late.sum())} of "
            f"{len(late)} sets, set {cloud} by {float(change[cloud]):.1e} where {_ARRIVED:g} is allowed; "
            f"raise num_iters, or use gradient='unrolled'"
        )


def _parts(state: State) -> list[Tensor]:
    return [part for part in (state.log_weights, state.means, *state.factors) if part is not None]


def _pack(state: State) -> Tensor:
    return torch.cat([part.flatten(1) for part in _parts(state)], 1)


def _unpack(packed: Tensor, like: State) -> State:
    parts = _parts(like)
    sizes = [math.prod(part.shape[1:]) for part in parts]
    log_weights, means, *factors = (
        flat.view(part.shape) for flat, part in zip(packed.split(sizes, 1), parts, strict=True)
    )
    return State(log_weights, means, Factors(*factors))
