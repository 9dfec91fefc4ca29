"""Compile the Triton kernels of the E-step for an H100 and print registers and spilled bytes; needs triton, but no GPU.

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

# Types of the arguments of the kernels, by name. An argument that is a tuple has a tuple of types.
POINTER = "*fp32"
THREE = (POINTER,) * 3
COMMON = {"x": (POINTER, "i64", "i64", "i64", "i32"), "mixture": (*THREE, POINTER, "i32", "i32"), "peak": POINTER}
COMMON["polynomial"] = THREE
OUTPUTS = {
    "log_density": {"log_density": POINTER, "mean_slope": POINTER},
    "sums": {"weights": POINTER, "per_point": THREE, "zeroth": POINTER, "first": POINTER, "second": POINTER},
    "point_gradient": {"weights": POINTER, "per_point": THREE, "grad_z": POINTER},
}
CASES = (("log_density", False), ("log_density", True), ("sums", False), ("sums", True), ("point_gradient", True))


def compiled(name, features, full, gradient):
    """Compile a kernel and return the output of ptxas."""
    constants = {"D": features, "TILE": kernels._TILE, "FULL": full, "SLOPES": gradient}
    if name == "sums":
        constants["CHUNK"] = kernels._CHUNK
    if name != "log_density":
        constants["WEIGHTED"] = True
    signature = {**COMMON, **OUTPUTS[name], **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(getattr(kernels, f"_write_{name}"), signature, constants)
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
    print("| kernel | covariances | features | gradient | registers | spilled bytes |\n|---|---|---|---|---|---|")
    for full, features in ((True, 4), (True, 16), (False, 4), (False, 16), (False, 128)):
        for name, gradient in CASES:
            output = compiled(name, features, full, gradient)
            registers, spilled = (
                re.findall(rule, output)[-1] for rule in (r"Used (\d+) registers", r"(\d+) bytes spill st")
            )
            kind = "full" if full else "diagonal"
            print(f"| {name} | {kind} | {features} | {'yes' if gradient else 'no'} | {registers} | {spilled} |")


if __name__ == "__main__":
    main()
