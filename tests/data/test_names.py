"""Proves which files an input names, and in which order; inputs in a store are read like local ones: URIs, folders,
globs, every format, one line for a failure. The store is a local folder behind a pyarrow filesystem.
"""

import errno
import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest
from files import write_file, write_stream
from processes import invoke

from longnet_cli.basics.errors import ConfigError, DataError, InputWarning, MemoryLimitError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.token_documents import Apart
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.files import input_files as names_module
from longnet_cli.data.files import remote
from longnet_cli.data.files.opened_inputs import reading


def names(*inputs: Any) -> list[str]:
    return [text.doc_id for text in Inputs(inputs).texts()]


def test_folders_are_read_in_natural_order_without_what_is_not_text(tmp_path):
    for name in (
        "part-10.txt",
        "part-2.py",
        "sub/part-3.md",
        ".hidden/x.txt",
        "__pycache__/x.txt",
        ".env",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "__init__.py").touch()
    with pytest.warns(
        InputWarning, match=r": 1 file is not read beside the 4 files like __init__.py: image.png$"
    ):
        # An empty text, too
        assert names(tmp_path) == [
            "__init__.py",
            "part-2.py",
            "part-10.txt",
            "sub/part-3.md",
        ]


def test_documents_of_a_folder_that_are_not_read_are_told(tmp_path):
    """Files of another kind than the one that is read, in one note."""
    for name in ("a.txt", "sub/b.TXT", "c.json", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "notes.jsonl").write_text('{"text": "x", "id": "n"}\n')
    said = r": 5 files are not read beside notes.jsonl: LICENSE, a.txt and 1 like it, c.json, image.png"
    with pytest.warns(InputWarning, match=f"{said}$"):
        assert names(tmp_path) == ["n"]
    (tmp_path / "notes.jsonl").write_text('{"step": 1}\n')
    with (
        pytest.warns(InputWarning),
        pytest.raises(DataError, match=r"notes.jsonl, line 1: .*its keys are step"),
    ):
        names(tmp_path)


@pytest.mark.parametrize("data", [b"x\0", "x".encode("utf-16"), b"\xff\xfe\xfd"])
def test_a_text_of_a_folder_that_cannot_be_read_is_an_error_as_if_it_were_named(tmp_path, data):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.MD").write_bytes(data)
    with pytest.raises(DataError, match=r"b\.MD: neither Arrow, Parquet nor UTF-8 text"):
        names(tmp_path)
    first, second = Inputs([tmp_path], skip_bad=True).texts()
    assert (first.doc_id, second.file) == ("a.txt", True)


KINDS = {
    "tables": (".parquet", ".pq", ".arrow", ".arrows", ".ipc", ".feather"),
    "lines": (".jsonl", ".ndjson"),
    "texts": (".txt", ".md", ".json", ".py", ".html", ""),
    "hdf5": (".h5", ".hdf5"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_ending_of_a_kind_is_read_in_any_case(tmp_path, kind):
    expected = set()
    for suffix in KINDS[kind]:
        for name in (f"a{suffix}", f"B{suffix.upper()}"):
            (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n\0" if kind == "hdf5" else b"x")
            expected.add(name)
    (tmp_path / "_SUCCESS").touch()  # a text without an ending
    expected |= {"_SUCCESS"} if kind == "texts" else set()
    with pytest.warns(InputWarning, match="_SUCCESS") if kind != "texts" else nullcontext():
        assert {source.name for source in Inputs([tmp_path]).all_files} == expected


def test_linked_folders_are_followed_each_once_after_all_others(tmp_path):
    for name in ("data/deep/x.txt", "data/y.txt", "away/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, to in (("a", "data/deep"), ("deep/up", "data"), ("link", "away"), ("other", "away")):
        (tmp_path / "data" / link).symlink_to(tmp_path / to)
    assert names(tmp_path / "data") == ["deep/x.txt", "link/z.txt", "y.txt"]


def test_shards_in_a_folder_are_read_alone_and_in_their_order(tmp_path):
    (tmp_path / "README.md").write_text("x")
    for name in ("part-10.arrow", "part-2.arrow", "cache-1.arrow"):
        write_stream(tmp_path / name, pa.table({"text": [name], "doc_id": [name]}))
    with pytest.warns(
        InputWarning,
        match=r": 1 file is not read beside the 3 files like cache-1.arrow: README.md$",
    ):
        assert names(tmp_path) == ["cache-1.arrow", "part-2.arrow", "part-10.arrow"]
    state = {"_data_files": [{"filename": "part-10.arrow"}, {"filename": "part-2.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert names(tmp_path) == ["part-10.arrow", "part-2.arrow"]
    (tmp_path / "part-2.arrow").unlink()
    with pytest.raises(DataError, match=r"part-2\.arrow: no such file"):
        names(tmp_path)


def test_what_longnet_wrote_below_a_folder_is_passed_over_beside_anything_else(tmp_path):
    for folder, files in {
        "tokens": ("_manifest.arrow", "tokens-00000.arrow"),
        "vectors": ("_unfinished.json", "tokenizer.json"),
        "run": ("recipe.json", "metrics.jsonl"),
    }.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("{}")
    write_stream(tmp_path / "tokens/tokens-00000.arrow", pa.table({"text": ["x"], "doc_id": ["t"]}))
    (tmp_path / "tokens/_manifest.arrow").unlink()  # not a manifest, but a mark
    assert names(tmp_path) == ["t"]  # there is nothing else
    (tmp_path / "tokens/_manifest.arrow").touch()
    (tmp_path / "a.txt").write_text("x")
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("text", ["[]", "{bad", '{"shards": 3}', "[" * 200_000])
@pytest.mark.parametrize("name", ["_manifest.arrow", "_manifest.parquet"])
def test_a_damaged_manifest_is_named(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: changed or damaged after it was written"):
        names(tmp_path)


def test_an_empty_input_is_an_unset_variable():
    with pytest.raises(ConfigError, match="an input is empty"):
        names("")


def test_a_name_that_is_not_utf_8_is_named(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.txt"))
    path.write_text("x")
    for item in (path, tmp_path):
        with pytest.raises(DataError, match=r"bad\\udcff\.txt'?: the name is not UTF-8"):
            names(item)


def test_a_dataset_of_splits_asks_for_one(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ConfigError, match="train"):
        names(tmp_path)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            "train-00000-of-00002 train-00001-of-00002 test-00000-of-00001",
            "test-00000-of-00001.jsonl, {}/train-*.jsonl",
        ),
        (
            "data/train-0 data/train-1 data/validation-0",
            "data/train-*.jsonl, {}/data/validation-0.jsonl",
        ),
        ("wiki_train wiki_dev", "wiki_train.jsonl, {}/wiki_dev.jsonl"),
        ("train/0 train/1 val/0", "train/*.jsonl, {}/val/0.jsonl"),
        ("train-0 train-1 extra", None),
        ("unit-test-notes train-0", None),
        ("contest latest", None),
    ],
)
def test_a_folder_of_a_hub_asks_for_a_split(tmp_path, files, named):
    for file in files.split():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.jsonl").write_text('{"text": "x"}\n')
    if named is None:
        assert len(names(tmp_path)) == len(files.split())
        return
    said = f"{tmp_path} holds several splits of a data set: name one of {tmp_path}/{named.format(tmp_path)}"
    with pytest.raises(ConfigError, match=f"{re.escape(said)}$"):
        names(tmp_path)


def test_globs_and_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a1.txt", "a10.txt", "a2.txt", "b.txt", "[c].txt"):
        Path(name).write_text("x")
    assert names("a*.txt") == ["a1.txt", "a2.txt", "a10.txt"]
    assert names("[c].txt") == ["[c].txt"]
    Path("#1.txt").write_text("x")
    Path("list.txt").write_text("b.txt\n\n#1.txt\na1*.txt\n")
    assert names("@list.txt") == ["b.txt", "#1.txt", "a1.txt", "a10.txt"]
    Path("line\nbreak.txt").write_text("x")
    Path("nuls").write_text("a1.txt\0#1.txt\0line\nbreak.txt\0")  # as of find -print0
    assert names("@nuls") == ["a1.txt", "#1.txt", "line\nbreak.txt"]


def test_a_list_that_comes_through_a_pipe_is_read_once(tmp_path, run_longnet):
    """A command looks at its inputs up to three times."""
    for name in ("a.txt", "c d.txt"):
        (tmp_path / name).write_text(name)
    for command in ("encode @- -o vectors", "data inspect @- --format json"):
        done = run_longnet(command, input="a.txt\n\nc d.txt\n", code=0)
    assert json.loads(done.stdout)["documents"] == 2


def test_a_file_that_several_paths_reach_is_read_once(tmp_path, monkeypatch, run_longnet):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one")
    Path("b.txt").symlink_to("a.txt")
    os.link("a.txt", "c.txt")
    Path("list").write_text("a.txt\n./a.txt\n")
    for items in (
        ["*.txt"],
        ["a.txt", tmp_path / "a.txt"],
        ["@list"],
        ["a.txt", "*.txt"],
        ["b.txt", "."],
    ):
        with pytest.warns(InputWarning, match="read once, though it is named more than once"):
            found = names(*items)
        assert sum(name in ("a.txt", "b.txt", "c.txt") for name in found) == 1
    done = run_longnet("data inspect a.txt b.txt --format json")
    assert json.loads(done.stdout)["documents"] == 1
    assert (
        done.stderr
        == "longnet: note: b.txt, which is a.txt, is read once, though it is named more than once\n"
    )


@pytest.mark.parametrize(
    "command",
    [
        *("score", "score -o out", "encode -o out.arrow", "encode -o out", "tokenize -o out"),
        "train x.toml --data",
    ],
)
def test_names_are_expanded_once(tmp_path, monkeypatch, command):
    """However often a run asks: to overwrite nothing, to check lengths, to read, for the digest in a manifest."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one" * 20)
    Path("x.toml").write_text(
        "model = {dim = 8, num_layers = 1, num_heads = 1, ffn_dim = 8, segment_lengths = [8], dilation_rates = [1]}\n"
        "train = {stages = [{seq_len = 16, steps = 1}], batch_tokens = 16}\n"
    )
    Path("out.arrow").write_text("")  # an output that exists is compared with the inputs
    expanded = []
    expand = names_module._expand_all
    monkeypatch.setattr(
        names_module,
        "_expand_all",
        lambda items, *args, **options: expanded.append(items) or expand(items, *args, **options),
    )
    done = invoke(f"{command} *.txt -q")
    assert (done.exit_code, len(expanded)) == (0, 1), done.output


def test_names_are_utf_8_whatever_the_locale(tmp_path, run_longnet):
    (tmp_path / "é").mkdir()
    (tmp_path / "é" / "ß.txt").write_text("x")
    (tmp_path / "list").write_text("é/ß.txt\n")
    plain = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    for item in ("é", "é/*.txt", "é/ß.txt", "@list"):
        done = run_longnet(f"tokenize {item} -o ü.jsonl", env=plain, fresh=True)
        assert (done.returncode, done.stderr[-10:]) == (0, "> ü.jsonl\n"), done.stderr
        assert json.loads((tmp_path / "ü.jsonl").read_text())["doc_id"] == "ß.txt"
    done = run_longnet("data inspect é/none.txt", env=plain, fresh=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        3,
        "problem: é/none.txt: no such file or folder",
    )


def test_what_runs_out_is_not_bad_data(tmp_path, command_env):
    """Descriptors and memory that run out are no damage: exit codes 1 and 5."""
    for number in range(40):
        write_stream(tmp_path / f"{number:02}.arrow", pa.table({"ids": [[1, 2]]}))
    script = """if True:
        import resource
        from longnet_cli.data.documents.input_documents import Inputs
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
        try:
            list(Inputs(["."]).documents())
        except Exception as error:
            print(error.exit_code, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=command_env,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("1 ")
    assert "arrow: Too many open files: raise the limit (ulimit -n)" in done.stdout
    with pytest.raises(MemoryLimitError, match="x: there is no memory to read it"), reading("x"):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    with (
        pytest.raises(MemoryLimitError, match="x: it needs more memory than there is"),
        reading("x"),
    ):
        raise pa.ArrowMemoryError("malloc of size 1099511627776 failed")


IDS = [[104, 105], [1, 2, 3], [255]]
TABLE = pa.table({"input_ids": pa.array(IDS, pa.large_list(pa.int32()))})


def fill(filesystem: fs.FileSystem, folder: str) -> None:
    """Shards of every kind, a hidden file, and a folder of text."""
    file, stream, parquet = (pa.BufferOutputStream() for _ in range(3))
    write_file(file, TABLE)
    write_stream(stream, TABLE)
    pq.write_table(TABLE, parquet)
    lines = "".join(f'{{"input_ids": {ids}}}\n' for ids in IDS)
    shard = file.getvalue()
    for name, data in {
        **dict.fromkeys(("deep/part-10.arrow", "part-2.arrow", "part-10.arrow"), shard),
        "stream.arrow": stream.getvalue(),
        "x.parquet": parquet.getvalue(),
        "y.jsonl": lines.encode(),
        "text/a b.txt": b"hi",
        "part-3.arrow.tmp": b"half",
    }.items():
        filesystem.create_dir(str(Path(folder, name).parent), recursive=True)
        with filesystem.open_output_stream(f"{folder}/{name}") as written:
            written.write(data)


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
    beside = r": 4 files are not read beside the 4 files like part-2.arrow: deep/part-10.arrow, .*"
    with pytest.warns(InputWarning, match=beside):
        found = [*Inputs(["store://bucket/"]).all_files]
    with pytest.warns(InputWarning, match=beside):
        assert (
            [source.name for source in found]
            == names
            == [source.name for source in Inputs([store]).all_files]
        )
    assert found[0].where == "store://bucket/part-2.arrow"
    assert [
        source.name for source in Inputs(["store://bucket/p*.arrow?region=x"]).all_files
    ] == names[:2]
    assert len(Inputs(["store://bucket/**/*.arrow"]).all_files.found) == 4
    assert read("store://bucket/part*.arrow") == IDS * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "uri", ["gs://longnet-no-bucket/x", "gs://longnet-no-bucket/*", "s3://longnet-no-bucket/x"]
)
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
    (found,) = Inputs(["store://bucket/x.parquet"]).all_files
    (store / "x.parquet").unlink()
    with pytest.raises(DataError, match=r"^store://bucket/x.parquet: cannot read: "):
        remote.open_remote(found.filesystem, str(found.path), found.where)
    with pytest.raises(DataError, match=r"^x: cannot read: no bucket$"), remote._telling("x"):
        raise RuntimeError("no bucket error_info={no bucket}")


def test_file_uris_are_local_files(tmp_path):
    folder = tmp_path / "a b"
    fill(fs.LocalFileSystem(), str(folder))
    uri = folder.as_uri()
    assert "%20" in uri
    assert read(f"{uri}/part-2.arrow") == read(f"{uri}/part-1*.arrow") == IDS
    with pytest.warns(InputWarning, match="4 files are not read .*: deep"):
        (source, *_) = Inputs([uri]).all_files
    assert (source.path, source.filesystem) == (folder / "part-2.arrow", None)  # so it is mapped


def test_what_nobody_can_reach_is_a_mistake(monkeypatch):
    for uri in ("zz://bucket/x", "nope+more://x"):
        with pytest.raises(
            ConfigError, match=r"no filesystem is known for (zz|nope\+more)://|pip install fsspec"
        ):
            read(uri)
    # as if it were not installed
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(
        ConfigError, match="zz://bucket/x: zz:// needs a package: pip install fsspec"
    ):
        read("zz://bucket/x")


def test_fsspec_reaches_what_pyarrow_cannot():
    memory = pytest.importorskip("fsspec", reason="fsspec is not installed").filesystem("memory")
    fill(fs.PyFileSystem(fs.FSSpecHandler(memory)), "/bucket")
    assert read("memory://bucket/part-2.arrow") == read("memory://bucket/x.parquet") == IDS
    names = [source.name for source in Inputs(["memory://bucket/part*.arrow"]).all_files]
    assert names == ["part-2.arrow", "part-10.arrow"]


def test_a_question_is_answered_from_texts_in_a_store(tmp_path: Path):
    memory = pytest.importorskip("fsspec", reason="fsspec is not installed").filesystem("memory")
    memory.pipe("/shelf/a.txt", b"The key of the shed is 4821.")
    for _ in range(2):  # the second time from the index
        words = ("memory://shelf/a.txt", "Which key?", "--index", tmp_path / "index.sqlite")
        assert "the shed is 4821" in invoke("ask", *words).stdout


def test_a_first_name_that_is_empty_stays():
    apart = Apart()
    assert [apart.name(name) for name in ("", "", "a")] == ["", "#1", "a"]
