"""`longnet encode` of vectors: a slide encoder's golden tensors from every format, chunks, ranks and resumed runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import torch
from builders import level_options, read_golden, slide, slide_encoder
from files import write_file, write_stream
from safetensors.torch import save_file
from torch import Tensor

from longnet_cli.basics.errors import DataError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.slide import SlideEncoder

ENCODE = "encode --model ./model --no-normalize -o out.arrow"
SLIDES = {"s1": 70, "s2": 131, "s3": 1, "s4": 40}  # tiles


def tiles(x: Tensor, at: Tensor | None, slide_id: str, number: type = np.float32) -> pa.Table:
    columns = {
        "features": pa.FixedSizeListArray.from_arrays(
            pa.array(x.numpy().astype(number).ravel()), x.shape[1]
        )
    }
    if at is not None:
        columns["coords"] = pa.FixedSizeListArray.from_arrays(pa.array(at.numpy().ravel()), 2)
    return pa.table({"slide_id": [slide_id] * len(x), **columns})


def slides(number: type = np.float32) -> pa.Table:
    return pa.concat_tables(
        tiles(*slide(count, seed), name, number)
        for seed, (name, count) in enumerate(SLIDES.items())
    )


def stream(table: pa.Table) -> bytes:
    return write_stream(pa.BufferOutputStream(), table, 50).getvalue().to_pybytes()


def vectors(path: Path, column: str = "embedding") -> dict[str, np.ndarray]:
    table = pq.read_table(path) if path.suffix == ".parquet" else ipc.open_file(path).read_all()
    return dict(
        zip(table["doc_id"].to_pylist(), map(np.array, table[column].to_pylist()), strict=True)
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    slide_encoder().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def expected(pool: str = "mean", **options: object) -> dict[str, np.ndarray]:
    found = {}
    for seed, (name, count) in enumerate(SLIDES.items()):
        x, at = slide(count, seed)
        found[name] = slide_encoder()(x[None], at[None], pool=pool, **options)
    return {name: x[..., 0, :].numpy() for name, x in found.items()}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    assert [*found] == [*wanted]
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=atol)


@pytest.mark.ci
def test_golden_through_every_format(run_longnet, tmp_path):
    """`convert`, then `encode`: the official vectors, out of Parquet, an Arrow stream on a pipe, and HDF5."""
    h5py = pytest.importorskip("h5py")
    state, wanted, theirs = read_golden("slide_encoder_zero_key")
    save_file(state, tmp_path / "slide_encoder.safetensors")
    run_longnet("convert slide_encoder.safetensors -o model", *level_options(theirs), code=0)
    table = tiles(wanted["features"], wanted["coords"], "slide")
    pq.write_table(table, tmp_path / "slide.parquet")
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["features"], file["coords"] = wanted["features"].numpy(), wanted["coords"].numpy()
        file["coords"].attrs["patch_size_level0"] = 256
    for source in ("slide.parquet", "slide.h5", "-"):
        for pool, name in (("cls", "cls"), ("mean", "pooled")):
            words = [f"{ENCODE} --pool {pool}", source]
            run_longnet(*words, input=stream(table), text=False, code=0)
            same(vectors(tmp_path / "out.arrow"), {"slide": wanted[name].numpy()}, 1e-4)


def test_python_agrees_with_the_command_about_tiles_of_512_pixels(run_longnet, tmp_path, model):
    h5py = pytest.importorskip("h5py")
    features, coords = slide(90)
    coords = coords // 256 * 512
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["features"], file["coords"] = features.numpy(), coords.numpy()
        file["coords"].attrs["patch_size_level0"] = 512
    run_longnet(ENCODE, "slide.h5", code=0)
    encoder = SlideEncoder.from_pretrained(model)
    with torch.no_grad():
        found = encoder(features[None], coords[None], tile_size=512)
    same(vectors(tmp_path / "out.arrow"), {"slide": found[0].numpy()})


def test_the_default_is_the_mean_scaled_to_length_one(run_longnet, tmp_path, model):
    words = "encode --model ./model -o out.arrow -"
    run_longnet(words, input=stream(slides()), text=False, code=0)
    scaled = {name: x / np.linalg.norm(x) for name, x in expected().items()}
    same(vectors(tmp_path / "out.arrow"), scaled)
    table = ipc.open_file(tmp_path / "out.arrow").read_all()
    assert table["n_tokens"].to_pylist() == [*SLIDES.values()]


def test_vectors_of_vectors(run_longnet, tmp_path):
    """What `encode --span` writes is read by a net without coordinates, and by a LongNet without a vocabulary."""
    (tmp_path / "book.txt").write_text("a long way from here " * 60)
    run_longnet("encode book.txt --span 16 -o chunks.arrow", code=0)
    chunks = ipc.open_file(tmp_path / "chunks.arrow").read_all()["embedding"]
    x = torch.tensor(chunks.to_pylist())
    encoder = slide_encoder(in_features=x.shape[1], grid=0, position="rope")
    encoder.save_pretrained(tmp_path / "books")
    sizes = {"vocab_size": 0, "dim": x.shape[1], "num_layers": 1, "num_heads": 4, "ffn_dim": 32}
    levels = {"segment_lengths": (16, 64), "dilation_rates": (1, 4)}
    net = LongNet(LongNetConfig(**sizes, **levels, causal=True, position="rope")).eval()
    net.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        wanted = {"books": encoder(x[None])[0], "plain": net(embeddings=x[None])[0].mean(0)}
    for name, vector in wanted.items():
        for chunk in ("8", "1Ki"):
            words = f"encode chunks.arrow --no-normalize -o out.arrow --model ./{name} --chunk"
            run_longnet(words, chunk, code=0)
            same(vectors(tmp_path / "out.arrow"), {"book.txt": vector.numpy()})


def test_spans_of_a_slide(run_longnet, tmp_path, model):
    x, at = slide(50)
    pq.write_table(tiles(x, at, "s"), tmp_path / "s.parquet")
    words = "encode s.parquet --model ./model --span 20 --no-normalize --chunk 16 -o out.parquet"
    run_longnet(words, code=0)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["end"].to_pylist() == [20, 40, 50]
    encoder = slide_encoder()
    with torch.no_grad():
        rows = encoder.net.rows(x[None], at[None], torch.tensor([50]))
        hidden = encoder.net(rows)[0, 1:]
        wanted = torch.stack([encoder.net.head(part.mean(0)) for part in hidden.split(20)])
    np.testing.assert_allclose(np.array(found["embedding"].to_pylist()), wanted, rtol=0, atol=1e-5)


def test_tiles_that_share_a_cell_are_told(run_longnet, tmp_path, model):
    """Coordinates that count tiles of 8, read as pixels of tiles of 256; with --tile-size 8 there is no word."""
    at = 8 * torch.cartesian_prod(torch.arange(20), torch.arange(20))
    pq.write_table(tiles(torch.randn(400, 6), at, "s"), tmp_path / "s.parquet")
    first, last = run_longnet(f"{ENCODE} s.parquet", code=0).stderr.splitlines()
    assert "the 400 tiles of 's' fall into 1 cell of 256 pixels: a tile of 8 would fit" in first
    assert last == "1 vector of 400 tokens -> out.arrow"
    before = vectors(tmp_path / "out.arrow")["s"]
    assert run_longnet(f"{ENCODE} s.parquet --tile-size 8 -q", code=0).stderr == ""
    assert not np.allclose(vectors(tmp_path / "out.arrow")["s"], before)


def edited(nested: bool, name: str, tile: int | None, value: object) -> pa.Table:
    """The slides, a row each or a row per tile. In s2, one tile or all of it has another value."""
    kinds = {"features": pa.list_(pa.float32()), "coords": pa.list_(pa.int64())}
    parts = [slides().filter(pc.field("slide_id") == slide) for slide in SLIDES]
    columns = {key: [part[key].to_pylist() for part in parts] for key in kinds}
    rows = columns[name][1]
    columns[name][1] = value if tile is None else [*rows[:tile], value, *rows[tile + 1 :]]
    if nested:
        lists = {key: pa.array(x, pa.list_(kinds[key])) for key, x in columns.items()}
        return pa.table({"slide_id": [*SLIDES], **lists})
    flat = {
        key: pa.array([cell for rows in x for cell in rows], kinds[key])
        for key, x in columns.items()
    }
    return pa.table({"slide_id": slides()["slide_id"], **flat})


BAD = [
    ("features", 30, [1.0, None, 3.0, 4.0, 5.0, 6.0], "a number of the vector is null"),
    ("features", 30, [1.0, np.nan, 3.0, 4.0, 5.0, 6.0], "number 1 of the vector is nan"),
    ("features", 30, None, "the value is null"),
    ("features", 30, [1.0, 2.0], "its vector has 2 numbers, those before it have 6"),
    ("coords", 30, None, "coords needs two numbers for each vector"),
    ("coords", 30, [1], "coords needs two numbers for each vector"),
    ("coords", 30, [1, None], "coordinates [1.0, nan] are no place"),
    ("features", None, None, "the value is null"),
    ("coords", None, None, "131 vectors and 0 coordinates"),
    ("coords", None, [[1, 2]] * 9, "131 vectors and 9 coordinates"),
]


@pytest.mark.parametrize(
    ("nested", "bad"),
    [(nested, bad) for bad in BAD for nested in (False, True) if nested or bad[1] is not None],
)
def test_a_bad_slide_is_left_out_as_if_it_were_not_there(run_longnet, tmp_path, model, nested, bad):
    table, line = edited(nested, *bad[:3]), bad[3]
    pq.write_table(table, tmp_path / "x.parquet")
    write_file(tmp_path / "x.arrow", table, 1000)
    for path in (tmp_path / "x.parquet", tmp_path / "x.arrow"):
        with pytest.raises(
            DataError, match=rf"{path.name}, row {1 if nested else 100}\b.*: {re.escape(line)}"
        ):
            [x.read() for x in Inputs([path], vectors=True).documents()]
    if bad not in BAD[::4]:  # the command leaves out whatever the reader refuses
        return
    words = "encode --model ./model --keep slide_id -o out.arrow", path
    done = run_longnet(*words, "--skip-bad", code=6)
    left_out, _, *others = done.stderr.splitlines()
    assert left_out.startswith(f"longnet: note: left out: {path}, row ")
    assert line in left_out
    assert others == ["longnet: note: 1 document left out"]
    found = (tmp_path / "out.arrow").read_bytes()
    write_file(path, table.filter(pc.field("slide_id") != "s2"), 1000)
    run_longnet(*words, code=0)
    assert found == (tmp_path / "out.arrow").read_bytes()
    names = ipc.open_file(tmp_path / "out.arrow").read_all()["slide_id"]
    assert names.to_pylist() == ["s1", "s3", "s4"]


def test_files_of_vectors_that_cannot_be_read_are_left_out(run_longnet, tmp_path, model):
    """A missing and a truncated file; an empty document is passed over, and --dry-run counts the same."""
    table = edited(True, "features", None, [])
    empty = edited(True, "coords", None, [])["coords"]
    pq.write_table(table.set_column(2, "coords", empty), tmp_path / "good.parquet")
    data = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    words = f"{ENCODE} missing.parquet cut.parquet good.parquet"
    run_longnet(words, code=3)
    said = run_longnet(words, "--skip-bad", code=6).stderr.splitlines()
    noted = "longnet: note: left out: "
    assert said[0] == f"{noted}missing.parquet: no such file or folder"
    assert said[1].startswith(f"{noted}cut.parquet: the data is damaged or truncated")
    assert said[2] == "3 vectors of 111 tokens -> out.arrow"
    assert said[3:] == ["longnet: note: 1 document empty", "longnet: note: 2 files left out"]
    others = {name: x for name, x in expected().items() if name != "s2"}
    same(vectors(tmp_path / "out.arrow"), others)
    done = run_longnet(words, "--skip-bad", "--dry-run", "--format", "json")
    found = json.loads(done.stdout)
    assert (found["documents"], found["left_out"], found["tokens"]) == (3, 2, 111)
    assert "longnet: note: 1 document empty" in done.stderr.splitlines()
