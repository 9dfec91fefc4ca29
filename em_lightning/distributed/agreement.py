"""Checks that all ranks will run the same training, before a difference makes a collective hang."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import DistributedSampler

from em_lightning.distributed.sums import is_distributed

_PACKAGES = ("em_lightning", "torch", "lightning", "pytorch_lightning", "numpy")
_OPTIONS = ("max_epochs", "max_steps", "accumulate_grad_batches", "precision", "check_val_every_n_epoch")
_OPTIONS += ("gradient_clip_val", "val_check_interval")
_PATHS = ("_dir", "dirpath", "ckpt_path", "root", "folder")  # ends of names of arguments that may differ
_COMPARED_ROWS = 256


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise an error on every rank unless all ranks pass equal facts; must be called on all ranks.

    ``facts`` maps names to values. Values that JSON cannot represent are compared by their class.

    Raises:
        ValueError: a fact differs; the message has its name, its values, and the hosts and ranks that differ.
    """
    values = {name: json.dumps(value, sort_keys=True, default=_class_name) for name, value in facts.items()}
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()
    if not is_distributed() or len(set(_gather(digest))) == 1:
        return
    ranks = _gather((socket.gethostname(), values))
    for name in dict.fromkeys(name for _, facts in ranks for name in facts):
        found = [facts.get(name, "missing") for _, facts in ranks]
        common = Counter(found).most_common(1)[0][0]  # that of rank 0 in a tie
        hosts = [f"on host {host} (rank {rank})" for rank, (host, _) in enumerate(ranks)]
        others = [f"{value} {host}" for value, host in zip(found, hosts, strict=True) if value != common]
        if others:
            raise ValueError(
                f"the ranks must have the same {name}: it is {'; '.join(others[:4])}, but {common} "
                f"{hosts[found.index(common)]}. Give all hosts the same command, package versions, data and "
                f"checkpoint, for instance in a shared folder"
            )


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _hash(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _class_name(value: Any) -> str:
    return type(value).__name__


def check_arguments(trainer: Any) -> None:
    """Compare package versions and arguments; call it on all ranks in the hook ``setup``."""
    if not is_distributed():
        return
    module, data = trainer.lightning_module, trainer.datamodule
    facts = {f"version of {name}": sys.modules[name].__version__ for name in _PACKAGES if name in sys.modules}
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    facts["source of em_lightning"] = _hash(b"".join(path.read_bytes() for path in sources))
    facts |= {"class of the model": _class_name(module), "class of the data": _class_name(data)}
    facts |= {f"model.{name}": value for name, value in module.hparams.items()}
    for field in dataclasses.fields(data) if dataclasses.is_dataclass(data) else ():
        value = getattr(data, field.name)
        if isinstance(value, (bool, int, float, tuple)):  # paths and tensors may differ
            facts[f"data.{field.name}"] = value
    facts |= {f"trainer.{name}": getattr(trainer, name) for name in _OPTIONS}
    facts |= {
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "checkpoint callbacks": [callback.state_key for callback in trainer.checkpoint_callbacks],
    }
    for callback in trainer.callbacks:
        if type(callback).__module__.startswith("em_lightning."):
            facts |= {
                f"{_class_name(callback)}.{name}": value
                for name, value in vars(callback).items()
                if isinstance(value, (bool, int, float, tuple)) and not name.startswith("_")
            }
        if hasattr(callback, "parser") and hasattr(callback, "config"):  # the SaveConfigCallback of a LightningCLI
            config = callback.parser.dump(callback.config, format="json", skip_none=False)
            facts |= _leaves(json.loads(config), "argument")
    check_agreement(facts)


def _leaves(value: Any, name: str) -> dict[str, Any]:
    """Return the values in nested mappings and lists by their dotted names, without paths."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, each in pairs for key, leaf in _leaves(each, f"{name}.{part}").items()}
    is_path = isinstance(value, str) and (
        name.endswith(_PATHS) or "/" in value or os.sep in value or os.path.exists(value)
    )
    return {} if is_path else {name: value}


def check_checkpoint(trainer: Any) -> None:
    """Compare the checkpoint to resume from; call it on all ranks in ``on_fit_start``, where it is known."""
    if not is_distributed():
        return
    path = trainer.ckpt_path or "none"
    if Path(path).is_file():  # its folder may have another name on another host
        path = f"{Path(path).name} with hash {_hash(Path(path).read_bytes())}"
    check_agreement({"checkpoint to resume from": path})


def check_batches(trainer: Any) -> None:
    """Compare the numbers of batches, and rows at random places; call it on all ranks in ``on_train_start``."""
    if not is_distributed():
        return
    facts = {"number of batches": [trainer.num_training_batches, trainer.num_val_batches]}
    loader = trainer.train_dataloader
    if hasattr(loader, "table"):  # a loader of em_lightning.data
        rows = loader.sample(_COMPARED_ROWS).points
        facts["rows"] = [len(loader.table), _hash(rows.cpu().numpy())]
    elif isinstance(getattr(loader, "sampler", None), DistributedSampler):
        facts["number of items"] = len(loader.dataset)
    check_agreement(facts)
