"""Compile the Triton kernels for an H100 and print registers and spilled bytes; needs triton, but no GPU.

python benchmarks/triton_registers.py
"""

import glob
import os
import re
import subprocess
import tempfile

os.environ.pop("TRITON_INTERPRET", None)  # kernels of the interpreter cannot be compiled

import triton
from triton.backends.compiler import GPUTarget

from em_lightning.mixture.backends import triton as kernels
from em_lightning.mixture.backends import triton_start

# Types of the arguments of the kernels, by name. An argument that is a tuple has a tuple of types.
POINTER = "*fp32"
THREE = (POINTER,) * 3
COMMON = {"x": (POINTER, "i64", "i64", "i64", "i32"), "mixture": (*THREE, POINTER, "i32", "i32"), "peak": POINTER}
COMMON["polynomial"] = THREE
OUTPUTS = {
    "log_density": {"log_density": POINTER, "mean_slope": POINTER},
    "sums": {"weights": POINTER, "per_point": THREE, "sums": POINTER},
    "point_gradient": {"weights": POINTER, "per_point": THREE, "grad_z": POINTER},
}
START = {
    "candidates": {
        "x": COMMON["x"],
        "weights": POINTER,
        **dict.fromkeys(("uniform", "scores"), "*fp64"),
        "distances": POINTER,
        "rows": "*i64",
        **dict.fromkeys(("step", "features", "size", "sets", "candidates"), "i32"),
    },
    "parameters": {
        **dict.fromkeys(("sums", "totals", "masses", "floor"), "*fp64"),
        "centers": POINTER,
        "frame": ("*fp64",) * 2,
        "parameters": ("*fp64",) * 3,
        **dict.fromkeys(("size", "components", "features", "entries"), "i32"),
    },
}
# Kernels and the column "computes".
CASES = (
    ("log_density", "values"),
    ("log_density", "gradients"),
    ("log_density", "cells"),
    ("sums", "values"),
    ("sums", "gradients"),
    ("sums", "cells"),
    ("point_gradient", "gradients"),
)


def compiled(name, features, full, computes):
    """Compile a kernel of the E-step and return the output of ptxas."""
    constants = {"D": features, "TILE": kernels._TILE, "FULL": full, "SLOPES": computes == "gradients"}
    if name == "sums":
        constants["CHUNK"] = kernels._CHUNK
    if name != "point_gradient":
        constants["HARD"] = computes == "cells"
    return assembled(getattr(kernels, f"_write_{name}"), {**COMMON, **OUTPUTS[name]}, constants)


def compiled_start(name, features, full, draws):
    """Compile a kernel of the start, for 1,024 chunks, and return the output of ptxas."""
    if name == "candidates":
        j = triton.next_power_of_2(max(draws, 1))
        tile = min(4096 // (features * j), triton_start._CHUNK)
        constants = {"D": features, "TILE": tile, "CHUNKS": 1024, "J": j, "DRAWN": draws > 0}
    else:
        constants = {"ENTRIES": features**2 if full else features, "FULL": full}
    return assembled(getattr(triton_start, f"_write_{name}"), START[name], constants)


def assembled(function, signature, constants):
    """Compile a kernel for given types of arguments and return the output of ptxas."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    signature = {name: signature[name] for name in function.arg_names}
    source = triton.compiler.ASTSource(function, signature, constants)
    # Compute capability 9.0 and 32 threads per warp are those of an H100.
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assembler = glob.glob(os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas*"))[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main():
    print(f"Triton {triton.__version__}, sm_90a, four warps\n")
    print("| kernel | covariances | features | computes | registers | spilled bytes |\n|---|---|---|---|---|---|")
    sizes = ((True, 4), (True, 16), (False, 4), (False, 16), (False, 128))
    for full, features in sizes:
        for name, computes in CASES:
            show(name, "full" if full else "diagonal", features, computes, compiled(name, features, full, computes))
    for full, features in sizes:
        kind = "full" if full else "diagonal"
        show("parameters", kind, features, "start", compiled_start("parameters", features, full, 0))
    for features in (4, 16, 128):
        for computes, draws in (("farthest", 0), ("k-means++", 6)):  # candidates for K = 64
            show("candidates", "any", features, computes, compiled_start("candidates", features, False, draws))


def show(*row):
    """Print a row of the table; the last entry is the output of ptxas."""
    *names, output = row
    rules = r"Used (\d+) registers", r"(\d+) bytes spill st"
    print(f"| {' | '.join(map(str, (*names, *(re.findall(rule, output)[-1] for rule in rules))))} |")


if __name__ == "__main__":
    main()
