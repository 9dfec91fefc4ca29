"""Fuzz test of every reader: mutated files give data or a documented error, in bounded time and memory.

    python tests/fuzz_readers.py [--count 10000] [--seed 0] [READER ...]

Each reader runs in its own process, whose address space may grow by one GiB. Reading a file may take five seconds.
Other errors than the documented ones are counted by kind, and the first file of each kind is kept.
"""

import argparse
import collections
import contextlib
import gzip
import io
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from em_lightning import cli, data, surgery

SECONDS = 5.0
BYTES = 2**30
EXTREMES = (0, -1, 1, 127, 128, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**31), 10**30)
PYRAMID = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0.5, 0.5, 2)]
VERTICES = "".join(f"{x} {y} {z}\n" for x, y, z in PYRAMID)
OFF = f"OFF\n5 2 0\n{VERTICES}4 0 1 2 3\n3 0 1 4\n".encode()
STL = b"solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\n"
STL += b"endloop\nendfacet\nendsolid a\n"
CONFIG = Path(__file__).parents[1] / "configs" / "gaussian_mixture.yaml"
WORDS = (b"nan", b"inf", b"1e400", b"", b"\x00", b"\xff\xfe", b"#", b"/", b"\\\n", b"-", b"9" * 5000, b"0x10", b"1_0")
YAML = (b"{1: 2}", b"[a]", b"!!python/object/apply:os.system [ls]", b"!x", b"*a", b"&a", b"&a [*a]", b"2001-99-99")
YAML += (b"? [a]: b", b"<<: {a: 1}", b"class_path: subprocess.Popen", b"[" * 500, b"- ", b"null", b"|", b"---", b"\t")


class TooLong(BaseException):
    """Reading exceeded the time limit. A BaseException, so that readers which catch Exception do not catch it."""


def ply(form):
    """Return the pyramid as PLY."""
    head = f"ply\nformat {form} 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
    head += "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    if form == "ascii":
        return head.encode() + f"{VERTICES}4 0 1 2 3\n3 0 1 4\n".encode()
    order = "<" if "little" in form else ">"
    body = b"".join(struct.pack(order + "3f", *point) for point in PYRAMID)
    return head.encode() + body + struct.pack(order + "B3iB3i", 3, 0, 1, 2, 3, 0, 1, 4)


def pcd(form):
    """Return two points and a label each as PCD."""
    head = f"FIELDS x y z label\nSIZE 4 4 8 1\nTYPE F F F U\nCOUNT 1 1 1 2\nPOINTS 2\nDATA {form}\n".encode()
    if form == "ascii":
        return head + b"1 2 3 4 4\n5 6 7 8 8\n"
    return head + 2 * struct.pack("<ffdBB", 1, 2, 3, 4, 4)


def npy(array):
    """Return an array as NumPy saves it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(array):
    """Return an array as NumPy saves it in an archive."""
    file = io.BytesIO()
    np.savez(file, points=array)
    return file.getvalue()


def idx(array):
    """Return an array of bytes as IDX."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def archive(members):
    """Return a zip archive of uncompressed members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    return file.getvalue()


def checkpoint():
    """Return a checkpoint in Lightning's format of a model with a replaced module."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    surgery.replace_modules(model, torch.nn.ReLU, torch.nn.SiLU)
    plan = {"surgery": surgery.recorded_plan(model)}
    file = io.BytesIO()
    torch.save({"epoch": 1, "state_dict": model.state_dict(), "em_lightning": plan, "loops": {"done": [1, 2.0]}}, file)
    return file.getvalue()


def read_table(path):
    """Read a table to its last row."""
    table = data.Table(path)
    for start in range(0, min(len(table), 10**4), 1000):
        table.rows(start, min(start + 1000, len(table)))


def read_archive(path):
    """Read a zip archive of meshes."""
    data.PointCloudFolder(root=str(path), num_points=4).setup()


def read_run_config(path):
    """Read a config by the command line with ``--print_config``."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as messages:
        try:
            code = cli.main(["run", "gaussian_mixture", "--config", str(path), "--print_config"])
        except SystemExit as end:
            code = end.code
    if code:
        raise ValueError(messages.getvalue())


SHAPES = {f"raw/{kind}/{split}/{kind}.off": OFF for kind in ("a", "b") for split in ("train", "test")}
# File name suffix, valid files and the function that reads them.
READERS = {
    "off": (".off", [OFF, b"OFF5 2 0\n" + OFF[10:]], data.read_points),
    "ply": (".ply", [ply("ascii"), ply("binary_little_endian"), ply("binary_big_endian")], data.read_points),
    "stl": (".stl", [STL, bytes(80) + struct.pack("<I12fH", 1, *range(12), 0)], data.read_points),
    "obj": (
        ".obj",
        [re.sub(rb"(?m)^", b"v ", VERTICES.encode().rstrip()) + b"\nf 1 2 3\nf -1 2/1 3//1\n"],
        data.read_points,
    ),
    "xyz": (".xyz", [VERTICES.encode()], data.read_points),
    "csv": (".csv", [b"x,y,z\n" + VERTICES.encode().replace(b" ", b",")], data.read_points),
    "pts": (".pts", [b"5\n" + VERTICES.encode(), b"2\n1 2 3 4\n5 6 7 8\n1\n9 9 9 9\n"], data.read_points),
    "pcd": (".pcd", [pcd("ascii"), pcd("binary")], data.read_points),
    "npz": (".npz", [npz(np.eye(4, 3))], data.read_points),
    "npy": (".npy", [npy(np.eye(4, 3)), npy(np.eye(3, dtype="<f4"))], data.read_points),
    "table": (".npy", [npy(np.eye(4, 3)), npy(np.ones((3, 2), "i2"))], read_table),
    "idx": (
        "",
        [idx(np.ones((2, 3), np.uint8)), gzip.compress(idx(np.ones((9, 9), np.uint8)), mtime=0)],
        data.read_idx,
    ),
    "zip": (".zip", [archive(SHAPES)], read_archive),
    "checkpoint": (".ckpt", [checkpoint()], surgery.read_plan),
    "config": (".yaml", [CONFIG.read_bytes()], read_run_config),
}


def mutated(content, rng, words=WORDS):
    """Return a file with one to three faults."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, kind = rng.randrange(len(content) + 1), rng.randrange(7)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            content[place:place] = rng.choice([rng.choice(words), rng.randbytes(rng.randint(1, 20))])
        elif kind == 3:
            del content[place : place + rng.randint(1, 20)]
        elif kind == 4:  # a number in a text
            found = list(re.finditer(rb"\d+", content))
            if found:
                start, end = rng.choice(found).span()
                content[start:end] = rng.choice([str(rng.choice(EXTREMES)).encode(), rng.choice(words)])
        elif kind == 5:  # a number in a header
            size, order = rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
            value = rng.choice(EXTREMES) % 256**size
            content[place : place + size] = value.to_bytes(size, order)
        else:
            other = rng.randrange(len(content) + 1)
            content[place:place] = content[other : other + rng.randint(1, 60)]
    return bytes(content)


def repacked(content, rng):
    """Return an archive with a fault in one member and a valid CRC."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        members = {name: source.read(name) for name in source.namelist()}
    # Choose the pickle of a checkpoint most often, because it has the most structure.
    name = rng.choice([name for name in members if name.endswith("data.pkl")] * 4 + list(members))
    members[name] = mutated(members[name], rng)
    return archive(members)


def fault(name, count, rng):
    """Return a mutated file of a reader."""
    content = READERS[name][1][count % len(READERS[name][1])]
    if name in ("zip", "npz", "checkpoint") and count % 4:
        return repacked(content, rng)
    if content[:2] == b"\x1f\x8b" and rng.random() < 0.5:
        return gzip.compress(mutated(gzip.decompress(content), rng), mtime=0)
    return mutated(content, rng, YAML if name == "config" else WORDS)


def fuzz(name, count, folder, seed=0):
    """Read ``count`` mutated files; return counts of outcomes, the first file of each error, and the longest time."""
    ending, _, read = READERS[name]
    rng, ends, kept = random.Random(f"{name}{seed}"), collections.Counter(), {}
    path = Path(folder) / f"file{ending}"
    slowest = 0.0

    def ring(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for number in range(count):
            path.write_bytes(fault(name, number, rng))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(path)
                end = "read"
            except ValueError as error:
                memory = isinstance(error.__cause__, MemoryError) or "allocate memory" in str(error)
                end = "MemoryError" if memory else "ValueError"
            except BaseException as error:  # includes TooLong
                end = f"{type(error).__name__}: {str(error)[:80]}"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - start)
            ends[end] += 1
            if end not in ("read", "ValueError"):
                kept.setdefault(end, path.read_bytes())
    finally:
        signal.signal(signal.SIGALRM, before)
    return ends, kept, slowest


def main():
    """Fuzz the given readers, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the first file of each undocumented error")
    parser.add_argument("--here", action="store_true", help="fuzz one reader in this process (internal)")
    args = parser.parse_args()
    args.readers = args.readers or list(READERS)
    if set(args.readers) - set(READERS):
        parser.error(f"READER must be one of {', '.join(READERS)}")
    if not args.here:
        rest = [f"--count={args.count}", f"--seed={args.seed}", "--here"] + (
            [f"--keep={args.keep}"] if args.keep else []
        )
        codes = [subprocess.run([sys.executable, __file__, name, *rest]).returncode for name in args.readers]
        for name, code in zip(args.readers, codes, strict=True):
            if code < 0:
                print(f"{name}: the process died of signal {-code}")
        sys.exit(any(codes))
    torch.set_num_threads(1)
    (name,) = args.readers
    with tempfile.TemporaryDirectory() as folder:
        fuzz(name, 20, folder, seed=-1)  # load lazy imports before memory is measured
        used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        start, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ends, kept, slowest = fuzz(name, args.count, folder, args.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    summary = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    print(
        f"{name}: {args.count} files in {time.perf_counter() - start:.0f} s: {summary}; slowest {slowest:.2f} s, "
        f"peak memory +{grown:.0f} MiB",
        flush=True,
    )
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(kept.values()):
            (args.keep / f"{name}-{number}{READERS[name][0]}").write_bytes(content)
    sys.exit(bool(kept))


if __name__ == "__main__":
    main()
