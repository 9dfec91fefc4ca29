"""Readers: all formats give the same points and faces; errors name the file."""

import io
import struct
import zipfile

import numpy as np
import pytest

from em_lightning.data import parse_points, read_points

POINTS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 0.5, 2]])
TRIANGLES = [[0, 1, 2], [0, 1, 4], [0, 2, 3]]  # the base of the pyramid as two triangles, and one of its sides

OFF_BODY = "\n".join(" ".join(map(str, p)) for p in POINTS) + "\n4 0 1 2 3 255 0 0\n3 0 1 4\n"
OBJ = (
    "# a pyramid\nmtllib x.mtl\n"
    + "".join("v " + " ".join(map(str, p)) + "\n" for p in POINTS)
    + "vn 0 0 1\nf 1/1/1 2//1 3/3 \\\n 4\nf -5 -4 -1\n"
)


def ply(form, faces=((0, 1, 2, 3), (0, 1, 4))):
    header = (
        f"ply\nformat {form} 1.0\ncomment hello\nelement vertex 5\nproperty uchar red\nproperty float x\n"
        f"property float y\nproperty double z\nelement face {len(faces)}\nproperty list uchar int vertex_indices\n"
        "property float quality\nelement edge 1\nproperty int a\nend_header\n"
    ).encode()
    if form == "ascii":
        rows = [f"7 {x} {y} {z}" for x, y, z in POINTS]
        rows += [" ".join(map(str, (len(face), *face, 0.5))) for face in faces] + ["9"]
        return header + "\n".join(rows).encode()
    order = "<" if "little" in form else ">"
    body = b"".join(struct.pack(order + "Bffd", 7, *p) for p in POINTS)
    for face in faces:
        body += struct.pack(f"{order}B{len(face)}if", len(face), *face, 0.5)
    return header + body + struct.pack(order + "i", 9)


MESHES = {
    "plain.off": f"OFF\n# comment\n5 2 0\n{OFF_BODY}".encode(),
    "together.off": f"OFF5 2 0\n{OFF_BODY}".encode(),
    "oneline.OFF": f"OFF 5 2\n\n{OFF_BODY}".replace("\n", "\r\n").encode(),
    "colored.off": f"COFF\n5 2 0 # counts\n{OFF_BODY}".encode(),
    "text.ply": ply("ascii"),
    "triangles.ply": ply("ascii", TRIANGLES),
    "little.ply": ply("binary_little_endian", TRIANGLES),
    "big.ply": ply("binary_big_endian", TRIANGLES),
    "mesh.obj": OBJ.encode(),
    "indented.obj": OBJ.replace("\n", "\n  ").encode(),
    "mark.obj": b"\xef\xbb\xbf" + OBJ[OBJ.index("v ") :].encode(),
    "comments.off": "OFF\n5 2 0\n# Å… 9 9 9\n".encode()
    + OFF_BODY.encode().replace(b"1.0 1.0 0.0", b"1.0 1.0 0.0 # \x85 9 9 9"),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes(tmp_path, name):
    (tmp_path / name).write_bytes(MESHES[name])
    points, faces = read_points(tmp_path / name)
    assert points.dtype == np.float64 and faces.dtype == np.int64
    np.testing.assert_array_equal(points, POINTS)
    assert sorted(sorted(face) for face in faces.tolist()) == TRIANGLES


PCD = (
    "# .PCD v0.7\nVERSION 0.7\nFIELDS label x y z normal\nSIZE 1 4 4 4 2\nTYPE U F F F U\nCOUNT 1 1 1 1 2\nWIDTH {}\n"
    "HEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {}\nDATA {}\n"
)


def pcd_rows(*rows):
    return b"".join(struct.pack("<BfffHH", *row) for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xyz", b"# x y z\n1 2 3 9\n4 5 6 9\n"),
        ("b.txt", b"1,2,3\n\n4,5,6\n"),
        ("spaces.csv", b"1, 2, 3\r\n4, 5, 6\r\n"),
        ("semicolons.csv", b"x;y;z;label\n1;2;3;chair\n4;5;6;table"),
        ("count.pts", b"2\n1 2 3 9 9 9\n4 5 6 9 9 9"),
        ("scans.pts", b"1\n1 2 3 -700 8 8 8\n1\n4 5 6 -600 8 8 8\n"),
        ("count.txt", b"2\r\n1 2 3\r\n4 5 6\r\n"),
        ("macintosh.txt", b"x y z\r1 2 3\r4 5 6\r"),
        ("text.pcd", PCD.format(2, 2, "ascii").encode() + b"9 1 2 3 7 7\n9 4 5 6 7 7\n"),
        (
            "rows.pcd",
            PCD.format(2, 2, "binary").encode() + pcd_rows((9, 1, 2, 3, 7, 7), (9, 4, 5, 6, 7, 7)),
        ),
        ("mark.pcd", b"\xef\xbb\xbf# \x85\n" + PCD.format(2, 2, "ascii").encode() + b"9 1 2 3 7 7\n9 4 5 6 7 7\n"),
        ("mark.txt", b"\xef\xbb\xbf1\t2\t3\n4\t5\t6\n"),
        ("windows.csv", "x,y,z\r\n1,2,3\r\n4,5,6\r\n".encode("utf-16")),
        ("cp1252.xyz", "# scan 1… 10 20 30\n1 2 3\n4 5 6\n".encode("cp1252")),
        ("controls.xyz", b"# \x0b7 8 9\x0c7 8 9\x1c7 8 9\x1d7 8 9\x1e7 8 9\x857 8 9\n1 2 3\n4 5 6"),
        ("controls.off", b"OFF\n# \x0b7 8 9\x1e7 8 9\n2 0 0\n1 2 3 # \x85\n4 5 6"),
        (
            "edge.ply",
            b"ply\nformat ascii 1.0\ncomment \xc3\x85\x85 \xe5\nelement vertex 2\nproperty float x\nproperty float y\n"
            b"property float z\nelement edge 1\nproperty int vertex1\nproperty int vertex2\nend_header\n"
            b"1 2 3\n4 5 6\n0 1\n",
        ),
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


def test_stl(tmp_path):
    triangle = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4")
    rows = "".join(f"vertex {x} {y} {z}\n" for x, y, z in triangle)
    text = f"solid a\nfacet normal 0 0 1\nouter loop\n{rows}endloop\nendfacet\nendsolid a\n".encode()
    binary = bytes(80) + struct.pack("<I3f", 1, 0, 0, 1) + triangle.tobytes() + bytes(2)
    for content in (text, binary):
        points, faces = parse_points(content, "a.stl")
        np.testing.assert_array_equal(points[faces[0]], triangle)
    damaged = (text.replace(b"1.0 0.0 0.0", b"1.0 x 0.0"), text[:-40], binary[:-1], binary + b"1")
    for content in (*damaged, (text + text)[:-40]):  # trimesh leaves out a truncated second solid
        with pytest.raises(ValueError, match="a.stl"):
            parse_points(content, "a.stl")


def test_three_points_with_further_columns():
    """Text has one point per line, so three rows are three points; an array of three rows may be transposed."""
    points, _ = parse_points(b"1 2 3 9 9 9\n4 5 6 9 9 9\n7 8 9 9 9 9\n", "a.xyz")
    assert points.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for columns in (4, 6, 1000):
        with pytest.raises(ValueError, match=rf"\(3, {columns}\).*transpose"):
            parse_points(npy(np.ones((3, columns))), "a.npy")


def test_coordinates_keep_the_digits_of_the_file(tmp_path):
    far = "800000.123 5000000.456 0.789"
    header = PLY_HEADER.format("ascii", 1, "")
    for name, content in {
        "a.xyz": far,
        "a.off": f"OFF\n1 0 0\n{far}\n",
        "a.obj": f"v {far}\n",
        "a.ply": header + far,
    }.items():
        points, _ = parse_points(content.encode(), name)
        assert points.tolist() == [[800000.123, 5000000.456, 0.789]]


PLY_HEADER = (
    "ply\nformat {} 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n{}end_header\n"
)
LITTLE, BIG = "binary_little_endian", "binary_big_endian"
NO_LIST = "element face 1\nproperty int a\n"
LIST = "element face {}\nproperty list uchar int vertex_indices\n"

# File content and a regular expression for the message.
BROKEN = {
    "empty.off": (b"", "OFF"),
    "header.off": (b"FOO\n1 0 0\n0 0 0\n", "OFF"),
    "binary.off": (b"OFF BINARY\n\0\0\0", "OFF"),
    "counts.off": (b"OFF\n", "OFF"),
    "negative.off": (b"OFF\n-1 2 0\n0 0 0\n", "OFF"),
    "huge.off": (b"OFF\n999999999999 9999999999 0\n0 0 0\n", "1009999999998 .* 1 lines"),
    "truncated.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n", "4 .* 2 lines"),
    "longer.off": (b"OFF\n1 0 0\n0 0 0\n1 0 0\n", "1 .* 2 lines"),
    "outside.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", ""),
    "flat.off": (b"OFF\n1 0 0\n0 0\n", ""),
    "nan.off": (b"OFF\n2 0 0\n0 0 0\n0 nan 0\n", "point 1 .*nan.* drop_non_finite"),
    "words.off": (b"OFF\n1 0 0\na b c\n", ""),
    "none.off": (b"OFF\n0 0 0\n", "no points"),
    "no.ply": (b"PK\3\4", "PLY"),
    "format.ply": (PLY_HEADER.format("utf8", 1, "").encode() + b"0 0 0\n", ""),
    "noformat.ply": (b"ply\nelement vertex 0\nproperty int x\nend_header\n", ""),
    "noprops.ply": (b"ply\nformat ascii 1.0\nelement vertex 9\nend_header\n", "9 rows .* 0"),
    "noxyz.ply": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty int x\nend_header\n1\n", ""),
    "novertex.ply": (b"ply\nformat ascii 1.0\nend_header\n", "no points"),
    "huge.ply": (PLY_HEADER.format(LITTLE, 10**15, "").encode() + bytes(12), ""),
    "hugetext.ply": (PLY_HEADER.format("ascii", 10**15, "").encode() + b"0 0 0\n", "1000000000000000 rows .* 1"),
    "left.ply": (PLY_HEADER.format(LITTLE, 1, "").encode() + bytes(13), ""),
    "short.ply": (PLY_HEADER.format("ascii", 1, "").encode() + b"0 0\n", ""),
    "words.ply": (PLY_HEADER.format("ascii", 2, "").encode() + b"0 0 0\n0 0 0 x\n", "numbers"),
    "facelist.ply": (PLY_HEADER.format("ascii", 1, NO_LIST).encode() + b"0 0 0\n1\n", ""),
    "badface.ply": (PLY_HEADER.format("ascii", 1, LIST.format(1)).encode() + b"0 0 0\n3 0 0 -1\n", "point -1"),
    "cut.ply": (PLY_HEADER.format(BIG, 1, LIST.format(1)).encode() + bytes(12) + b"\xff\0\0", ""),
    "polygons.ply": (ply(LITTLE), "triangles"),
    "zero.obj": (b"v 0 0 0\nf 0 1 1\n", "from 1"),
    "words.obj": (b"v 0 0 0\nf 1 1 1\nf 1 x 1 1\n", "integers"),
    "back.obj": (b"v 0 0 0\nf -2 1 1\n", ""),
    "relative.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 -1\nv 0 0 1\nf -3 -2 -1\n", "absolute"),
    "long.obj": (b"v 0 0 0\nf 99999999999999999999 1 1\n", ""),
    "none.obj": (b"o nothing\n", "no points"),
    "header.xyz": (b"x y z\n1 2 3\nx y z\n", "'x'"),
    "chemistry.xyz": (b"2\nwater\nH 0 0 0\n", "'H'"),
    "comma.xyz": (b"0,5;1,5;2,5\n3,5;4,5;5,5\n", "decimal commas .*'0,5;1,5;2,5'"),
    "comma.txt": (b"0,5\t1,5\t2,5\n", "decimal commas .*0,5"),
    "comma.pts": (b"1\n0,5  1,5  -2,5\n", "decimal commas .*0,5"),
    "header.csv": (b"x;y;z\n0,5;1,5;2,5\n", "decimal commas .*0,5"),
    "integers.csv": (b"1,5;2;3\n", "decimal commas .*1,5"),
    "header.pcd": (b"1 2 3\n", "DATA"),
    "count.pcd": (PCD.format(2, 2, "ascii").encode() + b"9 1 2 3 7 7\n", "2 points .* 1 follow"),
    "cut.pcd": (PCD.format(2, 2, "binary").encode() + bytes(20), ""),
    "longer.pcd": (PCD.format(1, 1, "binary").encode() + bytes(34), "1 points .* 2 follow"),
    "packed.pcd": (PCD.format(2, 2, "binary_compressed").encode() + bytes(9), "binary_compressed"),
    "fields.pcd": (PCD.format(1, 1, "ascii").replace("x y z", "x y w").encode() + b"9 1 2 3 7 7\n", "'z'"),
    "comma.csv": (b"x;y;z\n1;2;3\n1,5;2;3\n", "'1,5'"),
    "wide.txt": (b"\n".join([b" ".join([b"1"] * 100)] * 3), r"\(3, 100\).*transpose"),
    "gap.csv": (b"1,2,3,4\n1,,3,4\n", "''"),
    "two.txt": (b"1 2\n", r"\(1, 2\)"),
    "empty.txt": (b"", "no points"),
    "ending.las": (b"solid", ".off, .ply"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_corrupt_files_raise(tmp_path, name):
    content, fault = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=fault or None) as error:
        read_points(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["little.ply", "text.ply", "plain.off", "mesh.obj"])
def test_truncated_files_raise_or_return_a_prefix(name):
    content = MESHES[name]
    for size in range(len(content)):
        try:
            points, _ = parse_points(content[:size], name)
        except ValueError as error:
            assert name in str(error)
        else:  # a cut inside the last number or face of a text cannot be detected
            assert name != "little.ply" and len(points) <= len(POINTS)


def test_non_finite_points_are_dropped_on_request(tmp_path):
    content = b"nan 0 0\n1 2 3\n4 inf 6\n7 8 9\n"
    assert parse_points(content, "a.xyz", drop_non_finite=True)[0].tolist() == [[1, 2, 3], [7, 8, 9]]
    mesh = b"OFF\n5 2 0\nnan 0 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n3 0 1 2\n3 1 3 4\n"
    points, faces = parse_points(mesh, "a.off", drop_non_finite=True)
    assert points.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]] and faces.tolist() == [[0, 2, 3]]
    with pytest.raises(ValueError, match="no points"):
        parse_points(b"nan 0 0\n", "a.xyz", drop_non_finite=True)


def npy_header(shape, descr="<f8"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("packed", [False, True])
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
        (npy(np.zeros((3, 1024))), r"\(3, 1024\).*transpose"),
        (npy(np.zeros((6, 50))), r"\(6, 50\).*transpose"),
    ],
)
def test_corrupt_arrays_raise(tmp_path, content, fault, packed):
    path = tmp_path / ("a.npz" if packed else "a.npy")
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("points.npy", content)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=None if packed else fault) as error:
        read_points(path)
    assert path.name in str(error.value)


def test_npz(tmp_path):
    points = np.random.rand(5, 3)
    np.savez(tmp_path / "one.npz", cloud=points)
    np.savez_compressed(tmp_path / "two.npz", points=points, labels=np.arange(5))
    np.savez(tmp_path / "many.npz", a=points, b=points)
    for name in ("one.npz", "two.npz"):
        np.testing.assert_array_equal(read_points(tmp_path / name)[0], points)
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4")
    for name in ("many.npz", "bad.npz"):
        with pytest.raises(ValueError, match=name):
            read_points(tmp_path / name)


def test_pickled_arrays_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a plain NumPy array"):
        read_points(tmp_path / "a.npy")


def test_missing_file_raises_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.off"):
        read_points(tmp_path / "gone.off")
