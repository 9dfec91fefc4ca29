"""Atomic checkpoints, checks that all ranks agree and can connect, and a checkpoint when a signal ends the run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import signal
import socket
import sys
import threading
import traceback
import zipfile
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DistributedSampler

from em_lightning.distributed import is_distributed
from em_lightning.files import remove_abandoned, write_whole

_PACKAGES = ("em_lightning", "torch", "lightning", "pytorch_lightning", "numpy")
_OPTIONS = ("max_epochs", "max_steps", "accumulate_grad_batches", "precision", "check_val_every_n_epoch")
_PATHS = ("_dir", "dirpath", "ckpt_path", "root", "folder")  # ends of names of paths, which may differ between ranks
_REMEDY = "Give all hosts the same command, package versions, data and checkpoint, for instance in a shared folder"
_CAUSES = (
    "Look for an earlier error of another rank; a host may be gone, slower than the timeout of the strategy, have the "
    "NODE_RANK of another host, or be unreachable. If a host resolves its own name to 127.0.1.1, set "
    "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network interface, such as eth0. If torchrun has restarted the "
    "ranks, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. The same command with ckpt_path=last resumes the run"
)


def check_archive(path: str | PathLike[str]) -> None:
    """Raise FileNotFoundError or ValueError unless a file is an uncompressed zip archive with matching CRCs."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise ValueError("its members are compressed")  # a small file could fill the memory
            damaged = archive.testzip()  # torch.load checks no CRC
        if damaged is not None:
            raise ValueError(f"CRC mismatch in {damaged!r}")
    except Exception as error:  # zipfile raises errors of many types on altered files
        raise _invalid(path, f"{path.stat().st_size:,} bytes, {error}") from error


def read_checkpoint(path: str | PathLike[str], weights_only: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint on the CPU, with its CRCs checked.

    With ``weights_only`` it may contain tensors, plain values and the classes in ``torch.serialization.safe_globals``
    only. With ``weights_only=False`` loading may run code that the file contains.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or altered, contains other classes, or holds no dictionary.
    """
    check_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # pickle and torch raise errors of many types on altered files
        refused = weights_only and isinstance(error, UnpicklingError)
        raise (_untrusted(path) if refused else _invalid(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise _invalid(path, f"it contains a {type(checkpoint).__name__}, not a dictionary")
    return checkpoint


def _untrusted(path: str | PathLike[str]) -> ValueError:
    names = ""  # torch's own message names only one class
    with contextlib.suppress(Exception):  # pickle and torch raise errors of many types on altered files
        names = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:5])
    if not names:
        return _invalid(path, "its pickle is damaged, or needs weights_only=False")
    return ValueError(
        f"{path}: invalid checkpoint (it contains classes that could run code: {names}); "
        f"only if you trust its author, for instance if these are hyperparameters of your own, allow the classes by "
        f"torch.serialization.safe_globals, or load it with weights_only=False"
    )


def _invalid(path: str | PathLike[str], reason: object) -> ValueError:
    reason = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return ValueError(f"{path}: invalid checkpoint ({reason}); use another one, or save it again with torch.save")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plug-in that writes checkpoints atomically and reads them with :func:`read_checkpoint`.

    Lightning itself writes to a temporary folder and moves the file; between file systems it copies the file, and
    a kill or a full disk leaves a truncated one. Recipes use this plug-in; a Trainer takes it in ``plugins``. URLs such
    as ``s3://`` and ``weights_only=False`` are handled by Lightning.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, f"{folder}/last.ckpt")
        ...     print(os.listdir(folder), AtomicCheckpointIO().load_checkpoint(f"{folder}/last.ckpt"))
        ['last.ckpt'] {'state_dict': {}}
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_whole(path, buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        if weights_only is False or "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        remove_abandoned(Path(path))  # left by a run that was killed in its last write
        return read_checkpoint(path)


def check_agreement(facts: Mapping[str, Any], remedy: str = _REMEDY) -> None:
    """Raise ValueError on every rank unless all ranks pass equal facts; must be called on all ranks.

    ``facts`` maps names to values. Values that JSON cannot represent are compared by their class. The message has the
    name and values of a fact that differs, up to four hosts and ranks that differ, and the ``remedy`` of rank 0.
    """
    if not is_distributed():
        return
    values = {name: json.dumps(facts[name], sort_keys=True, default=lambda x: type(x).__name__) for name in facts}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (socket.gethostname(), values, remedy))
    hosts, values_by_rank, remedies = zip(*gathered, strict=True)
    places = [f"on host {host} (rank {rank})" for rank, host in enumerate(hosts)]
    for name in dict.fromkeys(name for of_rank in values_by_rank for name in of_rank):
        found = [of_rank.get(name, "missing") for of_rank in values_by_rank]
        common = Counter(found).most_common(1)[0][0]  # in a tie, the value of the lowest rank
        others = [f"{value} {place}" for value, place in zip(found, places, strict=True) if value != common]
        if others:
            raise ValueError(
                f"the ranks must have the same {name}: it is {'; '.join(others[:4])}, but {common} "
                f"{places[found.index(common)]}. {remedies[0]}"
            )


class RankAgreement(lightning.Callback):
    """Checks before training that all ranks have the same versions, arguments, checkpoint, batches and rows.

    A difference raises ValueError on every rank, with its name, values and hosts. ``EMModule`` includes the checks.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not is_distributed():
            return
        facts = {f"version of {name}": sys.modules[name].__version__ for name in _PACKAGES if name in sys.modules}
        sources = (path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
        facts["source of em_lightning"] = _hash(b"".join(sources))
        facts |= {"seed": os.environ.get("PL_GLOBAL_SEED"), "class of the model": type(pl_module).__name__}
        facts |= _leaves(dict(pl_module.hparams), "model")
        for field in dataclasses.fields(trainer.datamodule) if dataclasses.is_dataclass(trainer.datamodule) else ():
            facts |= _leaves(getattr(trainer.datamodule, field.name), f"data.{field.name}")
        facts |= {f"trainer.{name}": getattr(trainer, name) for name in _OPTIONS}
        facts["checkpoint callbacks"] = [callback.state_key for callback in trainer.checkpoint_callbacks]
        for callback in trainer.callbacks:
            if hasattr(callback, "parser") and hasattr(callback, "config"):  # the SaveConfigCallback of a LightningCLI
                config = callback.parser.dump(callback.config, format="json", skip_none=False)
                facts |= _leaves(json.loads(config), "argument")
            elif stage == "fit" and type(callback).__module__.startswith("em_lightning."):
                for name, value in vars(callback).items():
                    if isinstance(value, (bool, int, float, str, dict)) and not name.startswith("_"):
                        facts |= _leaves(value, f"{type(callback).__name__}.{name}")
        check_agreement(facts)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        path = Path(trainer.ckpt_path or "none")  # "none" stands for a fit without a checkpoint in the comparison
        if is_distributed():
            found = f"{path.name} with hash {_hash(path.read_bytes())}" if path.is_file() else str(path)
            source = f"{path} from host {socket.gethostname()} (rank 0)" if path.is_file() else "the checkpoint"
            check_agreement({"checkpoint to resume from": found}, f"Copy {source} to the same place on all hosts")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        loader = trainer.train_dataloader
        facts: dict[str, Any] = {"number of batches": [trainer.num_training_batches, trainer.num_val_batches]}
        if is_distributed() and hasattr(loader, "table"):  # a loader of em_lightning.data
            facts["rows"] = [len(loader.table), _hash(loader.sample(256).points.cpu().numpy())]  # few, to be fast
        elif isinstance(getattr(loader, "sampler", None), DistributedSampler):
            facts["number of items"] = len(loader.dataset)
        check_agreement(facts)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if message := connection_error(exception, getattr(self, "dirpath", None)):  # RunCheckpoint has one
            exception.args = (f"{exception}\n{message}",)  # the traceback ends with it


class WatchedDDPStrategy(DDPStrategy):
    """A ``DDPStrategy`` that prints what it waits for, and ends the process if the ranks do not connect in time.

    If a rank published an address that only its own machine can reach, gloo waits silently for five times ``timeout``,
    and without limit in a second connection, which Lightning opens for ``prepare_data``. Here one timer ends a process
    that is still connecting after twice ``timeout``; later communication fails after ``timeout``. The default of two
    minutes, not Lightning's 30, was chosen without measurements. Further arguments are those of ``DDPStrategy``.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=2), **options: Any) -> None:
        super().__init__(timeout=timeout, **options)
        # One timeout to reach the main address, as in PyTorch, and one to connect each rank with each other.
        self.limit = 2 * timeout.total_seconds()

    def setup_distributed(self) -> None:
        environment: Any = self.cluster_environment
        how = f"through {environment.main_address}:{environment.main_port} within {self.limit:g} seconds"
        me = f"host {socket.gethostname()}, rank {self.node_rank * self.num_processes + self.local_rank}"
        thread = threading.get_ident()
        if self.num_nodes > 1 and self.local_rank == 0:
            print(f"{me}: connecting {self.num_nodes} hosts {how}{_loopback_warning()}", file=sys.stderr, flush=True)

        def end() -> None:
            running = {frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._current_frames().get(thread))}
            if running & {"init_process_group", "new_group"}:
                print(f"em-lightning: {me}: a rank did not connect {how}. {_CAUSES}", file=sys.stderr, flush=True)
                os._exit(2)  # no exception can end the call of gloo

        watch = threading.Timer(self.limit, end)
        watch.daemon = True
        watch.start()
        try:  # after success the timer keeps running, because new_group, the second connection, can wait forever
            super().setup_distributed()
        except BaseException:
            watch.cancel()
            raise


def _loopback_warning() -> str:
    """Return a warning if the other hosts cannot reach the address that PyTorch chooses for this one."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:  # PyTorch then uses the loopback interface
        address = "127.0.0.1"
    if not address.startswith("127.") or {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & os.environ.keys():
        return ""
    remedy = "set GLOO_SOCKET_IFNAME (GPUs: NCCL_SOCKET_IFNAME) to the network interface, such as eth0"
    return f". WARNING: this host resolves its own name to {address}, where others cannot reach it: {remedy}"


def connection_error(error: BaseException, folder: str | None = None) -> str | None:
    """Return a message for an error of the communication between ranks in a run, or None for any other error."""
    words, frames = str(error), traceback.extract_tb(error.__traceback__)
    in_collective = isinstance(error, RuntimeError) and "/torch/distributed/" in Path(frames[-1].filename).as_posix()
    if not (in_collective or isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words):
        return None
    reason = " ".join(words.split("\n")[0].split())[:300]
    rank = f", rank {dist.get_rank()}" if dist.is_initialized() else ""
    place = f" in {folder}" if folder else ""  # completes "resumes the run", the end of _CAUSES
    return f"host {socket.gethostname()}{rank}: lost the other ranks ({reason}). {_CAUSES}{place}"


def _hash(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _leaves(value: Any, name: str) -> dict[str, Any]:
    """Return the values in nested mappings and lists by their dotted names, without strings that are paths."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, each in pairs for key, leaf in _leaves(each, f"{name}.{part}").items()}
    is_path = isinstance(value, str) and (name.endswith(_PATHS) or not {"/", os.sep}.isdisjoint(value))
    return {} if is_path else {name: value}


class RunCheckpoint(RankAgreement, ModelCheckpoint):
    """A ``ModelCheckpoint`` that also writes ``last.ckpt`` at the end of a fit, and when a signal ends the run.

    SIGINT, SIGTERM and SIGUSR1 take effect after the current training batch, on all ranks at once: the checkpoint is
    written, and the process exits with code 1 for SIGINT, else 128 plus the signal's number. The same signal again ends
    it at once. Under SLURM, SIGUSR1 runs Lightning's handler, which requeues the job. Arguments: ``ModelCheckpoint``'s.
    """

    _received = 0  # number of a signal, 0 for none
    _handlers: Mapping[int, Any] = {}  # by signal: the handlers that this callback replaces during training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace the handlers of the signals until the end of training."""
        super().on_train_start(trainer, pl_module)
        self._received, self._process = 0, os.getpid()
        if not trainer.fast_dev_run and threading.current_thread() is threading.main_thread():
            numbers = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGUSR1")]
            replaced = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._receive) for number in replaced}

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self._received = int(number)
        if os.getpid() != self._process:  # a worker of a data loader, which inherits the handler
            os.kill(os.getpid(), number)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """After the last batch of an epoch, drop the loader's position, so that a resumed run starts the next epoch."""
        # Under limit_train_batches the loader is not at its end, and the resumed run would continue there.
        if trainer.training and trainer.is_last_batch:
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Save the checkpoint when it is due; if a rank has received a signal, save it and end the run."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        self._end_after_signal(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_after_signal(trainer)
        if not trainer.fast_dev_run:
            self._save_last(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._restore_handlers()

    def _save_last(self, trainer: Any) -> None:
        path = os.path.join(str(self.dirpath), self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)
        self.last_model_path = self.last_model_path or path
        trainer.save_checkpoint(self.last_model_path, self.save_weights_only)

    def _end_after_signal(self, trainer: Any) -> None:
        """If a rank has received a signal, save and raise the exception that ends the run, or let Lightning requeue."""
        number = self._received
        if is_distributed():
            received = torch.tensor(number, device=trainer.strategy.root_device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            number = int(received)
        if not number:  # a signal that arrived during ``all_reduce`` takes effect after the next batch
            return
        self._received = 0
        self._save_last(trainer)
        if trainer.is_global_zero:
            line = f"{signal.Signals(number).name}: saved {self.last_model_path}; --ckpt_path=last resumes the run"
            print(line, file=sys.stderr, flush=True)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM or not callable(self._handlers.get(number)):
            raise SystemExit(128 + number)  # here, because Lightning's handler of SIGTERM only sets a flag
        self._handlers[number](number, None)  # under SLURM, Lightning's handler of SIGUSR1 requeues the job
        signal.signal(number, self._receive)
