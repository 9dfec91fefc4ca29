"""Checks that all ranks will run the same training, before a difference makes a collective hang."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from em_lightning.distributed.sums import is_distributed

_REMEDY = "Give all hosts the same command, package versions, data and checkpoint, for instance in a shared folder"


def check_agreement(facts: Mapping[str, Any], remedy: str = _REMEDY) -> None:
    """Raise an error on every rank unless all ranks pass equal facts; must be called on all ranks.

    ``facts`` maps names to values. Values that JSON cannot represent are compared by their class. The message ends with
    the ``remedy`` of rank 0.

    Raises:
        ValueError: a fact differs; the message has its name, its values, and the hosts and ranks that differ.
    """
    if not is_distributed():
        return
    values = {name: json.dumps(facts[name], sort_keys=True, default=lambda x: type(x).__name__) for name in facts}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), values, remedy))
    for name in dict.fromkeys(name for _, facts, _ in ranks for name in facts):
        found = [facts.get(name, "missing") for _, facts, _ in ranks]
        common = Counter(found).most_common(1)[0][0]  # that of rank 0 in a tie
        hosts = [f"on host {host} (rank {rank})" for rank, (host, _, _) in enumerate(ranks)]
        others = [f"{value} {host}" for value, host in zip(found, hosts, strict=True) if value != common]
        if others:
            raise ValueError(
                f"the ranks must have the same {name}: it is {'; '.join(others[:4])}, but {common} "
                f"{hosts[found.index(common)]}. {ranks[0][2]}"
            )
