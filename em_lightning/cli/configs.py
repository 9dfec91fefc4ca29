"""Config files that somebody else may have written: plain YAML of bounded size and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from em_lightning.cli.folders import UsageError

_BYTES = 2**20
_DEPTH = 40
_NODES = 50_000
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


def read_config(path: str | Path) -> Any:
    """Return what a YAML file holds, unless it is broken, has tags, nests deeply, or grows by its aliases.

    That is found in its stream of events, of which nothing is built: no size is a danger to memory or stack.

    Raises:
        UsageError: the file is one of these, and which.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _BYTES:
            raise UsageError(f"{path}: has more than {_BYTES} bytes, too many for a config; check the path")
        text = path.read_text(encoding="utf-8")
        _check_events(text, str(path))
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date or a number that is none
        raise UsageError(f"{path}: is no YAML file ({' '.join(str(error).split())}); repair it") from error


def check_configs(args: Sequence[str]) -> None:
    """Try :func:`read_config` on every argument, or value of one, that is the path of a YAML or JSON file."""
    for arg in args:
        value = arg.partition("=")[2] if arg.startswith("-") else arg
        if value.lower().endswith((".yaml", ".yml", ".json")) and Path(value).is_file():
            read_config(value)


def _check_events(text: str, name: str) -> None:
    sizes = [0]  # of the collections that are open, as if each alias were written out
    anchors: dict[str, int] = {}
    names: list[str | None] = []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in yaml.parse(text, Loader=loader):
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!" and tag not in _PLAIN:
            raise UsageError(f"{name}: line {event.start_mark.line + 1} has the tag {tag}; write plain values")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:  # unknown, or around itself
                raise UsageError(
                    f"{name}: line {event.start_mark.line + 1} has *{event.anchor}, which stands for nothing"
                )
            sizes[-1] += anchors[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
            if event.anchor is not None:
                anchors[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = sizes.pop(), names.pop()
            sizes[-1] += size
            if anchor is not None:
                anchors[anchor] = size
        if len(sizes) > _DEPTH:
            raise UsageError(f"{name}: nests deeper than {_DEPTH} levels; a config has fewer than ten")
        if sizes[-1] > _NODES:
            raise UsageError(f"{name}: stands for more than {_NODES} values, aliases written out; shorten it")
