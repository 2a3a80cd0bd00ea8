"""What `score --dry-run` and `encode --dry-run` say is what the job does: forwards, FLOPs and the cache exactly,
and the peak of real runs from .90 to 1.15.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import scores, tiny_llama, tiny_net
from files import write_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import DataError, MemoryLimitError, TooLongError
from longnet_cli.basics.events import Events, LeftOut
from longnet_cli.cli.dry_run import show_reading
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.jobs.encoding import EncodeFacts, Encoder, encode
from longnet_cli.jobs.estimating import (
    Estimate,
    Room,
    estimate_reading,
)
from longnet_cli.jobs.job_options import EncodeOptions, ScoreOptions
from longnet_cli.jobs.reading_plan import Task, cache_bytes, count_documents
from longnet_cli.jobs.row_jobs import ModelFacts, RowJob
from longnet_cli.jobs.scoring.scoring import Scorer
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import InputSequence, Net
from longnet_cli.running import device
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.reader import Reader

pytestmark = pytest.mark.full

BOS = 256
ROOM = Room(0, math.inf)
SCORER = partial(Scorer, options=ScoreOptions(), facts=ModelFacts(BOS))
ENCODER = partial(Encoder, options=EncodeOptions(), facts=EncodeFacts(BOS))
LENGTHS = (30, 1, 0, 70, 500, 7, 7, 90)


def net_of(**changes: Any) -> LongNet:
    return tiny_net(**{"position": "rope"} | changes).eval()


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Document]:
    return [
        Document(str(i), np.full(length, 5), length, f"{i}.txt") for i, length in enumerate(lengths)
    ]


@contextmanager
def counting(net: nn.Module) -> Iterator[list[int]]:
    """The tokens of each forward of the net."""
    found: list[int] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["tokens"]).numel())

    handle = net.register_forward_pre_hook(see, with_kwargs=True)
    yield found
    handle.remove()


def estimated(
    net: Net,
    make_job: Callable[[Reader], RowJob],
    texts: list[Document] | None = None,
    chunk: int | None = None,
    spill: str | None = None,
    room: Room = ROOM,
    dtype: str = "auto",
    skip_bad: bool = False,
    **options: Any,
) -> Estimate:
    events = Events(left_out=LeftOut((lambda *_: None) if skip_bad else None))
    job = make_job(Reader(net, chunk=chunk, spill=spill, dtype=dtype, events=events))
    plan = count_documents(job, documents() if texts is None else texts, **options)
    task = Task(job.read, job.window_sizes)
    return estimate_reading(job.reader, plan, task, room=room)


@pytest.mark.parametrize(
    "how",
    [
        {"context": None},
        {"context": (16, 100)},
        {"context": (50,), "stride": 20},
        {"context": (20, 40), "last": 10},
        {"context": None, "bos": None},
    ],
)
def test_windows_of_scoring_are_those_that_are_read(how):
    net, how = net_of(), {"bos": BOS, "stride": None, "last": None} | how
    with counting(net) as made:
        scored = list(scores(net, documents(), chunk=64, **how))
    job = partial(Scorer, facts=ModelFacts(how.pop("bos")), options=ScoreOptions(**how))
    found = estimated(net, job, chunk=64)
    with_rows = [n for n in LENGTHS if n >= job(Reader(net)).fewest_tokens]
    assert (len(with_rows) < len(LENGTHS)) == bool(how["last"])
    assert (found.facts["documents"], found.facts["tokens"], found.facts["longest"]) == (
        len(with_rows),
        sum(with_rows),
        max(with_rows),
    )
    assert found.facts["tokens_read"] == sum(made)
    assert sum(wanted for n in LENGTHS for _, wanted in job(Reader(net)).window_sizes(n)) == sum(
        x.score.n_tokens for x in scored
    )


def counted_flops(job: RowJob, texts: list[Document]) -> int:
    """The FLOPs of matrices that torch counts."""
    job.reader.model(torch.zeros(1, 4, dtype=torch.int64))  # probes the kernel, by matrix products
    with FlopCounterMode(display=False) as counter:
        job.rows(texts).read_all()
    flops = counter.get_flop_counts()["Global"]
    return sum(n for operator, n in flops.items() if "attention" not in str(operator))


@pytest.mark.parametrize(
    ("causal", "make_job"), [(True, SCORER), (True, ENCODER), (False, ENCODER)]
)
def test_flops_are_those_that_torch_counts(causal, make_job):
    """Of matrices: at one key per query there is next to no attention, of which none is counted here."""
    net = net_of(segment_lengths=(1,), dilation_rates=(1,), causal=causal)
    counted = counted_flops(make_job(Reader(net, chunk=64)), documents())
    found = estimated(net, make_job, chunk=64)
    # an empty one has no row of vectors
    assert found.facts["documents"] == len(LENGTHS) - (make_job is ENCODER)
    attention = found.facts["tokens_read"] * net.config.attention_flops(1)
    assert found.facts["flops"] - attention == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern((8, 32), (1, 2)),
        Pattern.window(8, sinks=4),
        Pattern((64,), (1,), look_back=2),
        Pattern.dense(),
    ],
)
@pytest.mark.parametrize("tokens", [150, 39_999])  # at whose end a segment of each level is open
def test_the_cache_is_that_of_a_stream(pattern, tokens):
    shape = {"dim": 4, "num_heads": 2, "num_layers": 1, "ffn_dim": 1} if tokens > 150 else {}
    net = net_of(**shape, **vars(pattern))
    with torch.inference_mode():
        stream = CausalStream(net)
        for start in range(0, tokens, 5000):
            stream(torch.zeros(1, min(5000, tokens - start), dtype=torch.int64))
    assert cache_bytes(net.config, tokens, 4) == stream.cache_bytes


def test_what_does_not_fit_is_refused_with_what_to_change(capsys):
    net = net_of(dim=64, ffn_dim=256)
    whole = estimated(
        net, ENCODER, documents((60_000,) * 2), chunk=50_000, room=Room(1 << 40, 1 << 40)
    )
    assert whole.fits
    room = Room(1 << 40, whole.beyond // 4)  # the program has been there before
    found = estimated(net, ENCODER, documents((60_000,) * 2), chunk=50_000, room=room)
    assert not found.fits
    assert found.chunk_that_fits in (1024, 2048, 4096, 8192, 16384)
    assert estimated(
        net, ENCODER, documents((60_000,) * 2), chunk=found.chunk_that_fits, room=room
    ).fits
    said = (
        rf"encoding needs .*, the largest part for reading, .*--chunk {found.chunk_that_fits} fits"
    )
    with pytest.raises(MemoryLimitError, match=said):
        show_reading(found, "text", "encoding")
    assert "it does not fit" in capsys.readouterr().out


def test_bf16_is_named_where_it_pays(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "CPU_INFO", tmp_path / "cpuinfo")
    advice = "this CPU multiplies matrices 2.5 times as fast with --dtype bf16"
    for flags, dtype, bf16_rate, hint in (
        ("flags : avx512_bf16 amx_bf16", "auto", 5e9, advice),
        ("Features : bf16", "auto", 5e9, advice),
        ("flags : avx512_bf16", "auto", 1e9, ""),
        ("flags : avx512_bf16", "bf16", 5e9, ""),
        ("flags : sse", "auto", 5e9, ""),
    ):
        (tmp_path / "cpuinfo").write_text(f"{flags}\n")
        rates = {"fp32": 2e9, "bf16": bf16_rate}
        monkeypatch.setattr(device, "matmul_peak", lambda where, name, of=rates: of[name])
        assert estimated(net_of(), ENCODER, documents((60,)), dtype=dtype).hint == hint


def test_hidden_states_are_kept_on_a_disk(tmp_path):
    both = net_of(causal=False)
    stored = estimated(both, ENCODER, documents((60_000,)), chunk=256, room=Room(1 << 40, 1))
    assert stored.advice == "--spill DIR keeps the largest part on a disk"
    spilled = estimated(both, ENCODER, documents((60_000,)), chunk=256, spill=str(tmp_path))
    assert spilled.facts["spill_bytes"] == stored.memory["hidden"] >= 60_000 * 16 * 4
    assert "hidden" not in spilled.memory
    assert not [*tmp_path.iterdir()]


def test_a_document_that_the_job_refuses_is_refused_or_left_out():
    net = net_of()

    class Limited(Encoder):
        def sequence(self, document: Document) -> InputSequence[Document]:
            if len(document) > 100:
                raise TooLongError(f"{document.where}: too long", "cut it")
            return super().sequence(document)

    job = partial(Limited, options=EncodeOptions(), facts=EncodeFacts(BOS))

    with pytest.raises(TooLongError, match=r"4\.txt"):
        estimated(net, job)
    found = estimated(net, job, skip_bad=True)
    assert (found.facts["left_out"], found.facts["longest"], found.facts["documents"]) == (
        1,
        90,
        len(LENGTHS) - 2,
    )
    with pytest.raises(DataError, match="there is nothing to read"):
        estimated(net, job, documents((0, 0)))


def test_the_job_is_tried_with_the_longest_document_and_a_chunk_of_others() -> None:
    """In any order, and with as many tokens as the job needs: the last 300 of 500, in chunks of 64."""
    net = net_of()
    for lengths in (range(1, 40), range(40, 1, -1)):
        job = ENCODER(Reader(net, chunk=64))
        longest, *others = count_documents(job, documents(tuple(lengths))).examples
        assert len(longest) == max(lengths)
        assert 64 <= sum(map(len, others)) < 64 + 40
    job = partial(Scorer, options=ScoreOptions(last=300), facts=ModelFacts(BOS))
    found = estimated(net, job, documents((500, 20)), chunk=64)
    assert found.facts["tokens_read"] == 500
    assert found.facts["flops_per_second"] > 1e5


def test_the_command_writes_nothing_and_refuses_what_it_would(run_longnet, tmp_path):
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text("some text, " * 40 * (index + 1))
    (tmp_path / "list").write_text("0.txt\n1.txt\n2.txt\n3.txt\n")
    before = {path.name for path in tmp_path.iterdir()}

    def stated(words: str) -> dict[str, Any]:
        done = run_longnet(f"{words} --dry-run --format json", code=0)
        assert done.stderr == ""
        return json.loads(done.stdout)

    found = stated("encode @list -o vectors")
    assert (found["documents"], found["fits"]) == (4, True)
    assert found["peak_bytes"] == sum(found["memory_bytes"].values())
    assert found["seconds"] > 0
    table = run_longnet("score @list --context 16,64 -o gains.parquet --dry-run")
    assert (table.returncode, table.stderr) == (0, "")
    assert "counted" in table.stdout
    assert {path.name for path in tmp_path.iterdir()} == before
    score = "score @list --context 64"
    assert stated(f"{score} --last 16")["tokens_read"] < stated(score)["tokens_read"]

    run_longnet("encode 0.txt 1.txt -o vectors --shard-rows 1", code=0)
    refused = run_longnet("encode @list -o vectors --dry-run", code=2)
    assert "vectors holds a finished data set" in refused.stderr
    rest = stated("encode @list -o vectors --resume")
    assert (rest["documents"], 0 < rest["tokens"] < found["tokens"]) == (2, True)


def test_a_model_of_transformers_is_estimated(tmp_path):
    tiny_llama(tmp_path, num_key_value_heads=2, max_position_embeddings=256)
    net = ModelFolder(tmp_path).net(pattern=Pattern.window(16, sinks=4))
    with counting(net) as made:
        encode(net, documents(), EncodeOptions(), EncodeFacts(BOS), chunk=64).read_all()
    found = estimated(net, ENCODER, chunk=64)
    assert found.facts["tokens_read"] == sum(made)
    assert found.facts["parameters"] == sum(p.numel() for p in net.parameters())
    assert found.memory["weights"] >= 4 * found.facts["parameters"]
    assert found.memory["cache"] == 2 * 2 * 16 * (2 * 16 + 4) * 4  # layers, heads of keys
    for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
        size, folder = itemsize * found.facts["parameters"], ModelFolder.find(str(tmp_path))
        folder.check_weights_fit(dtype, torch.device("cpu"), size)
        with pytest.raises(MemoryLimitError, match="choose a smaller model"):
            folder.check_weights_fit(dtype, torch.device("cpu"), size - 1)
    trained = ModelFolder(tmp_path).net()  # on up to 256 tokens
    with pytest.raises(TooLongError, match="501 tokens"):
        estimated(trained, ENCODER)


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded():
    ModelFolder.find("longnet-tiny").check_weights_fit("auto", torch.device("cpu"), 5 * 4_100_000)
    with pytest.raises(
        MemoryLimitError, match=r"longnet-tiny: the weights take 0.0 GiB and 0.0 GiB are free"
    ):
        ModelFolder.find("longnet-tiny").check_weights_fit(
            "auto", torch.device("cpu"), 4 * 4_000_000
        )


RUN = """
import json, resource, subprocess, sys
done = subprocess.run(json.loads(sys.argv[1]), capture_output=True, text=True)
print(json.dumps([done.returncode, done.stderr, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["encode", "score"])
@pytest.mark.parametrize(
    ("lengths", "chunk"), [((300,) * 60, "8Ki"), ((12_000,), "4Ki"), ((40, 2000, 900), "1Ki")]
)
def test_the_peak_is_that_of_a_real_run(command, lengths, chunk, tmp_path, run_python):
    rows = [np.resize(np.arange(300, 900, dtype=np.int32), length) for length in lengths]
    table = pa.table({"doc_id": [str(i) for i in range(len(rows))], "input_ids": pa.array(rows)})
    write_file(tmp_path / "x.arrow", table)
    words = f"-m longnet_cli {command} x.arrow -o out.arrow -q --chunk {chunk}".split()
    stated = json.loads(run_python(*words, "--dry-run", "--format", "json").stdout)
    real = run_python("-c", RUN, json.dumps([sys.executable, *words]))
    code, said, peak = json.loads(real.stdout)
    assert (code, said) == (0, "")
    print(
        {kind: f"{size / 2**20:.0f} MiB" for kind, size in stated["memory_bytes"].items()},
        f"{peak / 2**20:.0f} MiB",
    )
    assert 0.9 <= stated["peak_bytes"] / peak <= 1.15
