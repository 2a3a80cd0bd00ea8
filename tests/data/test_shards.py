"""Proves that a folder of shards is whole or says that it is not, and resumes anywhere to the same bytes.

A resumed run refuses inputs with other contents and a damaged manifest, and takes everything else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.ipc as ipc
import pytest
from builders import tiny_model
from files import write_rows
from processes import contents

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.basics.events import LeftOut
from longnet_cli.basics.sealed_manifests import seal
from longnet_cli.data.documents.input_documents import END, Inputs, content_digest
from longnet_cli.data.files.input_files import InputFile
from longnet_cli.data.files.manifest import UNFINISHED, read_manifest
from longnet_cli.data.outputs.shards import ShardFolder

FINISHED = "_manifest.arrow"

# Rows of embeddings, to show that nothing here knows of tokens: a document has several.
SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("embedding", pa.list_(pa.float32(), 2))],
    metadata={"longnet.model": "m"},
)
SETTINGS = {"model": "m", "pool": "mean", "stride": None, "sizes": (1, 2)}


def rows(document: int) -> pa.RecordBatch:
    vectors = pa.array([[document, row] for row in range(3)], SCHEMA.field("embedding").type)
    return pa.record_batch([pa.array([str(document)] * 3), vectors], schema=SCHEMA)


def write(
    place: Path,
    *,
    documents: int = 7,
    fail_at: int | None = None,
    resume: bool = False,
    format="arrow",
    **settings,
) -> ShardFolder:
    """Two documents a shard; `fail_at` raises before that document."""
    about = {
        "settings": SETTINGS | settings,
        "name": "vectors",
        "format": format,
        "left_out": LeftOut(),
    }
    with ShardFolder(place, SCHEMA, **about, resume=resume) as folder:
        for document in range(folder.totals["documents"], documents):
            if document == fail_at:
                raise KeyboardInterrupt
            folder.write(rows(document), documents=1, tokens=10)
            if document % 2:
                folder.end_shard()
    return folder


def interrupt(place: Path, fail_at: int, **options) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(place, fail_at=fail_at, **options)


def test_a_finished_folder_holds_its_shards_and_a_manifest_of_them(tmp_path):
    folder = write(tmp_path / "new" / "out")
    names = [f"vectors-0000{index}.arrow" for index in range(4)]
    assert sorted(os.listdir(folder.folder)) == [FINISHED, *names]
    assert [path.name for path in folder.paths] == names
    assert folder.finished
    assert dict(folder.totals) == {"rows": 21, "documents": 7, "tokens": 70}
    assert (found := read_manifest(folder.folder)).totals == folder.totals
    assert found.shards[3] == {"name": names[3], "rows": 3, "documents": 1, "tokens": 10}
    tables = [ipc.open_file(path).read_all() for path in folder.paths]
    assert pa.concat_tables(tables)["doc_id"].to_pylist() == [str(row // 3) for row in range(21)]


@pytest.mark.parametrize("fail_at", range(7))
def test_a_run_resumed_anywhere_gives_the_same_bytes(tmp_path, fail_at):
    interrupt(tmp_path / "out", fail_at)
    finished = [f"vectors-0000{index}.arrow" for index in range(fail_at // 2)]
    assert sorted(os.listdir(tmp_path / "out")) == [UNFINISHED, *finished]
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    write(tmp_path / "out", resume=True)
    write(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert before == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    again = write(tmp_path / "out", documents=0, resume=True)  # nothing to do
    assert again.finished
    assert again.totals["documents"] == 7


def test_without_resume_only_a_folder_without_finished_shards_is_taken(tmp_path):
    interrupt(tmp_path, 1)
    interrupt(tmp_path, 3, model="another")
    with pytest.raises(ConfigError, match=r"an unfinished data set: go on with --resume"):
        write(tmp_path, model="another")
    write(tmp_path, model="another", resume=True)
    with pytest.raises(ConfigError, match="a finished data set"):
        write(tmp_path, model="another")


def test_a_file_that_no_manifest_lists_is_not_replaced(tmp_path):
    """But for the shard that a run has left which was killed before it could list it."""
    interrupt(tmp_path / "out", 3)
    write(tmp_path / "whole")
    for name in ("vectors-00001.arrow", "vectors-00003.arrow"):
        (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(
            ConfigError, match=rf"{name} would be replaced, and the manifest does not list it"
        ):
            write(tmp_path / "out", resume=True)
        assert (tmp_path / "out" / name).read_text() == "mine"
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/vectors-mine.arrow").write_text("mine")
    shutil.copy(tmp_path / "whole/vectors-00002.arrow", tmp_path / "out/vectors-00001.arrow")
    write(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") | {
        "vectors-mine.arrow": b"mine"
    }


def test_other_settings_are_refused_by_name(tmp_path):
    interrupt(tmp_path, 3)
    before = contents(tmp_path)
    for settings, message in (
        ({"pool": "last"}, "pool was 'mean' and is now 'last': give --pool mean, or"),
        ({"new": 1}, "new was None"),
    ):
        with pytest.raises(ConfigError, match=message):
            write(tmp_path, resume=True, **settings)
    assert contents(tmp_path) == before


def test_what_the_dead_left_is_removed_and_nothing_else(tmp_path):
    interrupt(tmp_path, 3)
    for name in (
        ".vectors-00001.arrow.0123abcd.tmp",
        "._unfinished.json.00000000.tmp",
        ".mine.tmp",
        "notes.txt",
    ):
        (tmp_path / name).write_bytes(b"half")
    # The shard is whole, but the job was killed before the manifest said so
    with ipc.new_file(tmp_path / "vectors-00001.arrow", SCHEMA) as shard:
        shard.write(rows(9))
    write(tmp_path, resume=True)
    shards = [f"vectors-0000{index}.arrow" for index in range(4)]
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", FINISHED, "notes.txt", *shards]
    assert ipc.open_file(tmp_path / shards[1]).read_all().num_rows == 6


def test_killed_before_the_first_manifest_the_folder_counts_as_empty(tmp_path):
    (tmp_path / "._unfinished.json.00000000.tmp").write_bytes(b"{")
    write(tmp_path)
    assert FINISHED in os.listdir(tmp_path)
    assert read_manifest(tmp_path).finished


def damage(kind: str, shard: Path) -> None:
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        os.truncate(shard, shard.stat().st_size - 20)
    elif kind == "rows":
        with ipc.new_file(shard, SCHEMA) as writer:
            writer.write(rows(0))
    else:
        with ipc.new_file(shard, SCHEMA.with_metadata({"longnet.model": "n"})) as writer:
            writer.write(rows(0))
            writer.write(rows(1))


@pytest.mark.parametrize("kind", ["missing", "truncated", "rows", "schema"])
def test_a_damaged_finished_shard_is_refused(tmp_path, kind):
    interrupt(tmp_path, 5)
    damage(kind, tmp_path / "vectors-00000.arrow")
    why = {"missing": "cannot read: No such file or directory", "rows": "3 rows instead of 6"}.get(
        kind, ""
    )
    refused = (
        rf"vectors-00000\.arrow: cannot resume: a finished shard is missing or damaged \({why}"
    )
    with pytest.raises(DataError, match=refused):
        write(tmp_path, resume=True)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"{}", b'{"version": 1}', b'{"version": 99}', b"\xff", b"[" * 200_000),
        *(
            seal(1, {"settings": {}, "totals": {"rows": 1}, "shards": shards}).encode()
            for shards in (
                3,
                [None],
                [{"rows": 1}],
                [{"name": 1, "rows": 1}],
                [{"name": "x", "rows": 2}],
            )
        ),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, content):
    (tmp_path / UNFINISHED).write_bytes(content)
    with pytest.raises(DataError, match=UNFINISHED):
        write(tmp_path, resume=True)


def test_a_changed_manifest_is_refused(tmp_path):
    """Whatever was changed, or if it lacks its digest."""
    interrupt(tmp_path, 5)
    good = json.loads((tmp_path / UNFINISHED).read_text())
    more = [good["shards"][0] | {"documents": 3}, *good["shards"][1:]]
    for damage in (
        {"shards": more},
        {"shards": good["shards"][1:]},
        {"settings": 3},
        {"digest": None},
        {"version": 0},
    ):
        (tmp_path / UNFINISHED).write_text(json.dumps(good | damage))
        with pytest.raises(DataError, match=UNFINISHED):
            write(tmp_path, resume=True)


def test_a_second_writer_is_refused(tmp_path):
    code = (
        "import sys; from longnet_cli.data.outputs.shards import *; from longnet_cli.basics.errors import ConfigError\n"
        "try:\n    with ShardFolder(sys.argv[1], pa.schema([]), settings={}, left_out=LeftOut(), resume=True): pass\n"
        "except ConfigError as error: print(error)"
    )
    with ShardFolder(tmp_path, SCHEMA, settings=SETTINGS, left_out=LeftOut()):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
    assert "another process is writing" in done.stdout
    write(tmp_path / "other")  # the lock is gone with the writer
    assert read_manifest(tmp_path / "other").finished


def test_a_reader_takes_no_half_of_a_data_set(tmp_path):
    interrupt(tmp_path / "out", 5)
    with pytest.raises(DataError, match="--resume"):
        iter(Inputs([tmp_path / "out"]).all_files)
    folder = write(tmp_path / "out", resume=True)
    assert [source.path for source in Inputs([tmp_path / "out"]).all_files] == folder.paths
    folder.paths[1].unlink()
    with pytest.raises(DataError, match=r"vectors-00001\.arrow: no such file"):
        iter(Inputs([tmp_path / "out"]).all_files)


def test_a_finished_folder_of_parquet_resumes_too(tmp_path):
    interrupt(tmp_path / "out", 3, format="parquet")
    with pytest.raises(ConfigError, match="shard_format was 'parquet' and is now None"):
        write(tmp_path / "out", resume=True)
    write(tmp_path / "out", resume=True, format="parquet")
    write(tmp_path / "whole", format="parquet")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    names = ["_manifest.parquet", *(f"vectors-0000{index}.parquet" for index in range(4))]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert [source.name for source in Inputs([tmp_path / "out"]).all_files] == names[1:]
    assert read_manifest(tmp_path / "out").totals["rows"] == 21
    os.truncate(tmp_path / "out/vectors-00001.parquet", 100)
    (tmp_path / "out/_unfinished.json").write_text(read_manifest(tmp_path / "out").to_json())
    with pytest.raises(DataError, match=r"vectors-00001\.parquet: cannot resume"):
        write(tmp_path / "out", resume=True, format="parquet")


COMMANDS = {
    "tokenize": "tokenize --shard-tokens 30",
    "score": "score -m ./model --shard-tokens 30",
    "encode": "encode -m ./model --shard-rows 2",
}


@pytest.mark.parametrize(
    ("job", "name"),
    [
        ("tokenize", "in.jsonl"),
        *((job, form) for job in ("score", "encode") for form in ("in.jsonl", "in.arrow")),
    ],
)
def test_only_other_contents_are_refused(run_longnet, tmp_path, job, name):
    """By the digests of what finished shards hold. A kill before the last of these leaves `out`, beside `whole`."""
    out, path = tmp_path / "out", tmp_path / name
    kind = {"in.jsonl": lambda n: {"text": f"text {n}"}, "in.arrow": lambda n: {"ids": [n] * 9}}[
        name
    ]
    write_rows(path, [{"id": str(n)} | kind(n) for n in range(20)])
    if job != "tokenize":
        tiny_model(tmp_path / "model")
    for folder in ("whole", "out"):
        done = run_longnet(f"{COMMANDS[job]} {name} -o {folder}", code=0)
    manifest = read_manifest(out)
    (out / manifest.shards.pop()["name"]).unlink()
    (out / "_manifest.arrow").unlink()
    (out / UNFINISHED).write_text(manifest.to_json())
    before, good = contents(out), path.read_bytes()
    # of a finished shard
    byte = good.index(b"3" if name.endswith("jsonl") else b"\x03" + bytes(7) + b"\x03")
    path.write_bytes(good[:byte] + b"4" + good[byte + 1 :])
    done = run_longnet(f"{COMMANDS[job]} {name} -o out --resume")
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
    assert f"{name}: cannot resume: the file has changed" in done.stderr
    assert contents(out) == before
    path.write_bytes(good)
    os.utime(path, (1, 1))  # a time alone is no change
    run_longnet(f"{COMMANDS[job]} {name} -o out --resume", code=0)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_file_is_known_by_its_size_and_its_ends(tmp_path):
    path, data = tmp_path / "large.arrow", bytearray(np.random.default_rng(0).bytes(3 * END))
    path.write_bytes(data)
    digest = content_digest(InputFile(path, "large", "large"))
    for position, is_seen in ((100, True), (len(data) - 100, True), (len(data) // 2, False)):
        data[position] ^= 1
        path.write_bytes(data)
        assert (content_digest(InputFile(path, "large", "large")) != digest) == is_seen
        data[position] ^= 1
    path.write_bytes(data[:END] + data[END - 1 :])
    assert content_digest(InputFile(path, "large", "large")) != digest
    assert content_digest(InputFile(None, "-", "-")) is None


def test_a_file_in_a_store_is_known_by_its_tag_or_its_time(tmp_path):
    (tmp_path / "a").write_text("a")
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    first = content_digest(InputFile(Path("a"), "a", "store://a", store))
    assert first == content_digest(InputFile(Path("a"), "a", "store://a", store))
    os.utime(tmp_path / "a", (1, 1))
    assert content_digest(InputFile(Path("a"), "a", "store://a", store)) not in (None, first)
    assert content_digest(InputFile(Path("b"), "b", "store://b", store)) is None

    class Tagged(fs.FSSpecHandler):
        def __init__(self, tag: str) -> None:
            self.fs = type(
                "Store", (), {"protocol": "x", "info": lambda self, path: {"ETag": tag}}
            )()

    tags = [
        content_digest(InputFile(Path("a"), "a", "a", fs.PyFileSystem(Tagged(tag))))
        for tag in ("1", "1", "2")
    ]
    assert tags[0] == tags[1] != tags[2]
