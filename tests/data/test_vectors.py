"""Documents of vectors, from every kind of file and layout, come out as they were put in; what is wrong is one line."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import write_file, write_stream

from longnet_cli.basics.errors import ConfigError, DataError, MemoryLimitError
from longnet_cli.data.documents import token_documents as documents
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.vectors import Vectors
from longnet_cli.data.files.opened_inputs import numpy_dtype

WIDTH, FLOAT = 5, pa.float32()
RNG = np.random.default_rng(0)
SLIDES = {
    name: RNG.normal(size=(rows, WIDTH)).astype(np.float32)
    for name, rows in (("a", 7), ("b", 1), ("c", 12))
}
PLACES = {name: RNG.integers(0, 9999, (len(x), 2)) for name, x in SLIDES.items()}


def vectors(x: np.ndarray, kind: str = "fixed", number: pa.DataType = FLOAT) -> pa.Array:
    flat = pa.array(x.astype(numpy_dtype(number)).ravel())
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    edges = np.arange(len(x) + 1) * x.shape[1]
    if kind == "list":
        return pa.ListArray.from_arrays(pa.array(edges, pa.int32()), flat)
    return pa.LargeListArray.from_arrays(pa.array(edges, pa.int64()), flat)


def by_row(kind: str = "fixed", coords: str = "coords", number: pa.DataType = FLOAT) -> pa.Table:
    """A row per vector."""
    columns = {"slide_id": pa.array([name for name, x in SLIDES.items() for _ in x])}
    columns["features"] = vectors(np.concatenate([*SLIDES.values()]), kind, number)
    places = np.concatenate([*PLACES.values()])
    if coords == "coords":
        columns["coords"] = vectors(places, "list", pa.int64())
    elif coords == "xy":
        columns |= {
            "x": pa.array(places[:, 0], pa.int32()),
            "y": pa.array(places[:, 1].astype(np.float64)),
        }
    return pa.table(columns)


def by_document(kind: str = "fixed") -> pa.Table:
    """A row per document."""
    edges = pa.array(np.cumsum([0, *map(len, SLIDES.values())]), pa.int32())
    inner = vectors(np.concatenate([*SLIDES.values()]), kind)
    places = vectors(np.concatenate([*PLACES.values()]), "fixed", pa.int64())
    columns = {"doc_id": [*SLIDES], "embeddings": pa.ListArray.from_arrays(edges, inner)}
    return pa.table(columns | {"coords": pa.ListArray.from_arrays(edges, places)})


def write(table: pa.Table, path: Path, rows: int = 1 << 20) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
        return path
    return (write_file if path.suffix == ".arrow" else write_stream)(path, table, rows)


def read(*names: Path | str, **options: Any) -> list[Vectors]:
    return [*Inputs(names, vectors=True, **options).documents()]


def check(found: list[Vectors], *, coords: bool = True, atol: float = 0.0) -> None:
    assert [x.doc_id for x in found] == [*SLIDES]
    for x in found:
        np.testing.assert_allclose(x.read(), SLIDES[x.doc_id], rtol=0, atol=atol)
        assert (len(x), x.width) == SLIDES[x.doc_id].shape
        for start, stop in ((0, 1), (2, 5), (6, 7), (3, 100)):
            np.testing.assert_allclose(
                x.read(start, stop), SLIDES[x.doc_id][start:stop], rtol=0, atol=atol
            )
        if coords:
            np.testing.assert_array_equal(x.coords, PLACES[x.doc_id])
        else:
            assert x.coords is None


@pytest.mark.parametrize("suffix", [".arrow", ".stream", ".parquet"])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(
    "layout",
    ["fixed", "list", "large", "xy", "none", "half", "double", "document", "document list"],
)
def test_every_layout(tmp_path, suffix, rows, layout):
    if layout.startswith("document"):
        table = by_document("list" if layout.endswith("list") else "fixed")
    else:
        kind = layout if layout in ("fixed", "list", "large") else "fixed"
        coords = layout if layout in ("xy", "none") else "coords"
        table = by_row(
            kind, coords, {"half": pa.float16(), "double": pa.float64()}.get(layout, pa.float32())
        )
    path = write(table, tmp_path / f"slides{suffix}", rows)
    check(read(path), coords=layout != "none", atol=4e-3 if layout == "half" else 0)


def test_a_pipe_and_pieces_that_go_to_disk(tmp_path, monkeypatch):
    data = write(by_row(), tmp_path / "slides.stream", 2).read_bytes()
    monkeypatch.setattr(documents, "SPOOL_BYTES", 64)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    check(read("-"))


def test_damage_within_a_document_leaves_out_the_rest_of_its_file(tmp_path):
    path = write(by_row(), tmp_path / "cut.stream", 2)
    path.write_bytes(path.read_bytes()[:-400])
    *_, last = read(path, skip_bad=True)
    assert last.file


def test_what_lies_in_a_file_is_not_read_before_it_is_wanted(tmp_path):
    found = read(write(by_row(), tmp_path / "slides.arrow", 3))
    assert not any(isinstance(part.ids, np.ndarray) for x in found for part in x.parts)


def test_without_ids_a_file_is_one_document(tmp_path):
    (found,) = read(write(by_row().drop_columns(["slide_id"]), tmp_path / "slide-7.parquet", 3))
    assert (found.doc_id, len(found)) == ("slide-7.parquet", 20)
    (empty,) = read(write(by_row().drop_columns(["slide_id"])[:0], tmp_path / "empty.arrow"))
    assert (empty.doc_id, len(empty)) == ("empty.arrow", 0)
    # of which nobody knows the documents
    with pytest.raises(DataError, match="the table has 0 rows"):
        read(write(by_row()[:0], tmp_path / "named.arrow"))
    several = read(write(by_document().drop_columns(["doc_id"]), tmp_path / "d.arrow"))
    assert [x.doc_id for x in several] == ["d.arrow:0", "d.arrow:1", "d.arrow:2"]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ({"patch_size": 256, "patch_size_level0": 512, "overlap": 0}, 512),  # TRIDENT
        ({"patch_size": 256, "patch_level": 1, "downsample": [4.0, 4.0]}, 1024),  # CLAM
        ({"patch_size": 256, "patch_level": 0}, 256),
        ({}, None),
    ],
)
def test_hdf5(tmp_path, attributes, size, batched):
    h5py = pytest.importorskip("h5py")
    for name, x in SLIDES.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["features"] = x[None] if batched else x
            file["coords"] = PLACES[name][None] if batched else PLACES[name]
            file["coords"].attrs.update(attributes)
            file["other"] = h5py.ExternalLink("/etc/hostname", "/")
    with h5py.File(tmp_path / "d.h5", "w") as file:  # a slide without tissue
        file["features"], file["coords"] = np.empty((0, WIDTH), np.float32), np.empty((0, 2), int)
    *found, empty = read(tmp_path)
    check(found)
    assert {x.tile_size for x in found} == {size}
    assert (empty.doc_id, len(empty)) == ("d", 0)


def test_hdf5_that_is_not_one_of_tiles(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = SLIDES["a"], PLACES["c"]
    with pytest.raises(DataError, match="different numbers of rows: features 7, coords 12"):
        read(path)
    with h5py.File(path, "w") as file:
        file["feats"] = SLIDES["a"].astype(np.int32)
    with pytest.raises(ConfigError, match="no column named features"):
        read(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged or truncated"):
        read(path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"pip install '.\[h5\]'"):
        read(path)


def test_hdf5_with_a_damaged_index_of_chunks(tmp_path):
    h5py = pytest.importorskip("h5py")
    for name in "ab":
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=SLIDES["a"], chunks=(2, WIDTH))
    path = tmp_path / "a.h5"
    path.write_bytes(path.read_bytes().replace(b"TREE\x01", b"TEAR\x01"))
    with pytest.raises(
        DataError, match=r"a\.h5: features: the data is damaged or truncated \(.*signature"
    ):
        read(tmp_path)
    bad, good = read(tmp_path, skip_bad=True)
    assert (bad.file, good.doc_id, len(good)) == (True, "b", 7)


def test_damaged_hdf5_is_one_line(tmp_path):
    """Whatever byte is another one, it is read, or refused in one line."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["features"], file["coords"] = SLIDES["a"], PLACES["a"]
        file["coords"].attrs["patch_size"] = 256
    whole, refused = (tmp_path / "whole.h5").read_bytes(), list[tuple[str, str]]()
    random = np.random.default_rng(0)
    for index in range(150):
        data = bytearray(whole)
        data[random.integers(8, len(data))] = random.integers(256)
        path = tmp_path / f"{index}.h5"
        path.write_bytes(data)
        try:
            [x.read() for x in read(path)]
        except (DataError, ConfigError, MemoryLimitError) as error:
            refused.append((str(path), str(error)))
    assert refused
    assert all(line.startswith(path) and "\n" not in line for path, line in refused)


def change(**columns: object) -> pa.Table:
    """A table of three vectors, with other columns."""
    base = {
        "slide_id": ["a", "a", "b"],
        "features": vectors(SLIDES["a"][:3]),
        "x": [0, 1, 2],
        "y": [0, 1, 2],
    }
    return pa.table({name: x for name, x in (base | columns).items() if x is not None})


NAN = SLIDES["a"][:3].copy()
NAN[1, 2] = np.nan
HUGE = SLIDES["a"][:3].astype(np.float64)
HUGE[2, 4] = 1e300


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            change(features=vectors(HUGE, number=pa.float64())),
            "row 2: number 4 of the vector is 1e+300",
        ),
        (
            change(features=pa.array([[[1.0]], [[1.0, 2.0], [1.0]], []]), x=None),
            "row 1: its vector has 2 numbers, those before it have 1",
        ),
        (change(x=pa.array([0.0, np.nan, 1.0])), "row 1: coordinates [nan, 1.0] are no place"),
        (change(x=["0", "1", "2"]), "x has type string: numbers are needed"),
        (
            change(coords=pa.array(["0,1", "1,2", "3,4"])),
            "coords has type string: lists of numbers are needed",
        ),
        (
            change(features=pa.array([[1], [2], [3]])),
            "with vectors, lists of float16, float32 or float64",
        ),
        (
            change(embedding=vectors(NAN)),
            "several columns may hold the documents (features, embedding): choose one",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, table, line):
    for suffix in (".arrow", ".parquet"):
        path = write(table, tmp_path / f"wrong{suffix}")
        with pytest.raises((DataError, ConfigError)) as caught:
            [x.read() for x in read(path)]
        assert line in str(caught.value)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_a_wrong_number_is_in_its_row_wherever_reading_begins(tmp_path):
    table = change(slide_id=["a"] * 3, features=vectors(HUGE, number=pa.float64()))
    (found,) = read(write_file(tmp_path / "x.arrow", table, 1))  # of three batches
    for start in range(3):
        with pytest.raises(DataError, match=r"row 2: number 4 of the vector is 1e\+300"):
            found.read(start)


def test_coordinates_that_are_not_wanted_are_not_looked_at(tmp_path):
    table = change(x=["a", "b", "c"]).replace_schema_metadata({"longnet.tile_size": "-3"})
    with pytest.raises(DataError, match="in its metadata is no size of a tile"):
        read(write(table, tmp_path / "s.arrow"))
    table = change(x=["a", "b", "c"], features=pa.array([[], [[1.0]], [[2.0, 3.0]]]))
    found = read(write(table, tmp_path / "s.arrow"), coords=False)
    assert [(len(x), x.width, x.coords) for x in found] == [(1, 1, None), (1, 2, None)]


def test_spans_that_start_again_are_refused(tmp_path):
    columns = {"doc_id": ["a"] * 4, "embedding": vectors(np.ones((4, 3)))}

    def of(*spans: int) -> Path:
        return write(
            pa.table(columns | {"span": pa.array(spans, pa.int32())}), tmp_path / "t.parquet"
        )

    assert [len(document) for document in read(of(0, 1, 2, 3))] == [4]
    with pytest.raises(DataError, match="row 2: part 0 of document 'a' stands where part 2 should"):
        read(of(0, 1, 0, 1))
