"""Files of every format are read alike; every kind of damage is reported with the file, the fault and the remedy."""

import struct

import numpy as np
import pytest

from em_lightning.data import parse_points, read_points, readers

POINTS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 0.5, 2]])
TRIANGLES = [[0, 1, 2], [0, 2, 3], [0, 1, 4]]  # a square as a fan, and one side

OFF_BODY = "\n".join(" ".join(map(str, p)) for p in POINTS) + "\n4 0 1 2 3 255 0 0\n3 0 1 4\n"
OBJ = (
    "# a pyramid\nmtllib x.mtl\n"
    + "".join("v " + " ".join(map(str, p)) + "\n" for p in POINTS)
    + "vn 0 0 1\nf 1/1/1 2//1 3/3 \\\n 4\nf -5 -4 -1\n"
)


def ply(form):
    header = (
        f"ply\nformat {form} 1.0\ncomment hello\nelement vertex 5\nproperty uchar red\nproperty float x\n"
        "property float y\nproperty double z\nelement face 2\nproperty list uchar int vertex_indices\n"
        "property float quality\nelement edge 1\nproperty int a\nend_header\n"
    ).encode()
    if form == "ascii":
        rows = [f"7 {x} {y} {z}" for x, y, z in POINTS] + ["4 0 1 2 3 0.5", "3 0 1 4 0.5", "9"]
        return header + "\n".join(rows).encode()
    order = "<" if "little" in form else ">"
    body = b"".join(struct.pack(order + "Bffd", 7, *p) for p in POINTS)
    for face in ([0, 1, 2, 3], [0, 1, 4]):
        body += struct.pack(f"{order}B{len(face)}if", len(face), *face, 0.5)
    return header + body + struct.pack(order + "i", 9)


MESHES = {
    "plain.off": f"OFF\n# comment\n5 2 0\n{OFF_BODY}".encode(),
    "together.off": f"OFF5 2 0\n{OFF_BODY}".encode(),
    "oneline.OFF": f"OFF 5 2\n\n{OFF_BODY}".replace("\n", "\r\n").encode(),
    "colored.off": f"COFF\n5 2 0 # counts\n{OFF_BODY}".encode(),
    "text.ply": ply("ascii"),
    "little.ply": ply("binary_little_endian"),
    "big.ply": ply("binary_big_endian"),
    "mesh.obj": OBJ.encode(),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes(tmp_path, name):
    (tmp_path / name).write_bytes(MESHES[name])
    points, faces = read_points(tmp_path / name)
    assert points.dtype == np.float64 and faces.dtype == np.int64
    np.testing.assert_array_equal(points, POINTS)
    assert faces.tolist() == TRIANGLES


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xyz", b"# x y z\n1 2 3 9\n4 5 6 9\n"),
        ("b.txt", b"1,2,3\n\n4;5;6\n"),
        ("c.ply", None),
        ("d.off", b"OFF\n2 0 0\n1 2 3\n4 5 6"),
    ],
)
def test_points_without_faces(tmp_path, name, content):
    header = b"ply\nformat ascii 1.0\nelement vertex 2\nproperty int x\nproperty int y\nproperty int z\nend_header\n"
    (tmp_path / name).write_bytes(content or header + b"1 2 3\n4 5 6\n")
    points, faces = read_points(tmp_path / name)
    assert points.tolist() == [[1, 2, 3], [4, 5, 6]] and faces is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", ">f8"])
def test_npy(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.arange(8, dtype=dtype).reshape(2, 4))
    points, faces = read_points(tmp_path / "a.npy")
    assert points.tolist() == [[0, 1, 2], [4, 5, 6]] and points.dtype == np.float64 and faces is None


PLY_HEADER = (
    "ply\nformat {} 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n{}end_header\n"
)
LITTLE, BIG = "binary_little_endian", "binary_big_endian"
NO_LIST = "element face 1\nproperty int a\n"
LIST = "element face {}\nproperty list uchar int vertex_indices\n"

BROKEN = {
    "empty.off": (b"", "is empty"),
    "header.off": (b"FOO\n1 0 0\n0 0 0\n", "not OFF"),
    "binary.off": (b"OFF BINARY\n\0\0\0", "numbers of points"),
    "counts.off": (b"OFF\n", "numbers of points"),
    "negative.off": (b"OFF\n-1 2 0\n0 0 0\n", "numbers of points"),
    "huge.off": (b"OFF\n999999999999 9999999999 0\n0 0 0\n", "1 lines follow"),
    "truncated.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n", "2 lines follow"),
    "longer.off": (b"OFF\n1 0 0\n0 0 0\n1 0 0\n", "2 lines follow"),
    "outside.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "names point 3"),
    "edge.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n2 0 1\n", "2 corners"),
    "short.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n4 0 1 2\n", "announces 4 corners"),
    "flat.off": (b"OFF\n1 0 0\n0 0\n", "fewer than three"),
    "nan.off": (b"OFF\n2 0 0\n0 0 0\n0 nan 0\n", "point 1 is .* not finite"),
    "words.off": (b"OFF\n1 0 0\na b c\n", "could not convert"),
    "none.off": (b"OFF\n0 0 0\n", "no points"),
    "no.ply": (b"PK\3\4", "PLY header"),
    "format.ply": (PLY_HEADER.format("utf8", 1, "").encode() + b"0 0 0\n", "'format utf8 1.0' is not understood"),
    "noformat.ply": (b"ply\nelement vertex 0\nproperty int x\nend_header\n", "names no format"),
    "noprops.ply": (b"ply\nformat ascii 1.0\nelement vertex 9\nend_header\n", "no properties"),
    "noxyz.ply": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty int x\nend_header\n1\n", "need numbers x, y"),
    "novertex.ply": (b"ply\nformat ascii 1.0\nend_header\n", "no element 'vertex'"),
    "huge.ply": (PLY_HEADER.format(LITTLE, 10**15, "").encode() + bytes(12), "need 12000000000000000 bytes"),
    "hugetext.ply": (PLY_HEADER.format("ascii", 10**15, "").encode() + b"0 0 0\n", "1 are there"),
    "left.ply": (PLY_HEADER.format(LITTLE, 1, "").encode() + bytes(13), "1 bytes follow"),
    "short.ply": (PLY_HEADER.format("ascii", 1, "").encode() + b"0 0\n", "too short"),
    "long.ply": (PLY_HEADER.format("ascii", 1, "").encode() + b"0 0 0 0\n", "too long"),
    "facelist.ply": (PLY_HEADER.format("ascii", 1, NO_LIST).encode() + b"0 0 0\n1\n", "need a list"),
    "badface.ply": (PLY_HEADER.format("ascii", 1, LIST.format(1)).encode() + b"0 0 0\n3 0 0 -1\n", "names point -1"),
    "cut.ply": (PLY_HEADER.format(BIG, 1, LIST.format(1)).encode() + bytes(12) + b"\xff\0\0", "end early"),
    "zero.obj": (b"v 0 0 0\nf 0 1 1\n", "counts from 1"),
    "back.obj": (b"v 0 0 0\nf -2 1 1\n", "names point -1"),
    "long.obj": (b"v 0 0 0\nf 99999999999999999999 1 1\n", "too large|too big"),
    "none.obj": (b"o nothing\n", "no points"),
    "header.xyz": (b"x y z\n1 2 3\n", "could not convert"),
    "two.txt": (b"1 2\n", "fewer than three"),
    "ending.stl": (b"solid", "convert to one of .off"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_reported(tmp_path, name):
    content, fault = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=fault) as error:
        read_points(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert any(remedy in str(error.value) for remedy in ("repair, export or fetch", "again", "convert to"))


@pytest.mark.parametrize("name", ["little.ply", "text.ply", "plain.off", "mesh.obj"])
def test_every_truncation_ends_in_an_error_or_in_points(name):
    content = MESHES[name]
    for size in range(1, len(content)):
        try:
            points, _ = parse_points(content[:size], name)
        except ValueError as error:
            assert name in str(error)
        else:  # a cut inside a last number or a last face cannot be seen in text
            assert name != "little.ply" and len(points) <= len(POINTS)


def npy_header(shape, descr="<f8"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (npy_header((10**12, 3)) + bytes(24), "not a plain NumPy array"),
        (npy_header((10**30, 3)) + bytes(24), "not a plain NumPy array"),
        (npy_header((1, 3), "|O") + bytes(24), "not a plain NumPy array"),
        (npy_header((3,)) + bytes(24), r"shape \(3,\)"),
        (npy_header((1, 3), "<c8") + bytes(24), "complex64"),
        (npy_header((1, 3)) + np.array([0, np.inf, 0]).tobytes(), "not finite"),
        (npy_header((2, 3)) + bytes(24), "not a plain NumPy array"),
        (b"PK\3\4 no array", "not a plain NumPy array"),
        (b"\x93NUMPY\x01\x00\x76", "not a plain NumPy array"),
    ],
)
def test_npy_damage_is_reported(tmp_path, content, fault):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=fault) as error:
        read_points(tmp_path / "a.npy")
    assert "a.npy" in str(error.value) and "fetch the file again" in str(error.value)


def test_pickled_arrays_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a plain NumPy array"):
        read_points(tmp_path / "a.npy")


def test_missing_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"gone.off: there is no such file; check the path"):
        read_points(tmp_path / "gone.off")
    (tmp_path / "big.xyz").write_bytes(b"0 0 0\n" * 20)
    monkeypatch.setattr(readers, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="120 bytes are more than the 100 .* decimate or split"):
        read_points(tmp_path / "big.xyz")
