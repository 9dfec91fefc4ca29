"""The E-step of Gaussian mixtures in C++ on the CPU (``native.cpp``), compiled on demand and cached."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from em_lightning.mixture.cholesky import symmetric

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_REALS = {torch.float32: "float", torch.float64: "double"}
_KINDS = {"full": 0, "diagonal": 1, "spherical": 2}
# The kernel for full covariances is written out in registers, of which there are too few for more features.
_MOST_FEATURES = 8
# Sets of fewer numbers are left to the reference, which needs no compiler and is as fast for them.
_FEWEST_NUMBERS = 2**12

_chosen = "auto"


class use_backend:
    """Choose the backend of the E-step, for good or inside a ``with`` block.

    Args:
        name: ``"auto"`` takes the native backend where it fits and a compiler is found, ``"reference"`` never,
            ``"native"`` wherever it fits, however few the points are.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the native backend cannot be compiled; the message is the compiler's.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in ("auto", "reference", "native"):
            raise ValueError(f"name={name!r} must be 'auto', 'reference' or 'native'")
        if name == "native":
            _require("spherical", 0, torch.float32)
        self.before, _chosen = _chosen, name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self.before


def serves(x: Tensor, family: Any) -> bool:
    """Return whether the native backend computes the E-step of points (B, D, N) under a covariance type."""
    kind = getattr(family, "whitening", None)
    if _chosen == "reference" or kind is None or x.device.type != "cpu" or x.dtype not in _REALS:
        return False
    if torch.compiler.is_compiling() or (kind == "full" and x.shape[1] > _MOST_FEATURES):
        return False
    if _chosen == "auto" and x.numel() < _FEWEST_NUMBERS:
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # functorch's tensors and those of a tracer have no memory of their own
        return False
    if _chosen == "native":
        _require(kind, x.shape[1], x.dtype)
    return _load(*_variant(kind, x.shape[1], x.dtype))[0] is not None


class WhitenedSums(torch.autograd.Function):
    r"""Return ``sum_n w_n r_nk [1, y, s(y)]`` (B, K, M) and the log-likelihood (B,), with ``y = W_k (z_n - mu_k)``.

    ``s(y)`` holds the products ``y_i y_j`` for ``j <= i``, the squares, or the squared norm. The sums are meant to be
    mapped back to moments about the origin, which depend on ``mu`` and ``W`` through the responsibilities only; so do
    the derivatives of the sums given here. With the derivative :math:`a_{nk}` of a sum in ``w_n r_nk`` and ``l`` of the
    log-likelihood, that of the joint log-density is
    :math:`s_{nk} = w_n r_{nk} (a_{nk} - \sum_j r_{nj} a_{nj} + l)`, and the sums of ``[1, y, s(y)]`` under ``s`` in
    place of ``w r`` give the derivatives of all parameters. The backward pass computes the responsibilities again.

    Args of ``apply``:
        x: points (B, D, N) in float32 or float64, which is the precision of all that is done per point.
        weights: (B, N) in float64, or ``None``.
        means: (B, K, D), in the coordinates ``z = (x - center) / unit``.
        inverse: ``W`` (B, K, D, D) lower triangular, (B, K, D) or (B, K, 1).
        peak: (B, K), the log-densities of the components at their means.
        scale: the inverse of ``W``.
        center: (B, D).
        unit: (B,).
        kind: ``"full"``, ``"diagonal"`` or ``"spherical"``.
        with_log_likelihood: zeros are returned otherwise.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.kind, with_log_likelihood = arguments
        ctx.save_for_backward(*tensors)
        sums, log_likelihood, *_ = _run(ctx.kind, tensors, with_log_likelihood)
        if not with_log_likelihood:
            ctx.mark_non_differentiable(log_likelihood)
        return sums, log_likelihood

    @staticmethod
    def backward(ctx: Any, of_sums: Tensor, of_log_likelihood: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        rest = (None,) * 5
        if torch.is_grad_enabled():  # for second derivatives
            results = _in_torch(ctx.kind, *tensors)
            inputs = [tensor for tensor, needed in zip(tensors, wanted, strict=False) if needed]
            outer = (of_sums, of_log_likelihood)
            found = iter(torch.autograd.grad(results, inputs, outer, create_graph=True, allow_unused=True))
            return *(next(found) if needed else None for needed in wanted[:5]), *rest
        _, _, means, inverse, _, scale, *_ = tensors
        sums, _, of_x, of_weights = _run(ctx.kind, tensors, False, (of_sums, of_log_likelihood), wanted)
        features = means.shape[-1]
        mass, first, second = sums.tensor_split([1, 1 + features], -1)
        if ctx.kind == "full":
            of_means = (inverse.mT @ first.unsqueeze(-1)).squeeze(-1)
            of_inverse = -(symmetric(second, features) @ scale.mT)
        else:
            of_means, of_inverse = inverse * first, -second * scale
        return of_x, of_weights, of_means, of_inverse, mass.squeeze(-1), *rest


def _in_torch(
    kind: str, x: Tensor, weights: Tensor | None, means: Tensor, inverse: Tensor, peak: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums and the log-likelihood of :class:`WhitenedSums`, in operations that have every derivative."""
    _, center, unit = rest
    z = ((x.to(center.dtype) - center.unsqueeze(-1)) / unit[:, None, None]).unsqueeze(1)

    def whitened(inverse: Tensor, means: Tensor) -> Tensor:
        difference = z - means.unsqueeze(-1)
        return inverse @ difference if kind == "full" else inverse.unsqueeze(-1) * difference

    joint = peak.unsqueeze(-1) - 0.5 * whitened(inverse, means).square().sum(2)
    responsibilities, log_density = joint.softmax(1), joint.logsumexp(1)
    if weights is not None:
        responsibilities, log_density = responsibilities * weights.unsqueeze(1), log_density * weights
    y = whitened(inverse.detach(), means.detach())
    second = y.square() if kind == "diagonal" else y.square().sum(2, keepdim=True)
    if kind == "full":
        i, j = torch.tril_indices(y.shape[2], y.shape[2])
        second = y[:, :, i] * y[:, :, j]
    monomials = torch.cat([torch.ones_like(y[:, :, :1]), y, second], 2)
    return (monomials @ responsibilities.unsqueeze(-1)).squeeze(-1), log_density.sum(-1)


class _Problem(ctypes.Structure):
    """The structure of the same name in ``native.cpp``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("sets", "components", "features", "items")]
    _fields_ += [("x", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("set_stride", "feature_stride", "item_stride")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("unit", "weights", "means", "inverse", "peak")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("grads", "grad_log_likelihood", "sums", "log_likelihood")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("grad_x", "grad_weights")]


def _run(
    kind: str,
    tensors: Any,
    with_log_likelihood: bool,
    grads: tuple[Tensor, ...] = (),
    wanted: tuple[bool, ...] = (False, False),
) -> tuple[Any, ...]:
    """Return sums, log-likelihood, and in the backward pass the gradients of points and weights."""
    x, weights, means, inverse, peak, _, center, unit = tensors
    sets, features, items = x.shape
    components = means.shape[1]
    # Differences of points and means need no centered points. The unit of the kernel and the entries of W are normal
    # numbers in the dtype of the points, and so are squares of differences.
    info = torch.finfo(x.dtype)
    own_unit = unit.clamp(info.tiny, 1.0 / info.tiny)
    ratio, bound = own_unit / unit, info.max**0.4
    means = means / ratio[:, None, None] + (center / own_unit.unsqueeze(-1)).unsqueeze(1)
    inverse = (inverse * ratio.reshape(-1, *[1] * (inverse.ndim - 1))).clamp(-bound, bound)
    second = {"full": features * (features + 1) // 2, "diagonal": features, "spherical": 1}[kind]
    sums = means.new_empty(sets, components, 1 + features + second)
    log_likelihood = means.new_zeros(sets)
    of_x = x.new_empty(x.shape) if wanted[0] else None
    of_weights = means.new_empty(sets, items) if wanted[1] else None
    given = [own_unit.reciprocal(), weights, means, inverse, peak, *(grads or (None, None))]
    given = [None if part is None else part.contiguous() for part in given]
    made = [sums, log_likelihood if with_log_likelihood else None, of_x, of_weights]
    pointers = [None if part is None else part.data_ptr() for part in (*given, *made)]
    problem = _Problem(sets, components, features, items, x.data_ptr(), *x.stride(), *pointers)
    library, _ = _load(*_variant(kind, features, x.dtype))
    library.em_lightning_e_step(ctypes.byref(problem), ctypes.c_int64(torch.get_num_threads()))
    return sums, log_likelihood, of_x, of_weights


def _variant(kind: str, features: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the definitions under which the source is compiled."""
    own = features if kind == "full" else 0
    return f"-DREAL={_REALS[dtype]}", f"-DKIND={_KINDS[kind]}", f"-DFEATURES={own}"


def _require(kind: str, features: int, dtype: torch.dtype) -> None:
    library, message = _load(*_variant(kind, features, dtype))
    if library is None:
        raise RuntimeError(f"the native backend cannot be compiled: {message}")


@functools.cache
def _load(*definitions: str) -> tuple[Any, str]:
    """Return the compiled library, or ``None`` and the reason why there is none."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, "no g++ was found on the PATH"
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        cpu = Path("/proc/cpuinfo")
        flags = next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
        key = "\n".join([_SOURCE.read_text(), version, flags, platform.machine(), *_FLAGS, *definitions])
        target = _folder() / f"e_step_{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        if not target.exists():
            # Under a name of its own first: several processes may compile at once.
            handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
            os.close(handle)
            try:
                command = [compiler, *_FLAGS, *definitions, str(_SOURCE), "-o", name]
                subprocess.run(command, capture_output=True, text=True, check=True)
                os.replace(name, target)
            finally:
                Path(name).unlink(missing_ok=True)
        return ctypes.CDLL(str(target)), ""
    except subprocess.CalledProcessError as error:
        return None, error.stderr
    except OSError as error:
        return None, str(error)


@functools.cache
def _folder() -> Path:
    """Return the folder of compiled libraries: in the user's cache, or for this process only if that is read-only."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "em_lightning"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="em_lightning_"))
