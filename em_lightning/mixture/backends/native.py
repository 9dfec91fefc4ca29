"""The choice of backends, and C++ code for the CPU: E-steps, M-steps, Cholesky factors, fits of groups of rows.

All but the fits of groups are ``torch.library`` operators, which ``torch.compile`` and ``torch.export`` do not trace.
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

from em_lightning.checks import is_exporting
from em_lightning.mixture.backends.compiler import load, structure
from em_lightning.mixture.backends.reference import are_plain

_REALS = {torch.float32: "float", torch.float64: "double"}
_KINDS = {"full": 0, "diag": 1, "spherical": 2}
# Largest D of full covariances. Their loops over features are unrolled, and take about 10 s to compile for D = 64.
_MOST_FEATURES = 64
# Largest D in Triton: a tile of whitened points and a factor must fit in the registers of a thread block.
_MOST_FEATURES_TRITON = {"full": 16, "diag": 128, "spherical": 128}
# Smallest inputs for which "auto" uses compiled code: elements of x in the E-step, components of all sets (B * K) in
# the M-step and in Cholesky factors of D > 4. Smaller ones take under a millisecond in plain torch, without a compiler.
_FEWEST_NUMBERS = 2**12
FEWEST_COMPONENTS = 2**6
# Products of numbers and components per thread: about 0.1 ms of work, the cost of starting a thread.
_NUMBERS_PER_THREAD = 2**17

_chosen = "auto"


class use_backend:
    """Choose the backend of EM steps and Cholesky factors, permanently or within a ``with`` block.

    Args:
        name: ``"auto"`` uses the native (C++) backend for large sets on a CPU if there is a compiler, ``"native"`` for
            all that it supports; ``"reference"`` uses plain torch, ``"triton"`` Triton kernels for float32 points on
            CUDA devices. These were tested in Triton's interpreter only; therefore ``"auto"`` never uses them.

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
            # Other libraries are compiled when needed.
            _is_available("native.cpp", *_variant("spherical", num_features=0, dtype=torch.float32), required=True)
        if name == "triton":
            try:
                _triton()
            except ImportError as error:
                raise RuntimeError(f"the Triton backend needs the package triton: {error}") from None
            if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
                raise RuntimeError("the Triton backend needs a CUDA device, or TRITON_INTERPRET=1 for its interpreter")
        self.before, _chosen = _chosen, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        global _chosen
        _chosen = self.before


def serves(x: Tensor, family: Any, others: Sequence[Tensor | None] = ()) -> bool:
    """Return whether C++ or Triton computes the E-step of points (B, D, N); others are weights and parameters."""
    kind = getattr(family, "native_kind", None)
    if kind is None or x.dtype not in _REALS or (kind == "full" and x.shape[1] > _MOST_FEATURES):
        return False
    if _chosen == "triton":
        return x.dtype == torch.float32 and x.shape[1] <= _MOST_FEATURES_TRITON[kind] and are_plain(x, *others)
    if not _is_chosen(x.numel() >= _FEWEST_NUMBERS, x, *others):
        return False
    return _is_available("native.cpp", *_variant(kind, x.shape[1], x.dtype), required=_chosen == "native")


def serves_step(x: Tensor, family: Any, others: Sequence[Tensor | None]) -> bool:
    """Return whether C++ computes a whole EM step: if it serves the points, and no derivative is wanted."""
    return not _is_for_triton(x) and serves(x, family, others) and _is_constant(x, *others)


def triton_start(x: Tensor, family: Any, weights: Tensor | None = None) -> Any:
    """Return the module of Triton kernels for a start of points (B, D, N); ``None`` if they do not serve it."""
    served = _chosen == "triton" and serves(x, family, [weights]) and _is_constant(x, weights)
    return importlib.import_module("em_lightning.mixture.backends.triton_start") if served else None


def _is_constant(*tensors: Tensor | None) -> bool:
    """Return whether no derivative is wanted, now or in a later call of an exported program."""
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in tensors)
    return not wanted and not is_exporting()


def serves_components(source: str, tensor: Tensor, is_faster: bool) -> bool:
    """Return whether the native backend runs ``cholesky.cpp`` or ``m_step.cpp`` on a tensor with axis K."""
    return tensor.dtype == torch.float64 and _is_chosen(is_faster, tensor) and _is_available(source)


def _is_for_triton(x: Tensor) -> bool:
    # Also after ``with use_backend("triton")``, for instance in a backward pass, where CUDA tensors need Triton.
    return _chosen == "triton" or x.device.type == "cuda"


def _triton() -> Any:
    return importlib.import_module("em_lightning.mixture.backends.triton")


def _is_chosen(is_large: bool, tensor: Tensor, *others: Tensor | None) -> bool:
    if _chosen == "reference" or tensor.device.type != "cpu":
        return False
    # Exported programs run without this package unless the backend is chosen, and read no size, which may be dynamic.
    if _chosen != "native" and (is_exporting() or not is_large):
        return False
    return torch.compiler.is_compiling() or are_plain(tensor, *others)


# E-step. The joint log-density is g_nk = peak_k - |W_k (z_n - mu_k)|^2 / 2, and r its softmax over components.
# Arguments:
#     x: points (B, D, N) in float32 or float64, the dtype of all computations per point.
#     weights: (B, N) in float64, or None.
#     means: (B, K, D), in the coordinates z = (x - center) / unit.
#     inverse: W (B, K, D, D) lower triangular, (B, K, D) or (B, K, 1).
#     peak: (B, K), the log-densities of the components at their means.
#     scale: L, the inverse of W (not ``Frame.scale``), without gradient.
#     center: (B, D), without gradient.
#     unit: (B,), ``Frame.scale`` of the points, a power of two, without gradient.
#     kind: "full", "diag" or "spherical"; s(z) has the S products of this covariance type, and F = 1 + D + S.
_ARGUMENTS = (
    "Tensor x, Tensor? weights, Tensor means, Tensor inverse, Tensor peak, Tensor scale, Tensor center, Tensor unit, "
    "str kind"
)
_THREE = "(Tensor, Tensor, Tensor)"  # results
_X, _MEANS = 0, 2  # positions of arguments
# Of em_step, in the order of ``Problem`` in native.cpp.
_PARAMETERS = "log_weights", "covariances", "floor", "next_log_weights", "next_means", "next_covariances"
_operator = functools.partial(torch.library.custom_op, mutates_args=(), device_types=("cpu", "cuda"))


@_operator("em_lightning::e_step", schema=f"({_ARGUMENTS}, bool with_log_likelihood) -> (Tensor, Tensor)")
def e_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return ``sum_n w_n r_nk [1, z_n, s(z_n)]`` (B, K, F) and the log-likelihood (B,), zeros if not requested."""
    if _is_for_triton(arguments[_X]):
        return _triton().e_step(*arguments)
    *tensors, kind, with_log_likelihood = arguments
    sums, log_likelihood = _empty_statistics(*arguments)
    _run(kind, tensors, sums=sums, log_likelihood=log_likelihood if with_log_likelihood else None)
    return sums, log_likelihood


@_operator(
    "em_lightning::em_step",
    schema="(Tensor x, Tensor? weights, Tensor log_weights, Tensor means, Tensor covariances, Tensor center, "
    "Tensor unit, Tensor floor, str kind, bool with_log_likelihood) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def em_step(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the results of :func:`e_step` and :func:`m_step`, for parameters in coordinates z; without gradient."""
    x, weights, log_weights, means, covariances, *frame, floor, kind, with_log_likelihood = arguments
    results = sums, log_likelihood, *after = _empty_step(*arguments)
    parameters = dict(zip(_PARAMETERS, (log_weights, covariances, floor, *after), strict=True))
    requested = log_likelihood if with_log_likelihood else None
    # W, peak and L follow from the covariances.
    _run(kind, [x, weights, means, None, None, None, *frame], sums=sums, log_likelihood=requested, **parameters)
    return results


@_operator("em_lightning::log_density", schema=f"({_ARGUMENTS}) -> Tensor")
def log_density(*arguments: Any) -> Tensor:
    """Return ``log p(z_n)`` (B, N) in float64; the weights are ``None``."""
    if _is_for_triton(arguments[_X]):
        return _triton().log_density(*arguments)
    *tensors, kind = arguments
    result = tensors[_MEANS].new_empty(tensors[_X][:, 0].shape)
    _run(kind, tensors, log_density=result)
    return result


@_operator(
    "em_lightning::e_step_gradient", schema=f"({_ARGUMENTS}, Tensor? grad_sums, Tensor grad_density) -> {_THREE}"
)
def e_step_gradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of [peak, means, W] in one tensor (B, K, ...), of the points, and of the weights.

    ``grad_density``, (B, N) or (B, 1), is the gradient with respect to ``w_n log p(z_n)``.
    """
    if _is_for_triton(arguments[_X]):
        return _triton().e_step_gradient(*arguments)
    *tensors, kind, grad_sums, grad_density = arguments
    of_mixture, of_x, of_weights = _empty_gradients(*tensors)
    _run(kind, tensors, grad_density, sums=of_mixture, grads=grad_sums, grad_x=of_x, grad_weights=of_weights)
    return of_mixture, of_x, of_weights


def _empty_statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, kind, _with_log_likelihood = arguments
    means = tensors[_MEANS]
    num_sets, num_components, d = means.shape
    size = 1 + d + {"full": d * (d + 1) // 2, "diag": d, "spherical": 1}[kind]
    return means.new_empty(num_sets, num_components, size), means.new_zeros(num_sets)


def _empty_step(*arguments: Any) -> tuple[Tensor, ...]:
    x, weights, log_weights, means, covariances, *_, kind, with_log_likelihood = arguments
    statistics = _empty_statistics(x, weights, means, kind, with_log_likelihood)
    return *statistics, *_empty([log_weights, means, covariances])


def _empty_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _weights, means, inverse, *_ = arguments
    size = 1 + means.shape[-1] + inverse[0, 0].numel()
    return means.new_empty(*means.shape[:2], size), x.new_empty(x.shape), means.new_empty(x[:, 0].shape)


def e_step_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of :func:`e_step`, see :func:`register_gradient`."""
    *inputs, with_log_likelihood, _outputs, (grad_sums, grad_log_likelihood) = arguments
    return _backward(inputs, grad_sums, grad_log_likelihood.unsqueeze(-1) * with_log_likelihood)


def log_density_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of :func:`log_density`, see :func:`register_gradient`."""
    *inputs, _outputs, (grad_log_density,) = arguments
    return _backward(inputs, None, grad_log_density)


def _backward(inputs: Sequence[Any], grad_sums: Tensor | None, grad_density: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first five arguments of an operator."""
    _x, weights, means, inverse, *_ = inputs
    of_mixture, of_x, of_weights = e_step_gradient(*inputs, grad_sums, grad_density)
    of_peak, of_means, of_inverse = of_mixture.tensor_split([1, 1 + means.shape[-1]], -1)
    of_weights = None if weights is None else of_weights
    return of_x, of_weights, of_means, of_inverse.reshape(inverse.shape), of_peak.squeeze(-1)


def register_gradient(operator: Any, gradient: Callable[..., Any], in_torch: Callable[..., Any]) -> None:
    """Register ``gradient(*inputs, outputs, grads)``; second derivatives are those of ``in_torch(*inputs)``."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        tensors = [part for part in inputs if part is None or isinstance(part, Tensor)]
        ctx.others = inputs[len(tensors) :]  # the last inputs, such as the kind
        ctx.save_for_backward(*tensors, *([output] if isinstance(output, Tensor) else output))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpoints allow one read
        inputs, outputs = saved[: -len(grads)], list(saved[-len(grads) :])
        wanted = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            found = gradient(*inputs, *ctx.others, outputs, list(grads))
            return *found, *[None] * (len(wanted) - len(found))
        # Differentiate with respect to views. Gradients with respect to the inputs themselves would include paths from
        # one input to another, such as from the points through the parameters.
        inputs = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        needed = [tensor for tensor, want in zip(inputs, wanted, strict=False) if want]
        outputs = in_torch(*inputs, *ctx.others)
        each = iter(torch.autograd.grad(outputs, needed, grads, create_graph=True, allow_unused=True))
        return tuple(next(each) if want else None for want in wanted)

    operator.register_autograd(backward, setup_context=save)


e_step.register_fake(_empty_statistics)
log_density.register_fake(lambda x, weights, means, *others: means.new_empty(x[:, 0].shape))
em_step.register_fake(_empty_step)
e_step_gradient.register_fake(_empty_gradients)


def _run(kind: str, tensors: Any, grad_density: Tensor | None = None, **others: Tensor | None) -> None:
    """Run ``native.cpp``; ``others`` are named as in its ``Problem``, whose fields have the order below."""
    x, means = tensors[_X], tensors[_MEANS]
    names = "grads", "sums", "log_likelihood", "log_density", "grad_x", "grad_weights", *_PARAMETERS
    parts = [part if part is None else part.contiguous() for part in (*tensors[1:], *map(others.get, names))]
    grad_density = None if grad_density is None else grad_density.expand(-1, x.shape[-1])
    strides = () if grad_density is None else grad_density.stride()
    problem = structure(len(x), *means.shape[1:], x.shape[-1], x, *x.stride(), *parts, grad_density, *strides)
    library, _ = load("native.cpp", *_variant(kind, x.shape[1], x.dtype))
    library.em_lightning_e_step(problem, _num_threads(x.numel() * means.shape[1]))


def _num_threads(numbers: int) -> ctypes.c_int64:
    return ctypes.c_int64(min(torch.get_num_threads(), 1 + numbers // _NUMBERS_PER_THREAD))


def fits_groups(x: Tensor) -> bool:
    """Return whether the native backend fits spherical mixtures to groups of the rows of x (N, D)."""
    # Exported programs need it, because the sizes of the alternative, a padded layout, depend on the data.
    is_exported = is_exporting() and x.device.type == "cpu" and _chosen != "reference"
    return x.dtype in _REALS and (is_exported or _is_chosen(is_large=True, tensor=x)) and _is_available("ragged.cpp")


def fit_groups(x: Tensor, index: Tensor, *others: Any) -> None:
    """Fit spherical mixtures to groups of rows x by EM; the others are fields of ``Problem`` in ``ragged.cpp``.

    Raises:
        IndexError: an index is negative, or not less than the number of groups.
    """
    num_groups, _limit, num_components, num_iters = others[:4]
    if len(x) and not 0 <= int(index.min()) <= int(index.max()) < num_groups:
        raise IndexError(f"index has values in [{index.min()}, {index.max()}]; they must be in [0, {num_groups - 1}]")
    parts = [part.contiguous() if isinstance(part, Tensor) else part for part in (x, index, *others)]
    library, _ = load("ragged.cpp")
    run = getattr(library, f"em_lightning_fit_{_REALS[x.dtype]}")
    run(structure(*x.shape, *parts), _num_threads(x.numel() * num_components * (num_iters + 1)))


@_operator("em_lightning::cholesky")
def cholesky(matrix: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """Return Cholesky factors (..., D, D), with pivots of at least ``pivots`` (..., D), and their inverses."""
    return _call("cholesky", [matrix.numel(), matrix.shape[-1]], [matrix, pivots], like=[matrix, matrix])


@_operator(
    "em_lightning::cholesky_gradient",
    schema="(Tensor matrix, Tensor pivots, Tensor[] factors, Tensor[] grads) -> Tensor[]",
)
def cholesky_gradient(matrix: Tensor, pivots: Tensor, factors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return one gradient, with respect to the symmetric matrices, in a list."""
    sizes = [matrix.numel(), matrix.shape[-1]]
    return [*_call("cholesky_gradient", sizes, [matrix, pivots, *factors, *grads], like=[matrix])]


_SUMS = "Tensor mass, Tensor first, Tensor second, Tensor before, Tensor floor, str kind"


@_operator("em_lightning::m_step", schema=f"({_SUMS}) -> {_THREE}")
def m_step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-weights, means and covariances, without a prior; covariances have the shape of those ``before``."""
    mass, first, second, before, floor, kind = arguments
    return _call("m_step", [*first.shape, _KINDS[kind]], [mass, first, second, floor], like=[mass, first, before])


@_operator("em_lightning::m_step_gradient", schema=f"({_SUMS}, Tensor[] parameters, Tensor[] grads) -> {_THREE}")
def m_step_gradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to mass, first and second sums."""
    mass, first, second, _before, floor, kind, parameters, grads = arguments
    sums = [mass, first, second]
    return _call("m_step_gradient", [*first.shape, _KINDS[kind]], [*sums, floor, *parameters, *grads], like=sums)


cholesky.register_fake(lambda matrix, pivots: _empty([matrix, matrix]))
cholesky_gradient.register_fake(lambda matrix, *others: [*_empty([matrix])])
m_step.register_fake(lambda mass, first, second, before, *others: _empty([mass, first, before]))
m_step_gradient.register_fake(lambda mass, first, second, *others: _empty([mass, first, second]))


def _empty(like: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in like)


def _call(name: str, sizes: list[int], inputs: list[Tensor], like: list[Tensor]) -> Any:
    """Return the results of a C++ function, tensors of the shapes of ``like``."""
    results, inputs = _empty(like), [part.contiguous() for part in inputs]
    library, _ = load(f"{name.removesuffix('_gradient')}.cpp")
    getattr(library, f"em_lightning_{name}")(structure(*sizes, *inputs, *results))
    return results


def _variant(kind: str, num_features: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the preprocessor definitions for the compiler; only full covariances have one library per D."""
    return f"-DREAL={_REALS[dtype]}", f"-DKIND={_KINDS[kind]}", f"-DFEATURES={num_features if kind == 'full' else 0}"


@torch.compiler.assume_constant_result
def _is_available(*source: str, required: bool = False) -> bool:
    library, message = load(*source)
    if library is None and required:
        raise RuntimeError(f"the native backend cannot be compiled: {message}")
    return library is not None
