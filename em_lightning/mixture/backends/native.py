"""C++ code for the CPU, compiled on demand and cached: E-step of Gaussian mixtures, EM of groups, Cholesky factors.

E-step and Cholesky factors are ``torch.library`` operators, which ``torch.compile`` and ``torch.export`` do not trace.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from em_lightning.mixture.backends.compiler import load, structure
from em_lightning.mixture.backends.reference import have_memory

_REALS = {torch.float32: "float", torch.float64: "double"}
_KINDS = {"full": 0, "diagonal": 1, "spherical": 2}
# Largest D of full covariances; the time to compile grows with D.
_MOST_FEATURES = 64
# Largest D in Triton: a tile of whitened points and a factor must fit in the registers of a thread block.
_MOST_FEATURES_TRITON = {"full": 16, "diagonal": 128, "spherical": 128}
# Smaller inputs take less than a millisecond in the reference backend, which needs no compiler.
_FEWEST_NUMBERS = 2**12
_FEWEST_MATRICES = 2**6
# Work of about 0.1 ms, the cost of starting a thread.
_NUMBERS_PER_THREAD = 2**17

_chosen = "auto"


class use_backend:
    """Choose the backend of the E-step, permanently or within a ``with`` block.

    Args:
        name: ``"auto"`` uses the native (C++) backend for large sets if there is a compiler, ``"native"`` for all sets
            that it supports; ``"reference"`` uses plain torch, ``"triton"`` Triton kernels for float32 points on CUDA
            devices. These were tested in Triton's interpreter only; therefore ``"auto"`` never uses them.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the native backend cannot be compiled, with the compiler's message; or Triton is not installed, or
            there is neither a CUDA device nor ``TRITON_INTERPRET=1``.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in ("auto", "reference", "native", "triton"):
            raise ValueError(f"name={name!r} must be 'auto', 'reference', 'native' or 'triton'")
        if name == "native":
            _require("spherical", 0, torch.float32)
        if name == "triton":
            _require_triton()
        self.before, _chosen = _chosen, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        global _chosen
        _chosen = self.before


def serves(x: Tensor, family: Any, parameters: Sequence[Tensor] = ()) -> bool:
    """Return whether the native backend computes the E-step of points (B, D, N) under a family of densities."""
    kind = getattr(family, "whitening", None)
    if kind is None or x.dtype not in _REALS or (kind == "full" and x.shape[1] > _MOST_FEATURES):
        return False
    if _chosen == "triton":
        return x.dtype == torch.float32 and x.shape[1] <= _MOST_FEATURES_TRITON[kind] and have_memory(x, *parameters)
    if not _is_chosen(x, x.numel() >= _FEWEST_NUMBERS):
        return False
    if not torch.compiler.is_compiling() and not have_memory(*parameters):
        return False
    if _chosen == "native":
        _require(kind, x.shape[1], x.dtype)
    return _is_available("native.cpp", *_variant(kind, x.shape[1], x.dtype))


def factorizes(matrix: Tensor) -> bool:
    """Return whether the native backend computes the Cholesky factors of matrices (..., D, D)."""
    is_faster = matrix.shape[-1] <= 4 or matrix[..., 0, 0].numel() >= _FEWEST_MATRICES  # than LAPACK
    return matrix.dtype == torch.float64 and _is_chosen(matrix, is_faster) and _is_available("cholesky.cpp")


def _is_for_triton(x: Tensor) -> bool:
    return _chosen == "triton" or x.device.type == "cuda"


def _triton() -> Any:
    return importlib.import_module("em_lightning.mixture.backends.triton")


def _require_triton() -> None:
    try:
        _triton()
    except ImportError as error:
        raise RuntimeError(f"the Triton backend needs the package triton: {error}") from None
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the Triton backend needs a CUDA device, or TRITON_INTERPRET=1 to run in an interpreter")


def _is_chosen(tensor: Tensor, is_large: bool) -> bool:
    if _chosen == "reference" or tensor.device.type != "cpu" or not (is_large or _chosen == "native"):
        return False
    if torch.compiler.is_compiling():
        return True
    return forward_ad.unpack_dual(tensor).tangent is None and have_memory(tensor)


# E-step. The joint log-density is g_nk = peak_k - |W_k (z_n - mu_k)|^2 / 2, and r its softmax over components.
# Arguments:
#     x: points (B, D, N) in float32 or float64, the dtype of all computations per point.
#     weights: (B, N) in float64, or None.
#     means: (B, K, D), in the coordinates z = (x - center) / unit.
#     inverse: W (B, K, D, D) lower triangular, (B, K, D) or (B, K, 1).
#     peak: (B, K), the log-densities of the components at their means.
#     scale: the inverse of W, without gradient.
#     center: (B, D), without gradient.
#     unit: (B,), a power of two, without gradient.
#     kind: "full", "diagonal" or "spherical".


_ARGUMENTS = (
    "Tensor x, Tensor? weights, Tensor means, Tensor inverse, Tensor peak, Tensor scale, Tensor center, Tensor unit, "
    "str kind"
)
_operator = functools.partial(torch.library.custom_op, mutates_args=(), device_types=("cpu", "cuda"))


@_operator("em_lightning::e_step", schema=f"({_ARGUMENTS}, bool with_log_likelihood) -> (Tensor, Tensor)")
def e_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return ``sum_n w_n r_nk phi(z_n)`` (B, K, F) and the log-likelihood (B,), zeros if not requested."""
    if _is_for_triton(arguments[0]):
        return _triton().e_step(*arguments)
    *tensors, kind, with_log_likelihood = arguments
    sums, log_likelihood = _empty_sums(tensors[2], kind), tensors[2].new_zeros(len(tensors[2]))
    _run(kind, tensors, sums=sums, log_likelihood=log_likelihood if with_log_likelihood else None)
    return sums, log_likelihood


@_operator("em_lightning::log_density", schema=f"({_ARGUMENTS}) -> Tensor")
def log_density(*arguments: Any) -> Tensor:
    """Return ``log p(z_n)`` (B, N) in float64; the weights are ``None``."""
    if _is_for_triton(arguments[0]):
        return _triton().log_density(*arguments)
    *tensors, kind = arguments
    density = tensors[2].new_empty(tensors[0][:, 0].shape)
    _run(kind, tensors, log_density=density)
    return density


@_operator(
    "em_lightning::e_step_gradient",
    schema=f"({_ARGUMENTS}, Tensor? grad_sums, Tensor grad_density) -> (Tensor, Tensor, Tensor)",
)
def e_step_gradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to peak, means and W (concatenated), points, and weights.

    ``grad_density``, (B, N) or (B, 1), is the gradient with respect to ``w_n log p(z_n)``.
    """
    if _is_for_triton(arguments[0]):
        return _triton().e_step_gradient(*arguments)
    *tensors, kind, grad_sums, grad_density = arguments
    own, of_x, of_weights = _empty_gradients(*tensors)
    _run(kind, tensors, grad_density, sums=own, grads=grad_sums, grad_x=of_x, grad_weights=of_weights)
    return own, of_x, of_weights


def _empty_sums(means: Tensor, kind: str) -> Tensor:
    features = means.shape[-1]
    size = {"full": features * (features + 1) // 2, "diagonal": features, "spherical": 1}[kind]
    return means.new_empty(*means.shape[:2], 1 + features + size)


def _empty_gradients(x: Tensor, _: Any, means: Tensor, inverse: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    size = 1 + means.shape[-1] + inverse[0, 0].numel()
    return means.new_empty(*means.shape[:2], size), x.new_empty(x.shape), means.new_empty(x[:, 0].shape)


def _e_step_in_torch(x: Tensor, weights: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    """Compute :func:`e_step` by torch operations, which have derivatives of every order."""
    z, joint = _joint_in_torch(x, weights, *others)
    kind = others[6]
    responsibilities, log_density = joint.softmax(1), joint.logsumexp(1)
    if weights is not None:
        responsibilities, log_density = responsibilities * weights.unsqueeze(1), log_density * weights
    pairs = [z[:, i : i + 1] * z[:, i:] for i in range(z.shape[1])] if kind == "full" else [z.square()]
    second = torch.cat(pairs, 1)
    second = second.sum(1, keepdim=True) if kind == "spherical" else second
    features = torch.cat([torch.ones_like(z[:, :1]), z, second], 1)
    return responsibilities @ features.mT, log_density.sum(-1)


def _joint_in_torch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return coordinates (B, D, N) and joint log-densities (B, K, N)."""
    x, _, means, inverse, peak, _, center, unit, kind, *_ = arguments
    z = (x.to(center.dtype) - center.unsqueeze(-1)) / unit[:, None, None]
    difference = z.unsqueeze(1) - means.unsqueeze(-1)
    y = inverse @ difference if kind == "full" else inverse.unsqueeze(-1) * difference
    return z, peak.unsqueeze(-1) - 0.5 * y.square().sum(2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.others = inputs[8:]
    ctx.save_for_backward(*inputs[:8])


def _e_step_backward(ctx: Any, grad_sums: Tensor, grad_log_likelihood: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.others[1]:  # the log-likelihood is a constant
        grad_log_likelihood = torch.zeros_like(grad_log_likelihood)
    if torch.is_grad_enabled():
        return _second_order(ctx, _e_step_in_torch, (grad_sums, grad_log_likelihood))
    return _first_order(ctx, grad_sums, grad_log_likelihood.unsqueeze(-1))


def _log_density_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        return _second_order(ctx, lambda *inputs: (_joint_in_torch(*inputs)[1].logsumexp(1),), (grad,))
    return _first_order(ctx, None, grad)


def _first_order(ctx: Any, grad_sums: Tensor | None, grad_density: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # read once: checkpoints allow one read
    _, weights, means, inverse, *_ = tensors
    own, of_x, of_weights = e_step_gradient(*tensors, ctx.others[0], grad_sums, grad_density)
    of_peak, of_means, of_inverse = own.tensor_split([1, 1 + means.shape[-1]], -1)
    of_weights = None if weights is None else of_weights
    nothing = [None] * (3 + len(ctx.others))
    return of_x, of_weights, of_means, of_inverse.reshape(inverse.shape), of_peak.squeeze(-1), *nothing


def _second_order(
    ctx: Any, function: Callable[..., tuple[Tensor, ...]], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again."""
    tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
    # Differentiate at views; gradients at the tensors would include paths from the points through the parameters.
    tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    inputs = [tensor for tensor, needed in zip(tensors, wanted, strict=False) if needed]
    found = iter(torch.autograd.grad(function(*tensors, *ctx.others), inputs, grads, create_graph=True))
    return tuple(next(found) if needed else None for needed in wanted)


e_step.register_fake(lambda x, w, means, *others: (_empty_sums(means, others[-2]), means.new_empty(len(means))))
log_density.register_fake(lambda x, weights, means, *others: means.new_empty(x[:, 0].shape))
e_step_gradient.register_fake(_empty_gradients)
e_step.register_autograd(_e_step_backward, setup_context=_save)
log_density.register_autograd(_log_density_backward, setup_context=_save)


def _run(kind: str, tensors: Any, grad_density: Tensor | None = None, **results: Tensor | None) -> None:
    """Run the E-step on its tensors; the results are named as in ``native.cpp``."""
    x, means = tensors[0], tensors[2]
    outputs = (
        results.get(name) for name in ("grads", "sums", "log_likelihood", "log_density", "grad_x", "grad_weights")
    )
    others = [part if part is None else part.contiguous() for part in (*tensors[1:], *outputs)]
    grad_density = None if grad_density is None else grad_density.expand(-1, x.shape[-1])
    strides = () if grad_density is None else grad_density.stride()
    problem = structure(len(x), *means.shape[1:], x.shape[-1], x, *x.stride(), *others, grad_density, *strides)
    library, _ = load("native.cpp", *_variant(kind, x.shape[1], x.dtype))
    library.em_lightning_e_step(problem, _num_threads(x.numel() * means.shape[1]))


def _num_threads(numbers: int) -> ctypes.c_int64:
    return ctypes.c_int64(min(torch.get_num_threads(), 1 + numbers // _NUMBERS_PER_THREAD))


# EM of spherical mixtures for groups of rows.


def fits_groups(x: Tensor) -> bool:
    """Return whether the native backend fits mixtures to groups of the rows of x (E, D)."""
    return x.dtype in _REALS and _is_chosen(x, is_large=True) and _is_available("ragged.cpp")


def fit_groups(x: Tensor, index: Tensor, *others: Any) -> None:
    """Run EM on groups of rows x; the others are further fields of ``Problem`` in ``ragged.cpp``, in its order.

    Raises:
        IndexError: an index is negative, or not less than the number of groups.
    """
    num_groups, _, num_components, num_iters = others[:4]
    if len(x) and not 0 <= int(index.min()) <= int(index.max()) < num_groups:
        raise IndexError(f"index has values in [{index.min()}, {index.max()}]; they must be in [0, {num_groups - 1}]")
    parts = [part.contiguous() if isinstance(part, Tensor) else part for part in (x, index, *others)]
    library, _ = load("ragged.cpp")
    run = getattr(library, f"em_lightning_fit_{_REALS[x.dtype]}")
    run(structure(*x.shape, *parts), _num_threads(x.numel() * num_components * (num_iters + 1)))


# Cholesky factors.


@_operator("em_lightning::cholesky")
def cholesky(matrix: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factors of matrices (..., D, D) with smallest pivots (..., D), and their inverses."""
    factors = torch.empty_like(matrix), torch.empty_like(matrix)
    _call("em_lightning_cholesky", matrix, pivots, *factors)
    return factors


@_operator("em_lightning::cholesky_gradient")
def cholesky_gradient(
    matrix: Tensor, pivots: Tensor, scale: Tensor, inverse: Tensor, grad_scale: Tensor, grad_inverse: Tensor
) -> Tensor:
    """Return the gradient with respect to the symmetric matrices."""
    found = torch.empty_like(matrix)
    _call("em_lightning_cholesky_gradient", matrix, pivots, scale, inverse, grad_scale, grad_inverse, found)
    return found


cholesky.register_fake(lambda matrix, pivots: (torch.empty_like(matrix), torch.empty_like(matrix)))
cholesky_gradient.register_fake(lambda matrix, *others: torch.empty_like(matrix))


def _call(name: str, matrix: Tensor, *others: Tensor) -> None:
    parts = [part.contiguous() for part in (matrix, *others)]
    library, _ = load("cholesky.cpp")
    getattr(library, name)(*map(ctypes.c_int64, structure(matrix[..., 0, 0].numel(), matrix.shape[-1], *parts)))


def _variant(kind: str, features: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the preprocessor definitions for the compiler."""
    own = features if kind == "full" else 0
    return f"-DREAL={_REALS[dtype]}", f"-DKIND={_KINDS[kind]}", f"-DFEATURES={own}"


def _require(kind: str, features: int, dtype: torch.dtype) -> None:
    library, message = load("native.cpp", *_variant(kind, features, dtype))
    if library is None:
        raise RuntimeError(f"the native backend cannot be compiled: {message}")


@torch.compiler.assume_constant_result
def _is_available(*source: str) -> bool:
    return load(*source)[0] is not None
