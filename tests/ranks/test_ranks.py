"""How ranks join and wait for each other, each on a GPU of its own or on hosts; and portions dealt out to real
processes: results in order, each portion worked on once, however slow a rank is.
"""

from __future__ import annotations

import math
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from builders import tiny_model
from conftest import RunLongnet
from files import write_file, write_lines
from hypothesis import given
from hypothesis import strategies as st
from many_ranks import run_ranks
from places import ROOT
from processes import contents
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.jobs.training.checkpoint import Checkpoints
from longnet_cli.running.ranks import dealing
from longnet_cli.running.ranks import ranks as module
from longnet_cli.running.ranks.dealing import Portion, deal, portions
from longnet_cli.running.ranks.ranks import Ranks, _own_gpu, join


@pytest.mark.parametrize("local_rank", ["0", "8", "-1", "first"])
def test_a_process_without_a_gpu_of_its_own_is_refused(local_rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if local_rank != "0" else 0)
    with pytest.raises(ConfigError, match=f"LOCAL_RANK is '{local_rank}'"):
        _own_gpu(local_rank)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, and rank 0 of four."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    # which it sets, for this test alone
    for name in ("TORCH_FR_BUFFER_SIZE", "NCCL_LAUNCH_ORDER_IMPLICIT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(module, "select_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.usefixtures("four_gpus")
def test_hosts_agree_by_gloo_where_gpus_talk_by_nccl(monkeypatch):
    """To agree on a signal between two chunks by NCCL, each would wait for what its GPU still computes."""
    asked: list[str] = []

    def begin(backend: str, **_: object) -> None:
        asked.append(backend)
        raise ConfigError("no GPU here")

    monkeypatch.setattr(module, "check_agent", lambda: None)
    monkeypatch.setattr(dist, "init_process_group", begin)
    with pytest.raises(ConfigError, match="no GPU here"):
        join("cuda")
    backends = dist.distributed_c10d.BackendConfig(asked[0]).get_device_backend_map()
    assert backends == {"cpu": "gloo", "cuda": "nccl"}
    monkeypatch.setattr(dist, "all_reduce", lambda x, op, group: asked.append(x.device.type))
    assert Ranks(0, 2).largest(3.0) == 3.0
    assert asked[1:] == ["cpu"]


@pytest.mark.usefixtures("four_gpus")
def test_gpus_wait_for_minutes_and_hosts_for_a_checkpoint(monkeypatch):
    """A rank whose GPU hangs keeps all its connections: only a timeout ends it, and the others with it."""
    every, own, other = (MagicMock(name=name) for name in ("every", "own", "other"))
    given = MagicMock()
    monkeypatch.setattr(dist, "init_process_group", given)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=every))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "new_subgroups", lambda size: (own, [own, other]))
    assert join("cuda", sp=2)[0].group is own
    assert given.call_args.kwargs["timeout"] >= timedelta(minutes=30)
    for group in (every, own):
        group._get_backend.assert_called_with(torch.device("cuda:0"))
        group._get_backend.return_value._set_default_timeout.assert_called_with(
            timedelta(minutes=10)
        )


@pytest.mark.usefixtures("one_process")
def test_ranks_wait_for_each_other_on_their_hosts():
    with Collectives() as seen:
        Ranks(0, 2).barrier()
    # of a tensor of the host; a barrier is a call of NCCL, where there is one
    assert seen.names == ["allreduce_"]


def test_all_ranks_wait_until_a_checkpoint_is_on_the_disk(monkeypatch, tmp_path):
    """Rank 0 writes longest: on their hosts, the others have the time for that."""
    done: list[str] = []
    monkeypatch.setattr(Ranks, "barrier", lambda _: done.append("waited"))
    monkeypatch.setattr(Checkpoints, "_write", lambda *_: done.append("written"))
    Checkpoints(tmp_path, Ranks(1, 2), keep=1).save(3, {}, {})
    assert done == ["written", "waited"]


INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "then"),
    [
        ((1024, 4096), 3072),
        ((1024, 2048), 2048),
        ((1024, INFINITE), 3072),
        ((4096, 4096), None),
        ((INFINITE,) * 2, None),
    ],
)
def test_a_process_may_connect_to_a_thousand_others(monkeypatch, limits, then):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, wanted: raised.append((kind, wanted)))
    module._allow_files(3072)
    assert raised == ([] if then is None else [(resource.RLIMIT_NOFILE, (then, limits[1]))])


class Collectives(TorchDispatchMode):
    """The names of all collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process that is all ranks of its group, whatever it says of others."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_the_gradients_of_a_gpu_are_summed_in_one_launch(monkeypatch):
    """One of each dtype; hosts sum one by one."""
    gradients = [
        torch.ones(n, dtype=dtype) for n in range(1, 9) for dtype in (torch.float32, torch.float64)
    ]
    with Collectives() as of_hosts:
        Ranks(0, 2).sum(*gradients)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with Collectives() as of_gpus:
        Ranks(0, 2).sum(*gradients)
    assert of_hosts.names == ["allreduce_"] * 16
    assert of_gpus.names == ["allreduce_coalesced_"] * 2
    assert all(x.eq(1).all() for x in gradients)


@pytest.mark.slow
def test_all_ranks_enter_the_same_collectives():
    """torch compares the operator, shape and dtype of each collective of all tests of ranks, before it starts.

    Where a job is ended, it says more than the tests want to read.
    """
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/ranks"),
    ]
    tests += ["-m", "not slow", "-k", "not ends_the_job"]
    env = os.environ | {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    done = subprocess.run(tests, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def batch(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"n": numbers})


@given(
    lengths=st.lists(st.integers(0, 9), max_size=40),
    length=st.integers(1, 30),
    shard=st.just(math.inf) | st.integers(1, 12),
)
def test_portions_are_the_items_in_order(lengths, length, shard):
    def cut(items: list[tuple[int, int]]) -> list[tuple[list[tuple[int, int]], bool]]:
        found = []
        for portion in portions(items, length, length_of=lambda item: item[1], shard=shard):
            read = list(portion)
            assert (portion.count, portion.length) == (len(read), sum(size for _, size in read))
            found.append((read, portion.ends_shard))
        return found

    items = list(enumerate(lengths))
    whole = cut(items)
    assert [item for read, _ in whole for item in read] == items
    for index, (read, ends_shard) in enumerate(whole):
        done = sum(len(read) for read, _ in whole[: index + 1])
        assert ends_shard == (done % shard == 0)
        assert ends_shard or index == len(whole) - 1 or sum(size + 1 for _, size in read) >= length
        assert sum(size + 1 for _, size in read[:-1]) < length
        if ends_shard:  # a resumed run goes on here, as if there were nothing before
            assert cut(items[done:]) == whole[index + 1 :]


def test_one_group_works_on_every_portion():
    dealt = deal(portions("abcde", 4, length_of=len), list, Ranks())
    assert [(list(results), portion.count) for portion, results in dealt] == [
        (["a", "b"], 2),
        (["c", "d"], 2),
        (["e"], 1),
    ]


def test_groups_take_what_they_can_and_rank_0_gets_all_in_order(tmp_path):
    run_ranks(4, tmp_path, _deal_at_random)


def _deal_at_random() -> None:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    store = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    )
    port = Ranks(rank, 4).from_first(store.port if store else 0)
    store = store or dist.TCPStore("127.0.0.1", port)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dealing.VALUE_BYTES, dealing.PAUSE, dealing.AHEAD = 200, 0.001, 3
    for seed in range(12):
        ranks = Ranks(rank, 4, 1) if seed % 2 else Ranks(rank, 4, 2, pairs[rank // 2])
        chance = random.Random(seed)  # the same on all ranks
        items = [chance.randrange(10) for _ in range(chance.randrange(60))]
        slow = chance.randrange(ranks.dp)

        def work(
            portion: Portion[int], ranks: Ranks = ranks, slow: int = slow
        ) -> Iterator[pa.RecordBatch]:
            for item in portion:
                total = torch.tensor([item])
                ranks.of_group().sum(total)  # needs all of the group
                time.sleep(0.01 if ranks.dp_rank == slow else 0.001)
                yield batch(int(total) // ranks.sp, ranks.dp_rank)

        others: Counter[int] = Counter()
        parts = portions(items, 12, length_of=lambda item: item)
        dealt = deal(parts, work, ranks, lambda part, others=others: others.update([part.length]))
        found = [result["n"].to_pylist() for _, results in dealt for result in results]
        assert [item for item, _ in found] == (items if rank == 0 else [])
        if rank == 0:
            assert sum(length * times for length, times in others.items()) == sum(
                i for i, who in found if who
            )

    def not_all_on_rank_0(portion: Portion[int]) -> list[pa.RecordBatch]:
        if rank:
            store.set("taken", "")
        else:
            store.wait(["taken"])
        return [batch(item, rank) for item in portion]

    dealing.AHEAD = 64
    lengths = [6 if rank else 5] * 5  # as if a file had changed
    dealt = deal(
        portions(lengths, 1, length_of=lambda item: item), not_all_on_rank_0, Ranks(rank, 4)
    )
    if rank == 0:
        with pytest.raises(
            DataError,
            match=r"portion \d is 1 documents of 5 tokens on rank 0 and 1 of 6 on another",
        ):
            list(dealt)
        dist.PrefixStore("longnet/0/12", store).set("end", "")
    else:
        assert list(dealt) == []
    Ranks(rank, 4).barrier()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, and documents of 0 to 400 tokens in JSON Lines."""
    tiny_model(
        tmp_path / "net", segment_lengths=(16, 64, 256), dilation_rates=(1, 2, 4), position="rope"
    )
    chance = np.random.default_rng(0)
    rows = [chance.integers(97, 122, length) for length in [0, 1, *chance.integers(1, 400, 60)]]
    texts = [
        {"id": f"d{index}", "text": bytes(row.tolist()).decode(), "n": index}
        for index, row in enumerate(rows)
    ]
    write_lines(tmp_path / "docs.jsonl", texts)
    return tmp_path


@pytest.fixture
def run_both(
    folder: Path, run_longnet: RunLongnet
) -> Callable[..., list[subprocess.CompletedProcess]]:
    """Runs a command in one process and in two; what it writes goes to `alone` and `many`."""

    def run(words: str) -> list:
        where = {"cwd": folder, "env": {"OMP_NUM_THREADS": "1"}}
        ways = ("-o alone", "-o many --dp 2")
        return [run_longnet(f"{words} {way}", **where) for way in ways]

    return run


COMMANDS = {
    "encode": "encode docs.jsonl -m ./net --chunk 256 --span 100 --keep n --shard-rows 20",
    "gains": "score docs.jsonl -m ./net --chunk 256 --context 16,64 --keep n --shard-tokens 3000",
}


@pytest.mark.parametrize("name", [pytest.param("encode", marks=pytest.mark.ci), "gains"])
def test_shards_are_the_bytes_of_one_process(name, folder, run_both):
    alone, many = run_both(COMMANDS[name])
    assert (alone.returncode, many.returncode) == (0, 0), many.stderr
    assert contents(folder / "alone") == contents(folder / "many")
    assert len(contents(folder / "alone")) > 3
    assert many.stderr == alone.stderr.replace("alone", "many")


@pytest.mark.parametrize("skip_bad", [True, pytest.param(False, marks=pytest.mark.ci)])
def test_bad_data_ends_what_it_ends_in_one_process(skip_bad, folder, run_both):
    rows = [[97] * 200 for _ in range(50)]
    rows[30][100] = 9999
    write_file(folder / "bad.arrow", pa.table({"input_ids": rows}))
    words = "encode bad.arrow -m ./net --chunk 128 --shard-rows 10" + " --skip-bad" * skip_bad
    alone, many = run_both(words)
    assert alone.returncode == many.returncode == (6 if skip_bad else 3)
    assert re.sub(r"rank \d: ", "", many.stderr) == alone.stderr.replace("-> alone", "-> many")
    assert contents(folder / "alone") == contents(folder / "many")
    assert len(contents(folder / "alone")) == (6 if skip_bad else 4)
