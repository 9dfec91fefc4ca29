"""C++ sources of this folder, compiled by g++, or the compiler ``CXX``, at first use and cached."""

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
from typing import Any

from torch import Tensor

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")


@functools.cache
def load(source: str, *definitions: str) -> tuple[Any, str]:
    """Compile a source with definitions ``-DNAME=value``; return (library, "") or (None, error message)."""
    compiler = shutil.which(name := os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, f"no {name} was found on the PATH"
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        instruction_sets = next((line for line in lines if line.startswith("flags")), platform.machine())
        texts = (path.read_text() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".cpp", ".h"))
        key = "\n".join([*texts, version, instruction_sets, *_FLAGS, source, *definitions])
        target = _cache_folder() / f"{Path(source).stem}_{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        if not target.exists():
            # Compile under a temporary name, because several processes may compile at once.
            handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
            os.close(handle)
            try:
                command = [compiler, *_FLAGS, *definitions, str(_SOURCES / source), "-o", temporary]
                subprocess.run(command, capture_output=True, text=True, check=True)
                os.replace(temporary, target)
            finally:
                Path(temporary).unlink(missing_ok=True)
        return ctypes.CDLL(str(target)), ""
    except subprocess.CalledProcessError as error:
        return None, error.stderr
    except OSError as error:
        return None, str(error)


def structure(*fields: Tensor | int | None) -> Any:
    """Return a structure of 64-bit numbers and pointers to contiguous tensors, which must outlive it; null for None."""
    numbers = [field.data_ptr() if isinstance(field, Tensor) else field or 0 for field in fields]
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.cache
def _cache_folder() -> Path:
    """Return the folder of compiled libraries: in the user's cache, or for this process only if that is read-only."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "em_lightning")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="em_lightning_"))
