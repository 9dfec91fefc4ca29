"""Checks that all ranks will run the same training, before a difference makes a collective hang."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from em_lightning.distributed.sums import is_distributed


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise an error on every rank unless all ranks pass equal facts; must be called on all ranks.

    ``facts`` maps names to values. Values that JSON cannot represent are compared by their class.

    Raises:
        ValueError: a fact differs; the message has its name, its values, and up to four hosts and ranks that differ.
    """
    values = {name: json.dumps(facts[name], sort_keys=True, default=lambda x: type(x).__name__) for name in facts}
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()
    if not is_distributed() or len(set(_gather(digest))) == 1:
        return
    ranks = _gather((socket.gethostname(), values))
    for name in dict.fromkeys(name for _, facts in ranks for name in facts):
        found = [facts.get(name, "missing") for _, facts in ranks]
        common = Counter(found).most_common(1)[0][0]  # in a tie, that of the lowest rank
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
