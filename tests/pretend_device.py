"""A device named ``pretend``: its tensors hold CPU data, and the cost of every operation on a GPU is recorded.

Importing this module registers the device for the whole process, so tests import it in a process of its own. A record
counts the kernel launches, the synchronizations (the host waits for a value), the copies of data from the host, and
the operations that mix tensors of both devices, which a GPU refuses.
"""

import collections
import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # reads torch.Generator, which is replaced below
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import em_lightning

PACKAGE = str(Path(em_lightning.__file__).parent)

# Operations that launch nothing: views, and allocations.
VIEWS = set(
    "view expand permute transpose t slice select unsqueeze squeeze as_strided split split_with_sizes unbind detach "
    "_unsafe_view diagonal _reshape_alias lift_fresh unfold chunk movedim detach_ squeeze_ unsqueeze_ set_ alias "
    "empty empty_like new_empty empty_strided new_empty_strided resize_".split()
)
# Operations whose result has a size that depends on the data, or whose library call checks its result on the host.
WAITING = set(
    "nonzero masked_select _unique2 unique_dim unique_consecutive repeat_interleave bincount _linalg_svd "
    "_linalg_eigh linalg_lstsq linalg_pinv".split()
)
TO_HOST = {"_local_scalar_dense", "item", "equal", "is_nonzero"}


class Backend(backend_registration._DummyBackendModule):
    """The functions of the device's module that autocast needs."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=Backend())
DEVICE = torch.device("pretend", 0)
torch.__future__.set_overwrite_module_params_on_conversion(True)


class Record:
    """Counts of launches, synchronizations, copies and mixed operations since the last reset."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.launches = 0
        self.operations = collections.Counter()
        self.synchronizations = collections.Counter()
        self.copies = collections.Counter()
        self.mixed = collections.Counter()


record = Record()


def place():
    """Return the innermost line of the package on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return f"{file[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the package"


class OnDevice(torch.Tensor):
    """A tensor of the device that holds a CPU tensor."""

    @staticmethod
    def __new__(cls, data):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=DEVICE,
        )
        tensor.data_on_host = data
        return tensor

    def __repr__(self):
        return f"OnDevice({self.data_on_host})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def is_device(value):
    return isinstance(value, torch.device) and value.type == "pretend"


def run(function, args, kwargs):
    """Run an operation on the CPU data of its arguments, and record it."""
    name = function._schema.name.split("::")[1]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    on_device = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    on_host = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice)]
    to_host = name in TO_HOST
    if name == "_to_copy" and kwargs.get("device") is not None:
        to_host = on_device and torch.device(kwargs["device"]).type == "cpu"
        if on_host and is_device(torch.device(kwargs["device"])):
            record.copies[place()] += 1
    elif name == "copy_" and on_device and on_host:
        if isinstance(args[0], OnDevice):
            record.copies[place()] += 1
        else:
            to_host = True
    elif on_device:
        indexing = name.startswith(("index", "_index_put")) and isinstance(args[0], OnDevice)
        for leaf in on_host:
            if indexing and leaf.ndim:
                record.copies[place()] += 1
            elif leaf.ndim:
                record.mixed[f"{name} of a tensor {tuple(leaf.shape)} on the CPU, {place()}"] += 1
    boolean = name.startswith(("index", "_index_put")) and any(
        isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in pytree.tree_leaves(args[1])
    )
    if on_device and (to_host or boolean or name in WAITING):
        record.synchronizations[f"{name}, {place()}"] += 1
    originals = {id(leaf.data_on_host): leaf for leaf in on_device}
    plain = [
        leaf.data_on_host if isinstance(leaf, OnDevice) else torch.device("cpu") if is_device(leaf) else leaf
        for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(plain, spec)
    results = function(*args, **kwargs)
    if to_host:
        return results
    if name not in VIEWS:
        record.launches += 1
        record.operations[f"{name}, {place()}"] += 1

    def enclose(result):
        if not isinstance(result, torch.Tensor):
            return result
        return originals[id(result)] if id(result) in originals else OnDevice(result)

    return pytree.tree_map(enclose, results)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs or {}))
        mine = any(isinstance(leaf, OnDevice) or is_device(leaf) for leaf in leaves)
        return run(function, args, kwargs or {}) if mine else function(*args, **(kwargs or {}))


def _made_on_host(factory):
    """Wrap a function that makes a tensor from Python numbers, to record the copy to the device."""

    def make(*args, **kwargs):
        device = kwargs.get("device")
        if device is None and args and isinstance(args[0], OnDevice):
            if factory is torch_as_tensor:
                return args[0].to(kwargs.get("dtype") or args[0].dtype)
            device, dtype = DEVICE, kwargs.pop("dtype", None) or args[0].dtype
            args, kwargs = args[1:], {**kwargs, "dtype": dtype}
        if device is None or not is_device(torch.device(device)):
            return factory(*args, **kwargs)
        record.copies[place()] += 1
        return OnDevice(torch.tensor_on_host(*args, **{**kwargs, "device": "cpu"}))

    return make


torch_as_tensor = torch.as_tensor


@contextlib.contextmanager
def pretend():
    """Run a block in which the device exists; yield the record."""
    record.reset()
    torch.tensor_on_host = torch.tensor
    generator = torch.Generator
    with (
        mock.patch("torch.tensor", _made_on_host(torch.tensor)),
        mock.patch("torch.as_tensor", _made_on_host(torch.as_tensor)),
        mock.patch("torch.Tensor.new_tensor", _made_on_host(torch.Tensor.new_tensor)),
        mock.patch("torch.Generator", lambda device="cpu": generator("cpu")),
        _Mode(),
    ):
        yield record


def on_host(tensor):
    """Return the CPU data of a tensor of either device."""
    return tensor.data_on_host if isinstance(tensor, OnDevice) else tensor
