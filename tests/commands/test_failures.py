"""Proves that bad input ends a command in one line and an exit code. Whatever else ends it, its output is whole or says
that it is not, and --resume completes it: kills at random moments, signals, no room, a reader that leaves or stalls.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from builders import SIZES as TINY_SIZES
from builders import (
    official_slide_state,
    recipe,
    slide_encoder,
    slide_table,
    tiny_llama,
    tiny_model,
)
from files import write_file, write_lines, write_rows
from processes import contents, invoke, kill_and_resume, refused, wait_for
from refusals import REFUSALS, SHORT

from longnet_cli import LongNet
from longnet_cli.basics.errors import CheckpointError, DataError
from longnet_cli.cli.output import say_what_is_kept
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.outputs.row_writer import ShardWriter
from longnet_cli.data.outputs.shards import ShardFolder

SIZES = {"dim": 32, "num_layers": 4, "num_heads": 4, "ffn_dim": 64, "position": "rope"}
SIZES |= {"segment_lengths": (64, 1024), "dilation_rates": (1, 4)}
ONE_STAGE = {"train.stages": [{"seq_len": 32, "steps": 5}]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bad inputs of the table."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"id": 7, "doc": {"body": "one"}, "n": 1, "text": "first"}]
    ends = pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["x"]))
    days = pa.array([pa.MonthDayNano([1, 2, 3])], pa.month_day_nano_interval())
    write_file(
        folder / "types.arrow",
        pa.table({"text": ["one"], "ends": ends, "days": days, "span": [1], "ppl": [1]}),
    )
    for name in ("x.arrow", "x.stream", "x.parquet", "x.jsonl"):
        write_rows(folder / name, rows)
    write_lines(folder / "chat.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (folder / "empty.jsonl").write_text('{"text": ""}\n')
    (folder / "empty.txt").touch()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "taken/file").mkdir(parents=True)
    (folder / "half").mkdir()
    (folder / "half/config.json").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    tiny_model(folder / "model")
    tiny_model(folder / "encoder", causal=False, position="rope")
    slide_encoder().save_pretrained(folder / "slide")
    write_file(folder / "slide.arrow", slide_table(40))
    state = official_slide_state()
    torch.save(state, folder / "slide.pth")
    inner = {name: x for name, x in state.items() if name.startswith("encoder.")}
    torch.save(inner, folder / "encoder.pth")
    torch.save(state | {"norm.weight": torch.full((32,), torch.nan)}, folder / "nan.pth")
    Tokenizer.train([["some text and more text"] * 9], 265).save(folder / "large.json")
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    bare.save(str(folder / "no-end.json"))
    (folder / "small.json").write_text(recipe(Path("x.parquet"), **ONE_STAGE).model_dump_json())
    (folder / "bad.gz").write_bytes(gzip.compress(b"unreadable " * 1000)[:-4])
    (folder / "long.txt").write_text("x" * 65)
    shared = {
        "model": TINY_SIZES | {"position": "rope", "pattern": "window:16,chosen=2x16"},
        "data": {"train": "x.parquet", "tokenizer": "bytes"},
        "train": {"stages": [{"seq_len": 64, "steps": 1}]},
    }
    (folder / "chosen-run").mkdir()
    (folder / "chosen-run/recipe.json").write_text(json.dumps(shared))
    ids = pa.table({"input_ids": [[1] * 5, [1] * 60, [1] * 70, [1, 300]], "doc_id": [*"abcd"]})
    pq.write_table(ids, folder / "ids.parquet")
    write_file(folder / "ids.arrow", ids)
    pq.write_table(ids[2:3], folder / "too-long.parquet")
    return folder


LINES, IDS = SHORT["LINES"], SHORT["IDS"]
GIVEN = SHORT["SLIDE"].replace("slide", "given", 1)
FAILURES = [  # with tables of other types, and bytes that a table of lines cannot show
    ("score a.pdf", 3, "the byte at offset 9 is 0xe2: pdftotext makes text of a PDF", "%PDF-1.4\n\udce2"),
    ("ask x.jsonl first\udcff -m ./model", 2, "the question is not UTF-8: save it as a UTF-8 file of JSON Lines"),
    ("generate \udcff", 2, "PROMPT is not UTF-8"),
    ("score given.arrow", 3, "empty", ""),
    (IDS, 3, "0 rows", pa.table({"ids": pa.array([], pa.list_(pa.int32()))})),
    (IDS, 3, "given.arrow, row 1", pa.table({"ids": pa.array([[1, 2], None], pa.list_(pa.int32(), 2))})),
    (IDS, 3, "row 1: the value is null", pa.table({"text": pa.array(["a", None]).dictionary_encode()})),
    (LINES, 3, "line 2: not JSON", '{"ids": [1]}\n' + "[" * 100_000),
    (LINES, 3, "line 2: not UTF-8: byte 10 is 0xff", '{"text": "a"}\n{"text": "\udcff"}\n'),
    (
        GIVEN, 3, "row 0: document 's' has no coordinates, which the model needs",
        slide_table(9).drop_columns(["coords"]),
    ),
    (GIVEN, 3, "have 5 numbers, and the model reads 6", slide_table(9, width=5)),
    (
        "convert given.pth -o out", 4, "it has no layers.0.self_attn.q_proj.weight, but the tensor a",
        {"a": torch.zeros(2)},
    ),
    ("convert given.pth -o out", 4, "a is of type int", {"model": {"a": 3}}),
    ("convert given.pth -o out", 4, "it holds list, not tensors by name", [torch.zeros(2)]),
    ("plot given.json", 3, "no line of metrics yet", ""),
    ("plot given.json", 3, "not UTF-8", "\udcff"),
    ("plot given.json", 3, "nothing to draw", '{"step": 1, "loss": 1' + "0" * 400 + "}\n"),
    ("tokenize given.parquet -o v", 3, "Parquet with an encrypted footer is not read", "PARE\udcff"),
]  # fmt: skip


ROW = r"(\d) (\w+)(.*?) => (.*?)(?: <= (.*))?"


def rows_of_table() -> Iterator[tuple]:
    """(command, exit code, line), and the content if there is one, of each line of the table."""
    for row in REFUSALS.strip().splitlines():
        code, name, more, line, content = re.fullmatch(ROW, row).groups()
        given = [content.replace(r"\n", "\n")] if content else []
        yield SHORT.get(name, name) + more, int(code), line, *given


ALL = [*rows_of_table(), *FAILURES]


@pytest.mark.parametrize("row", ALL, ids=[words[:60] for words, *_ in ALL])
def test_bad_input_is_one_line_and_an_exit_code(row, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    words, code, line, *content = row
    if content:
        write_given(Path(words.split()[1]), *content)
    if "./llama" in words and not Path("llama").exists():
        pytest.importorskip(
            "transformers", reason="transformers is not installed: pip install '.[hf]'"
        )
        tiny_llama(inputs / "llama", vocab_size=260, max_position_embeddings=64, bos_token_id=7)
    before = {*inputs.iterdir()}
    error = refused(*words.split())
    assert (error.exit_code, {*inputs.iterdir()}) == (code, before)
    assert line in str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read a file")
@pytest.mark.parametrize("kind", ["native", "llama"])
def test_weights_that_one_may_not_read_are_not_called_damaged(kind):
    folder = Path(tempfile.mkdtemp())  # not below the folder of pytest, which is root's alone
    try:
        (tiny_model if kind == "native" else tiny_llama)(folder / "model")
        for path in (folder, folder / "model"):
            path.chmod(0o755)
        (folder / "model/model.safetensors").chmod(0o600)
        load = LongNet.from_pretrained
        if kind == "llama":
            from longnet_cli.models.hf.pretrained_net import load_transformers

            settings = json.loads((folder / "model/config.json").read_text())
            load = partial(load_transformers, settings=settings)
        os.seteuid(65534)
        try:
            with pytest.raises(
                CheckpointError, match="safetensors: cannot read: Permission denied"
            ):
                load(folder / "model")
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(folder)


def write_given(path: Path, content: object) -> None:
    """Write a text, with bytes that are no UTF-8 as surrogates; a table, a row at a time; or what torch saves."""
    if path.suffix == ".arrow" and isinstance(content, str) and content.startswith("{"):
        content = pa.Table.from_pylist([json.loads(row) for row in content.splitlines()])
    if isinstance(content, str):
        path.write_text(content, errors="surrogateescape")
    elif isinstance(content, pa.Table):
        write_file(path, content, rows=1)
    else:
        torch.save(content, path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """60 documents of 0.1 to 20 kB."""
    chance = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index}.txt").write_text(
            "".join(chance.choices("abc déf\n", k=chance.randint(100, 20_000)))
        )
    return folder


@pytest.mark.parametrize("command", ["tokenize", pytest.param("encode", marks=pytest.mark.ci)])
def test_killed_and_resumed_the_shards_are_the_same(command, start, corpus, tmp_path):
    tiny_model(tmp_path / "model", **SIZES)
    words = {
        "tokenize": ["tokenize --eos --shard-tokens 10000", corpus],
        "encode": ["encode -m ./model --span 50 --shard-rows 100", *sorted(corpus.iterdir())[:9]],
    }
    kill_and_resume(start, words[command], tmp_path, kills=3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_finished_shards_and_no_others(
    start, run_longnet, corpus, tmp_path, number, code
):
    command = ["tokenize", corpus, "--shard-tokens", "10000", "-o"]
    process = start(*command, "out")
    wait_for(lambda: (tmp_path / "out" / "shard-00003.arrow").exists())
    process.send_signal(number)
    assert process.communicate()[1] == b""
    assert process.returncode == code
    names = sorted(os.listdir(tmp_path / "out"))
    assert names[0] == "_unfinished.json"
    assert names[1:] == [f"shard-{index:05d}.arrow" for index in range(len(names) - 1)]
    assert run_longnet(*command, "out", "--resume").returncode == 0
    assert run_longnet(*command, "whole").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def unread(pipe: IO[bytes]) -> int:
    """How many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("output", ["out", "out.arrow", "-"])
def test_a_signal_ends_a_wait_for_input(start, tmp_path, output):
    process = start("tokenize - -o", output, stdin=subprocess.PIPE)
    process.stdin.write(b"a line\n")
    process.stdin.flush()
    wait_for(lambda: unread(process.stdin) == 0)  # and now it waits for more
    # Python learns of a signal right before a call that waits only from the next one
    for _ in range(10):
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
            break
    assert process.returncode == 143
    assert not process.stdout.read().endswith(b"\xff\xff\xff\xff\0\0\0\0")
    assert sorted(os.listdir(tmp_path)) in ([], ["out"])


def test_a_signal_ends_a_wait_for_a_reader_that_stalls(start, corpus):
    process = start("tokenize", corpus, "-o", "-")
    assert process.stdout.read(1)
    size = fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ)
    # its last pages may be full in part
    wait_for(lambda: unread(process.stdout) >= size - 2 * mmap.PAGESIZE)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert process.stderr.read() == b""


@pytest.mark.parametrize("ending", ["kill", "fail"])
def test_a_cut_stream_is_refused(start, corpus, tmp_path, ending):
    if ending == "fail":
        (corpus / "bad.txt").write_bytes(b"\xff")
    with open(tmp_path / "cut.arrow", "wb") as file:
        process = start(
            "tokenize",
            corpus,
            "-" if ending == "kill" else corpus,
            "-o",
            "-",
            stdin=subprocess.PIPE,
            stdout=file,
        )
        if ending == "kill":
            wait_for(lambda: (tmp_path / "cut.arrow").stat().st_size > 100_000)
            process.kill()
        assert process.wait(30) == (-9 if ending == "kill" else 3)
    with pytest.raises(DataError, match="truncated"):
        list(Inputs([tmp_path / "cut.arrow"]).documents())
    if ending == "fail":  # others take the end of the data for the end of the stream
        with pytest.raises(pa.ArrowInvalid, match="Expected to read 8 metadata bytes"):
            pa.ipc.open_stream(tmp_path / "cut.arrow").read_all()


def test_a_shard_too_large_for_the_file_system_is_one_line(
    run_longnet, longnet, corpus, tmp_path, command_env
):
    """The limit on file sizes, which any user may set, does as a full disk does."""
    (corpus / "30.txt").write_text("x" * 1_000_000)
    command = "tokenize corpus --shard-tokens 20000 -o"
    run_longnet(command, "whole", code=0)
    line = f"ulimit -f 500; exec {longnet} {command} out"
    done = subprocess.run(["bash", "-c", line], env=command_env, cwd=tmp_path, capture_output=True)
    out, whole = tmp_path / "out", contents(tmp_path / "whole")
    said = done.stderr.decode()
    assert (done.returncode, said.count("\n")) == (1, 1)
    assert re.match("longnet: error: out/.*cannot write: File too large", said)
    found = contents(out)
    shards = {f"shard-{index:05d}.arrow" for index in range(len(found) - 1)}
    assert found.keys() == shards | {"_unfinished.json"}
    assert len(found) > 5
    assert all(found[name] == whole[name] for name in shards)
    run_longnet(command, "out", "--resume", code=0)
    assert contents(out) == whole


@pytest.mark.ci
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_spilled_encode(kind, tmp_path, start):
    """Of a bidirectional net: it leaves no half output, and nothing on the disk."""
    tiny_model(tmp_path / "model", **SIZES, causal=False)
    spill, out = tmp_path / "spill", tmp_path / "out"
    (tmp_path / "long.txt").write_text("the quick brown fox " * 20_000)
    spill.mkdir()
    words = "encode long.txt -m ./model --chunk 512 -o out/vectors.arrow --spill"
    job = start(words, spill, fresh=True)

    def is_spilled() -> bool:
        return str(spill) in Path(f"/proc/{job.pid}/maps").read_text()

    wait_for(lambda: job.poll() is not None or is_spilled())
    assert job.poll() is None
    job.send_signal(kind)
    job.communicate(timeout=60)
    assert job.returncode in (-kind, 128 + kind)
    assert list(spill.iterdir()) == []
    assert not (out / "vectors.arrow").exists()


@pytest.mark.parametrize("command", ["score", "encode"])
def test_a_stopped_command_says_what_is_kept(command, tmp_path, monkeypatch, capsys):
    model = f"{tiny_model(tmp_path / 'model')}/"
    texts = [tmp_path / f"{name}.txt" for name in "abcd"]
    for path in texts:
        path.write_text("some text " * 3)
    shards = ["--shard-tokens", "20"] if command == "score" else ["--shard-rows", "1"]
    end_shard, ended = ShardFolder.end_shard, []

    def stop(self: ShardFolder) -> None:
        ended.append(end_shard(self))
        if len(ended) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardFolder, "end_shard", stop)
    folder = [command, *texts, "-m", model, *shards, "-o", tmp_path / "out"]
    said = (
        f"stopped: {tmp_path / 'out'} keeps 2 documents: the same command with --resume goes on\n"
    )
    assert said in invoke(*folder).stderr
    assert "keeps 4 documents" in invoke(*folder, "--resume").stderr
    (tmp_path / "out" / "_unfinished.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), say_what_is_kept(str(tmp_path / "out")):
        raise KeyboardInterrupt
    assert "_unfinished.json: not a manifest of shards" in capsys.readouterr().err
    assert invoke(*folder[:-1], tmp_path / "other", "-q").stderr.strip() in (
        "",
        "Aborted!",
        "Aborted.",
    )

    def stop_at_once(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # while the first texts are read
        patch.setattr(ShardFolder, "__enter__", stop_at_once)
        begun = invoke(command, *texts, "-m", model, "-o", tmp_path / "new")
    assert (
        f"stopped: nothing is kept in {tmp_path / 'new'}, in which no shard was begun"
        in begun.stderr
    )
    monkeypatch.setattr(ShardWriter, "write", stop_at_once)
    alone = invoke(command, *texts, "-m", model, "-o", tmp_path / "rows.arrow")
    assert (
        f"stopped: nothing is kept in {tmp_path / 'rows.arrow'}, which is written whole"
        in alone.stderr
    )


@pytest.mark.parametrize(
    ("stop", "world", "said"), [(143, 1, True), (143, 2, False), (None, 2, True)]
)
def test_a_rank_that_another_one_ends_says_nothing(stop, world, said, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises((SystemExit, KeyboardInterrupt)), say_what_is_kept("-"):
        raise SystemExit(stop) if stop else KeyboardInterrupt
    assert capsys.readouterr().err.startswith("stopped: ") == said
