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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from em_lightning.mixture.backends.reference import have_memory

_SOURCES = [Path(__file__).with_name(name) for name in ("native.cpp", "native_components.h")]
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_REALS = {torch.float32: "float", torch.float64: "double"}
_KINDS = {"full": 0, "diagonal": 1, "spherical": 2}
# The unrolled code for full covariances runs out of registers for more features.
_MOST_FEATURES = 8
# The reference takes less than a millisecond for fewer numbers, and needs no compiler.
_FEWEST_NUMBERS = 2**12
# Work of about 0.1 ms, the cost of starting a thread.
_NUMBERS_PER_THREAD = 2**17

_chosen = "auto"


class use_backend:
    """Choose the backend of the E-step, for good or inside a ``with`` block.

    Args:
        name: ``"auto"`` takes the native backend for all but small sets if there is a compiler, ``"native"`` for all
            sets that it supports, ``"reference"`` for none.

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

    def __exit__(self, *error: object) -> None:
        global _chosen
        _chosen = self.before


def serves(x: Tensor, family: Any, parameters: Sequence[Tensor] = ()) -> bool:
    """Return whether the native backend computes the E-step of points (B, D, N) under a family of densities."""
    kind = getattr(family, "whitening", None)
    if _chosen == "reference" or kind is None or x.device.type != "cpu" or x.dtype not in _REALS:
        return False
    if torch.compiler.is_compiling() or (kind == "full" and x.shape[1] > _MOST_FEATURES):
        return False
    if _chosen == "auto" and x.numel() < _FEWEST_NUMBERS:
        return False
    if forward_ad.unpack_dual(x).tangent is not None:
        return False
    if not have_memory(x, *parameters):
        return False
    if _chosen == "native":
        _require(kind, x.shape[1], x.dtype)
    return _load(*_variant(kind, x.shape[1], x.dtype))[0] is not None


class _Fused(torch.autograd.Function):
    r"""A result of the kernel; the backward pass computes the responsibilities again.

    The joint log-density is :math:`g_{nk} = peak_k - |W_k (z_n - \mu_k)|^2 / 2` and ``r`` its softmax over components.
    With the derivative :math:`a_{nk}` of a sum in ``w_n r_nk`` and ``l_n`` of the log-density in units of the weight,
    that of ``g`` is :math:`w_n r_{nk} (a_{nk} - \sum_j r_{nj} a_{nj} + l_n)`.

    Args of ``apply``:
        x: points (B, D, N) in float32 or float64, which is the precision of all that is done per point.
        weights: (B, N) in float64, or ``None``.
        means: (B, K, D), in the coordinates ``z = (x - center) / unit``.
        inverse: ``W`` (B, K, D, D) lower triangular, (B, K, D) or (B, K, 1).
        peak: (B, K), the log-densities of the components at their means.
        scale: the inverse of ``W``, without gradient.
        center: (B, D), without gradient.
        unit: (B,), a power of two, without gradient.
        family: the covariance type.
    """

    @staticmethod
    def _in_torch(family: Any, *tensors: Any) -> Any:
        """Return the result by operations that have every derivative."""

    @classmethod
    def _differentiate(cls, ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients of all arguments for those of the sums and of each log-density."""
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # for second derivatives
            # Gradients at the tensors themselves would include the paths from x through the parameters.
            aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
            inputs: Any = [tensor for tensor, needed in zip(aliases, wanted, strict=False) if needed]
            results = cls._in_torch(ctx.family, *aliases)
            found = iter(torch.autograd.grad(results, inputs, grads, create_graph=True))
            return tuple(next(found) if needed else None for needed in wanted)
        x, _, means, inverse, *_ = tensors
        outer, sums = grads[-1], grads[0] if len(grads) > 1 else None
        outer = outer.reshape(len(x), -1)
        own = means.new_empty(*means.shape[:2], 1 + means.shape[-1] + inverse[0, 0].numel())
        of_x = x.new_empty(x.shape) if wanted[0] else None
        of_weights = means.new_empty(outer.expand(-1, x.shape[-1]).shape) if wanted[1] else None
        _run(ctx.family.whitening, tensors, sums=own, grads=sums, outer=outer, grad_x=of_x, grad_weights=of_weights)
        of_peak, of_means, of_inverse = own.tensor_split([1, 1 + means.shape[-1]], -1)
        nothing = [None] * (len(wanted) - 5)
        return of_x, of_weights, of_means, of_inverse.reshape(inverse.shape), of_peak.squeeze(-1), *nothing


class FusedSums(_Fused):
    """Return ``sum_n w_n r_nk phi(z_n)`` (B, K, F) and the log-likelihood (B,); zeros where it is not wanted."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.family, with_log_likelihood = arguments
        ctx.save_for_backward(*tensors)
        means = tensors[2]
        size = ctx.family.second_degree(means[:1, :1].mT).shape[1]
        sums = means.new_empty(*means.shape[:2], 1 + means.shape[-1] + size)
        log_likelihood = means.new_zeros(len(means))
        _run(ctx.family.whitening, tensors, sums=sums, log_likelihood=log_likelihood if with_log_likelihood else None)
        if not with_log_likelihood:
            ctx.mark_non_differentiable(log_likelihood)
        return sums, log_likelihood

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return FusedSums._differentiate(ctx, grads)

    @staticmethod
    def _in_torch(family: Any, x: Tensor, weights: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        z, joint = _joint_in_torch(family, x, *parameters)
        responsibilities, log_density = joint.softmax(1), joint.logsumexp(1)
        if weights is not None:
            responsibilities, log_density = responsibilities * weights.unsqueeze(1), log_density * weights
        return responsibilities @ family.features(z).mT, log_density.sum(-1)


class FusedDensity(_Fused):
    """Return ``log p(z_n)`` (B, N) in float64; the weights are ``None``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.family = arguments
        ctx.save_for_backward(*tensors)
        density = tensors[2].new_empty(tensors[0][:, 0].shape)
        _run(ctx.family.whitening, tensors, log_density=density)
        return density

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return FusedDensity._differentiate(ctx, grads)

    @staticmethod
    def _in_torch(family: Any, x: Tensor, _: None, *parameters: Tensor) -> Tensor:
        return _joint_in_torch(family, x, *parameters)[1].logsumexp(1)


def _joint_in_torch(
    family: Any, x: Tensor, means: Tensor, inverse: Tensor, peak: Tensor, *frame: Tensor
) -> tuple[Tensor, Tensor]:
    """Return coordinates and joint log-densities (B, K, N)."""
    _, center, unit = frame
    z = (x.to(center.dtype) - center.unsqueeze(-1)) / unit[:, None, None]
    difference = z.unsqueeze(1) - means.unsqueeze(-1)
    y = inverse @ difference if family.whitening == "full" else inverse.unsqueeze(-1) * difference
    return z, peak.unsqueeze(-1) - 0.5 * y.square().sum(2)


class _Problem(ctypes.Structure):
    """The structure of the same name in ``native.cpp``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("sets", "components", "features", "items")]
    _fields_ += [("x", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("set_stride", "feature_stride", "item_stride")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("weights", "means", "inverse", "peak", "scale")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("center", "unit", "grads", "outer")]
    _fields_ += [(name, ctypes.c_int64) for name in ("outer_set_stride", "outer_item_stride")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("sums", "log_likelihood", "log_density")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("grad_x", "grad_weights")]


def _run(kind: str, tensors: Any, outer: Tensor | None = None, **others: Tensor | None) -> None:
    """Run the kernel on the tensors of :class:`_Fused`, and others by their names in ``_Problem``."""
    x, means = tensors[0], tensors[2]
    names = ("weights", "means", "inverse", "peak", "scale", "center", "unit")
    others.update(zip(names, tensors[1:], strict=True))
    given = {name: part if part is None else part.contiguous() for name, part in others.items()}
    problem = _Problem(
        len(x),
        *means.shape[1:],
        x.shape[-1],
        x.data_ptr(),
        *x.stride(),
        **{name: part if part is None else part.data_ptr() for name, part in given.items()},
    )
    if outer is not None:
        outer = outer.expand(-1, x.shape[-1])
        problem.outer, problem.outer_set_stride, problem.outer_item_stride = outer.data_ptr(), *outer.stride()
    library, _ = _load(*_variant(kind, x.shape[1], x.dtype))
    threads = min(torch.get_num_threads(), 1 + x.numel() * means.shape[1] // _NUMBERS_PER_THREAD)
    library.em_lightning_e_step(ctypes.byref(problem), ctypes.c_int64(threads))


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
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        features = next((line for line in lines if line.startswith("flags")), platform.machine())
        sources = (source.read_text() for source in _SOURCES)
        key = "\n".join([*sources, version, features, *_FLAGS, *definitions])
        target = _folder() / f"e_step_{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        if not target.exists():
            # Under a name of its own first: several processes may compile at once.
            handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
            os.close(handle)
            try:
                command = [compiler, *_FLAGS, *definitions, str(_SOURCES[0]), "-o", name]
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
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "em_lightning")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="em_lightning_"))
