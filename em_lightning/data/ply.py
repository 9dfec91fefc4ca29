"""The PLY format (Turk, 1994): elements of scalar and list properties, as text or binary of either byte order."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_CODES = {
    **{"char": "b", "uchar": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I", "float": "f", "double": "d"},
    **{"int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"},
    **{"float32": "f", "float64": "d"},
}
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}


class _Property(NamedTuple):
    name: str
    code: str
    count_code: str | None  # None: a scalar, not a list


class _Element(NamedTuple):
    name: str
    rows: int
    properties: list[_Property]


def parse_ply(data: bytes) -> tuple[NDArray[np.float64], list[list[int]]]:
    """Return the points (N, 3) and the polygons of a PLY file.

    Args:
        data: the content of the file.

    Raises:
        ValueError: the header is wrong, announces more or less than there is, or lacks x, y and z.
    """
    form, elements, body = _parse_header(data)
    read, left = _text_reader(body) if form == "ascii" else _binary_reader(body, _ORDERS[form])
    points: NDArray[np.float64] | None = None
    polygons: list[list[int]] = []
    for element in elements:
        columns = read(element)
        if element.name == "vertex":
            lists = [p.name for p in element.properties if p.count_code]
            if not {"x", "y", "z"} <= set(columns) - set(lists):
                raise ValueError(f"the vertices have properties {', '.join(columns)}, and need numbers x, y and z")
            points = np.stack([np.asarray(columns[axis], dtype=np.float64) for axis in "xyz"], -1)
        elif element.name == "face":
            key = next((p.name for p in element.properties if p.name in ("vertex_indices", "vertex_index")), None)
            if key is None:
                raise ValueError(f"the faces have properties {', '.join(columns)}, and need a list vertex_indices")
            polygons = [[int(corner) for corner in polygon] for polygon in columns[key]]
    if points is None:
        raise ValueError("there is no element 'vertex' in it")
    if left():
        raise ValueError(f"{left()} {'lines' if form == 'ascii' else 'bytes'} follow the last announced element")
    return points, polygons


def _parse_header(data: bytes) -> tuple[str, list[_Element], bytes]:
    # The header is lines of text; what follows may be binary and hold any byte.
    head, mark, body = data.partition(b"end_header")
    lines = head.decode("latin-1").splitlines()
    if not mark or not lines or lines[0].strip() != "ply":
        raise ValueError("it does not start with a PLY header from 'ply' to 'end_header'")
    form = ""
    elements: list[_Element] = []
    for line in lines[1:]:
        match line.split():
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", name, _] if name == "ascii" or name in _ORDERS:
                form = name
            case ["element", name, count] if count.isdigit():
                elements.append(_Element(name, int(count), []))
            case ["property", "list", count_type, item_type, name] if (
                elements and item_type in _CODES and _CODES.get(count_type, "f") not in "fd"
            ):
                elements[-1].properties.append(_Property(name, _CODES[item_type], _CODES[count_type]))
            case ["property", kind, name] if elements and kind in _CODES:
                elements[-1].properties.append(_Property(name, _CODES[kind], None))
            case _:
                raise ValueError(f"the header line {line.strip()[:60]!r} is not understood")
    if not form:
        raise ValueError("the header names no format (ascii, binary_little_endian or binary_big_endian)")
    empty = next((element.name for element in elements if element.rows and not element.properties), None)
    if empty is not None:
        raise ValueError(f"the element {empty!r} has no properties")
    return form, elements, body.removeprefix(b"\r").removeprefix(b"\n")


_Reader = tuple[Callable[[_Element], dict[str, Any]], Callable[[], int]]


def _text_reader(body: bytes) -> _Reader:
    lines = [line for line in body.decode("latin-1").splitlines() if line.strip()]
    position = 0

    def read(element: _Element) -> dict[str, Any]:
        nonlocal position
        if element.rows > len(lines) - position:
            raise ValueError(
                f"{element.rows} rows of {element.name!r} are announced, {len(lines) - position} are there"
            )
        columns: dict[str, Any] = {p.name: [] for p in element.properties}
        for line in lines[position : position + element.rows]:
            words = iter(line.split())
            try:
                for p in element.properties:
                    if p.count_code is None:
                        columns[p.name].append(next(words))
                    else:
                        columns[p.name].append([next(words) for _ in range(int(next(words)))])
            except StopIteration:
                raise ValueError(f"a row of {element.name!r} is too short: {line[:60]!r}") from None
            if next(words, None) is not None:
                raise ValueError(f"a row of {element.name!r} is too long: {line[:60]!r}")
        position += element.rows
        return columns

    return read, lambda: len(lines) - position


def _binary_reader(body: bytes, order: str) -> _Reader:
    position = 0

    def take(code: str, count: int, name: str) -> tuple[Any, ...]:
        nonlocal position
        size = struct.calcsize(code) * count
        if count < 0 or size > len(body) - position:
            raise ValueError(f"the rows of {name!r} end early (truncated?)")
        values = struct.unpack_from(f"{order}{count}{code}", body, position)
        position += size
        return values

    def read(element: _Element) -> dict[str, Any]:
        nonlocal position
        least = sum(struct.calcsize(p.count_code or p.code) for p in element.properties)
        if element.rows * least > len(body) - position:
            raise ValueError(
                f"{element.rows} rows of {element.name!r} need {element.rows * least} bytes or more, "
                f"{len(body) - position} are there (truncated?)"
            )
        if all(p.count_code is None for p in element.properties):
            kind = np.dtype([(p.name, order + p.code) for p in element.properties])
            table = np.frombuffer(body, kind, element.rows, position) if element.rows else np.empty(0, kind)
            position += table.nbytes
            return {p.name: table[p.name] for p in element.properties}
        columns: dict[str, Any] = {p.name: [] for p in element.properties}
        for _ in range(element.rows):
            for p in element.properties:
                if p.count_code is None:
                    columns[p.name].append(take(p.code, 1, element.name)[0])
                else:
                    columns[p.name].append(take(p.code, take(p.count_code, 1, element.name)[0], element.name))
        return columns

    return read, lambda: len(body) - position
