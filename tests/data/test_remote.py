"""Proves that inputs in a store are read like local ones: URIs, folders, globs, every format, one line for a failure.

The store is a local folder behind a pyarrow filesystem.
"""

import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from longnet_cli.basics.errors import ConfigError, DataError, InputWarning
from longnet_cli.data import remote
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tokenizer import Tokenizer

IDS = [[104, 105], [1, 2, 3], [255]]
TABLE = pa.table({"input_ids": pa.array(IDS, pa.large_list(pa.int32()))})


def fill(filesystem: fs.FileSystem, folder: str) -> None:
    """Shards of every kind, a hidden file, and a folder of text."""
    for name in (
        "deep/part-10.arrow",
        "part-2.arrow",
        "part-10.arrow",
        "stream.arrow",
        "x.parquet",
        "y.jsonl",
        "text/a b.txt",
    ):
        filesystem.create_dir(str(Path(folder, name).parent), recursive=True)
        with filesystem.open_output_stream(f"{folder}/{name}") as file:
            if name.endswith("parquet"):
                pq.write_table(TABLE, file)
            elif name.endswith("jsonl"):
                file.write(b"".join(b'{"input_ids": %s}\n' % str(ids).encode() for ids in IDS))
            elif name.endswith("txt"):
                file.write(b"hi")
            else:
                with (ipc.new_stream if "stream" in name else ipc.new_file)(file, TABLE.schema) as writer:
                    writer.write_table(TABLE, max_chunksize=2)
    with filesystem.open_output_stream(f"{folder}/part-3.arrow.tmp") as file:
        file.write(b"half")


def read(*uris: str, tokenizer: Tokenizer | None = None) -> list[list[int]]:
    return [document.read().tolist() for document in Inputs(uris, tokenizer).documents()]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `store://` URIs name, as a filesystem of another kind than local files."""
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    fill(filesystem, "bucket")

    def connect(uri: str) -> tuple[fs.FileSystem, str]:
        return filesystem, uri.removeprefix("store://").partition("?")[0]

    monkeypatch.setattr(remote, "connect", connect)
    return tmp_path / "bucket"


def test_every_format_is_read_from_a_store(store):
    for name in ("part-2.arrow", "stream.arrow", "x.parquet", "y.jsonl", "deep/part-10.arrow"):
        assert read(f"store://bucket/{name}") == IDS
    assert read("store://bucket/text/a b.txt", tokenizer=Tokenizer.bytes()) == [[104, 105]]


def test_folders_and_globs_are_as_on_a_disk(store):
    names = ["part-2.arrow", "part-10.arrow", "stream.arrow", "x.parquet"]
    beside = r": 4 files are not read beside the 4 files like part-2.arrow: deep/part-10.arrow, .*; '.*/\*\*/\*.arrow'"
    with pytest.warns(InputWarning, match=beside):
        found = [*Inputs(["store://bucket/"]).sources]
    with pytest.warns(InputWarning, match=beside):
        assert [source.name for source in found] == names == [source.name for source in Inputs([store]).sources]
    assert found[0].where == "store://bucket/part-2.arrow"
    assert [source.name for source in Inputs(["store://bucket/p*.arrow?region=x"]).sources] == names[:2]
    assert len(Inputs(["store://bucket/**/*.arrow"]).sources.found) == 4
    assert read("store://bucket/part*.arrow") == IDS * 2


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["gs://longnet-no-bucket/x", "gs://longnet-no-bucket/*", "s3://longnet-no-bucket/x"])
def test_a_store_that_is_not_reached_is_told_soon(uri):
    """Without a network, or a bucket of that name: Google's library goes on trying for 15 minutes."""
    begun = time.monotonic()
    with pytest.raises(DataError, match=rf"^{re.escape(uri)}: ") as caught:
        read(uri)
    assert (time.monotonic() - begun < 15, len(str(caught.value)) < 700) == (True, True)


def test_a_failure_is_one_line_that_names_the_uri(store):
    (store / "bad.arrow").write_bytes((store / "part-2.arrow").read_bytes()[:-3])
    (store / "empty.arrow").touch()
    (store / "no").mkdir()
    for uri, problem in [
        ("store://bucket/nope.arrow", "no such file or folder"),
        ("store://bucket/*.csv", "no file matches"),
        ("store://bucket/no", "no such file or folder"),
        ("store://bucket/bad.arrow", "truncated: the index at the end"),
        ("store://bucket/empty.arrow", "the file is empty"),
    ]:
        with pytest.raises(DataError, match=problem) as caught:
            read(uri)
        assert str(caught.value).startswith(uri)
        assert "\n" not in str(caught.value)
    (found,) = Inputs(["store://bucket/x.parquet"]).sources
    (store / "x.parquet").unlink()
    with pytest.raises(DataError, match=r"^store://bucket/x.parquet: cannot read: "):
        remote.open_remote(found.filesystem, str(found.path), found.where)


def test_file_uris_are_local_files(tmp_path):
    folder = tmp_path / "a b"
    fill(fs.LocalFileSystem(), str(folder))
    uri = folder.as_uri()
    assert "%20" in uri
    assert read(f"{uri}/part-2.arrow") == read(f"{uri}/part-1*.arrow") == IDS
    with pytest.warns(InputWarning, match="4 files are not read .*: deep"):
        (source, *_) = Inputs([uri]).sources
    assert (source.path, source.filesystem) == (folder / "part-2.arrow", None)  # so it is mapped


def test_what_nobody_can_reach_is_a_mistake(monkeypatch):
    for uri in ("zz://bucket/x", "nope+more://x"):
        with pytest.raises(ConfigError, match=r"no filesystem is known for (zz|nope\+more)://|pip install fsspec"):
            read(uri)
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="zz://bucket/x: zz:// needs a package: pip install fsspec"):
        read("zz://bucket/x")


def test_fsspec_reaches_what_pyarrow_cannot():
    memory = pytest.importorskip("fsspec", reason="fsspec is not installed").filesystem("memory")
    fill(fs.PyFileSystem(fs.FSSpecHandler(memory)), "/bucket")
    assert read("memory://bucket/part-2.arrow") == read("memory://bucket/x.parquet") == IDS
    names = [source.name for source in Inputs(["memory://bucket/part*.arrow"]).sources]
    assert names == ["part-2.arrow", "part-10.arrow"]
