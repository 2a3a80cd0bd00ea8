"""Proves what `bench` reports, except how fast it is: timings depend on the machine and decide no test here."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.branches import attention_flops
from longnet_cli.attention.cache import Outside
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.attention.spans import far_spans
from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.events import Events
from longnet_cli.jobs import benchmark
from longnet_cli.jobs.benchmark import Case, Measurement, Settings, bench, case_of

TINY = {"heads": 3, "head_dim": 8, "repeats": 2}
BOTH = ["forward", "backward"]


def rows_of(seq: list[int], **options: object) -> list[Measurement]:
    return list(bench(Settings.of(seq=seq, **options)))


def test_a_row_for_every_combination_with_rates_that_fit_its_seconds():
    rows = rows_of([32, 70], direction=BOTH, batch=2, pattern=Pattern((16, 64), (1, 4)), **TINY)
    expected = itertools.product([32, 70], ["forward", "backward"], ["dilated", "dense"])
    assert [(r.seq, r.direction, r.impl) for r in rows] == list(expected)
    for row in rows:
        assert (row.op, row.status, row.reason, row.cache_bytes) == ("attention", "ok", None, None)
        assert row.seconds > 0
        assert row.tokens_per_second == pytest.approx(2 * row.seq / row.seconds)
        flops = 4 * row.seq**2 * 3 * 8 * 2 / 2
        if row.impl == "dilated":
            flops = 2 * attention_flops(Pattern((16, 64), (1, 4)), 3, 8, row.seq, True)
        assert row.flops_per_second == pytest.approx(
            flops * (2.5 if row.direction == "backward" else 1) / row.seconds
        )
        assert row.kernel == ("cpu_flash" if row.impl == "dilated" else "sdpa")
        assert row.pattern == ("16/1,64/4" if row.impl == "dilated" else None)


@pytest.mark.parametrize(("dtype", "causal"), [("fp32", False), ("bf16", True), ("fp16", False)])
def test_every_dtype_and_a_geometric_pattern(dtype, causal):
    pattern = Pattern.geometric(40, 8, 3)
    rows = rows_of(
        [40], direction=BOTH, pattern=pattern, dtype=dtype, causal=causal, device="cpu", **TINY
    )
    assert {(row.status, row.dtype, row.causal) for row in rows} == {("ok", dtype, causal)}
    assert rows[0].pattern == "8/1,24/3,72/9"


def test_the_peak_belongs_to_its_row_alone():
    few_flops = Pattern((64,), (1,))
    big, small = rows_of([40_000, 64], impl=["dilated"], heads=8, pattern=few_flops, repeats=1)
    # q, k, v and out of the big one take 312 MiB, and all of them are gone when the small one runs
    assert big.peak_rss_bytes - small.peak_rss_bytes > 200 * 2**20


def test_the_peak_is_unknown_where_the_mark_cannot_be_reset(monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    (row,) = rows_of([64], impl=["dilated"], **TINY)
    assert row.peak_rss_bytes is None


def test_rows_that_would_not_fit_are_skipped_and_the_others_run(monkeypatch):
    monkeypatch.setattr(benchmark, "free_memory", lambda device: 2**20)
    rows = rows_of([64, 10**9, 100], direction=["backward"], **TINY)
    assert [row.status for row in rows] == ["ok"] * 2 + ["skipped"] * 2 + ["ok"] * 2
    assert "memory" in (rows[2].reason or "")
    assert rows[2].seconds is rows[2].peak_rss_bytes is None


def test_memory_that_runs_out_is_a_row_and_not_the_end(monkeypatch):
    # nobody knows, so it is tried
    monkeypatch.setattr(benchmark, "free_memory", lambda device: math.inf)
    assert [
        row.status for row in rows_of([10**12, 64], impl=["dilated"], causal=False, **TINY)
    ] == ["oom", "ok"]
    # more than torch can count
    (row,) = rows_of([10**12], impl=["dilated"], causal=False, batch=2**32, **TINY)
    assert row.status == "oom"


FakeOp = Callable[[float], None]


@pytest.fixture
def fake_op(monkeypatch: pytest.MonkeyPatch) -> FakeOp:
    """`fake_op(r)`: the op is one that runs r FLOPs a second on a clock of its own: seq^2 dense, seq dilated."""

    def install(rate: float) -> None:
        now = [0.0]

        def make(settings: Settings, impl: str, direction: str, seq: int) -> Case:
            flops = float(seq * seq if impl == "dense" else seq)

            def run() -> None:
                now[0] += flops / rate

            return Case(
                Measurement(impl, direction, seq),
                lambda tokens: flops * (tokens > 0),
                0,
                lambda: run,
            )

        clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0])
        monkeypatch.setattr(benchmark, "time", clock)
        monkeypatch.setattr(benchmark, "case_of", make)

    return install


@pytest.mark.parametrize(
    ("rate", "seq", "options", "expected"),
    [
        # 10 s warm-up and 3 runs leave 10 of 50 s: enough for 5, and then for nothing
        (
            1.0,
            [10, 20, 2],
            {"impl": ["dilated"], "max_time": 50.0},
            ["10 ok", "20 stopped", "2 ok"],
        ),
        (1.0, [10, 10], {"impl": ["dilated"], "max_time": 40.0}, ["10 ok", "10 stopped"]),
        (1.0, [10], {"impl": ["dilated"], "max_time": 0.0}, ["10 stopped"]),
        (
            100.0,
            [10, 20, 1000],
            {"impl": ["dense"], "max_dense_time": 3.0},
            ["10 ok", "20 skipped", "1000 skipped"],
        ),
        (100.0, [10, 20], {"impl": ["dense"], "max_dense_time": 0.0}, ["10 ok", "20 skipped"]),
        (100.0, [20, 1000], {"max_dense_time": 5.0}, ["20 ok", "20 ok", "1000 ok", "1000 skipped"]),
        # 10 s are 10^10 FLOPs, and a shorter run has told the rate
        (
            1e9,
            [10**6, 50_000],
            {"impl": ["dense"], "max_dense_time": 10.0},
            ["1000000 skipped", "50000 ok"],
        ),
    ],
)
def test_what_does_not_fit_the_time(fake_op, rate, seq, options, expected):
    fake_op(rate)
    assert [f"{row.seq} {row.status}" for row in rows_of(seq, **options)] == expected


def test_what_will_not_run_is_left_out_of_the_tokens_to_come(fake_op, monkeypatch):
    """What would take too long, then what does not fit in memory. At the end, all has run."""
    fake_op(100.0)
    monkeypatch.setattr(benchmark, "free_memory", lambda device: 500)
    make = benchmark.case_of

    def with_memory(*case: Any) -> Case:
        return dataclasses.replace(make(*case), memory_bytes=case[-1] * (case[1] == "dense"))

    monkeypatch.setattr(benchmark, "case_of", with_memory)
    totals, tokens = [], []
    settings = Settings.of(seq=[10, 400, 1000], max_dense_time=5.0)
    rows = [*bench(settings, events=Events(progress=tokens.append, total=totals.append))]
    assert [row.status for row in rows] == ["ok", "ok", "ok", "skipped", "ok", "skipped"]
    assert totals == [2 * (10 + 400 + 1000), 10 + 10 + 400 + 1000 + 1000, 10 + 10 + 400 + 1000]
    assert sum(tokens) == totals[-1]


def test_a_warm_up_that_takes_the_time_is_the_measurement(fake_op):
    fake_op(1.0)
    (row,) = rows_of([30], impl=["dilated"], max_time=50.0)
    assert (row.status, row.seconds) == ("ok", 30.0)


LONG = {"impl": ["dilated"], "pattern": Pattern((16, 64), (1, 4)), **TINY}


@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_a_long_run_is_streamed_and_reports_every_decade(monkeypatch, chunk):
    monkeypatch.setattr(benchmark, "FIRST_DECADE", 10)
    seen: list[int] = []
    rows = list(
        bench(Settings.of(seq=[300], chunk=chunk, **LONG), events=Events(progress=seen.append))
    )
    assert [(row.start, row.stop) for row in rows] == [(0, 10), (10, 100), (100, 300), (None, None)]
    assert {row.status for row in rows} == {"ok"}
    assert {row.cache_bytes for row in rows} == {2 * 3 * 8 * 4 * 32}
    assert sum(seen) == 300
    whole = rows[-1]
    assert 0 < sum(row.seconds or 0 for row in rows[:-1]) <= whole.seconds
    assert all(row.cpu_seconds is not None for row in rows)
    assert whole.tokens_per_second == pytest.approx(300 / whole.seconds)
    for size in (300, chunk):
        twice = rows_of([300], chunk=size, batch=2, **LONG)[-1]
        assert twice.tokens_per_second == pytest.approx(600 / twice.seconds)
    assert whole.flops_per_second == pytest.approx(
        attention_flops(Pattern((16, 64), (1, 4)), 3, 8, 300, True) / whole.seconds
    )


def test_a_chunk_that_is_itself_long_is_streamed(monkeypatch):
    """As the default chunk on a GPU is, 1Mi tokens."""
    monkeypatch.setattr(benchmark, "LONG", 100)
    monkeypatch.setattr(benchmark, "BENCH_CHUNK", 3000)
    (row,) = rows_of([10_000], **LONG)
    assert (row.status, row.chunk) == ("ok", 3000)


def test_each_chunk_attends_from_its_place_to_what_its_queries_see(monkeypatch):
    places, own = [], benchmark.dilated_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, start: int, far: Outside
    ) -> Tensor:
        places.append((start, stop := start + q.shape[1]))
        assert {*far_spans(pattern, start, stop, True, stop)} <= {keys.span for keys in far.keys}
        return own(q, k, v, pattern, start=start, far=far)

    monkeypatch.setattr(benchmark, "dilated_attention", attend)
    rows_of([300], chunk=33, **LONG)
    assert places[-10:] == [(start, min(start + 33, 300)) for start in range(0, 300, 33)]


def test_a_streamed_run_stops_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(benchmark, "FIRST_DECADE", 10)
    rows = rows_of([10**9], chunk=64, max_time=0.2, **LONG)
    last = rows[-1]
    assert (last.status, last.start) == ("stopped", 0)
    assert 64 <= last.stop < 10**9
    assert last.tokens_per_second
    assert "the time is over" in (last.reason or "")


def test_ctrl_c_gives_what_a_streamed_run_had():
    def interrupt(tokens: int) -> None:
        raise KeyboardInterrupt

    rows = bench(Settings.of(seq=[10**6], chunk=64, **LONG), events=Events(progress=interrupt))
    row = next(rows)
    assert (row.status, row.stop) == ("stopped", 64)
    with pytest.raises(KeyboardInterrupt):
        next(rows)


def test_memory_that_runs_out_in_a_streamed_run_is_a_row_and_not_the_end():
    def ran_out(tokens: int) -> None:
        if tokens == 64:
            raise MemoryError

    begun, other = bench(
        Settings.of(seq=[300, 20], chunk=64, **LONG), events=Events(progress=ran_out)
    )
    assert (begun.status, begun.stop, begun.reason) == ("oom", 64, "memory ran out after 64 tokens")
    assert other.status == "ok"


def test_no_memory_for_the_first_chunk_of_a_streamed_run(monkeypatch):
    def no_memory(settings: Settings, impl: str, direction: str, seq: int) -> Case:
        def start() -> Callable[[int], None]:
            raise MemoryError

        return Case(Measurement(impl, direction, seq, chunk=4), float, 0, start, streamed=True)

    monkeypatch.setattr(benchmark, "case_of", no_memory)
    (row,) = rows_of([10], impl=["dilated"])
    assert (row.status, row.seconds, row.reason) == ("oom", None, "memory ran out after 0 tokens")


def test_long_sequences_have_a_shape_of_their_own():
    short, long = (
        Settings.of(seq=[10**6 - 1], device="cpu"),
        Settings.of(seq=[8192, 10**9], device="cpu"),
    )
    assert (short.heads, short.head_dim, short.pattern_for(8192)) == (12, 64, Pattern.paper())
    assert (long.heads, long.head_dim, long.pattern_for(8192)) == (
        2,
        32,
        Pattern.geometric(8192, base=256),
    )
    assert Settings.of(seq=[10**9], heads=12, device="cpu").heads == 12
    assert case_of(long, "dilated", "forward", 10**9).streamed


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": "model"}, {"seq": None}, {"impl": ["sparse"]}, {"direction": ["sideways"]},
        {"pattern": "plaid"}, {"dtype": "fp8"}, {"chunk": 0}, {"heads": 0}, {"repeats": 0}, {"seq": [0]},
        {"device": "cuda:99"}, {"impl": ["flex"]}, {"max_time": -1.0},
        {"max_dense_time": float("nan")},
        {"tokens": 5},
        {"pattern": Pattern((10**18,), (1,))}, {"pattern": Pattern((16,), (10**18,))},
        {"pattern": parse_pattern("window:64,chosen=2x32")},
    ],
)  # fmt: skip
def test_wrong_settings_are_told_before_the_first_row(wrong):
    with pytest.raises(ConfigError):
        Settings.of(**{"seq": [16], **wrong})


COUNTS = ("batch", "heads", "head_dim", "repeats")


@pytest.mark.parametrize("name", ["seq", *COUNTS])
@pytest.mark.parametrize("size", [2**63 - 1, 10**30])
def test_no_size_is_too_large_to_be_told(name, size):
    with pytest.raises(
        ConfigError,
        match=rf"--{name.replace('_', '-')}.* should be less than or equal to \d+ \(got ",
    ):
        Settings.of(**{"seq": [64], name: [64, size] if name == "seq" else size})


def largest(name: str) -> int:
    return next(rule.le for rule in Settings.model_fields[name].metadata if hasattr(rule, "le"))


@pytest.mark.parametrize("name", ["batch", "heads", "head_dim"])
def test_the_largest_sizes_are_measured_or_skipped(name):
    shape = {"heads": 1, "head_dim": 2, "chunk": 2**70, "repeats": 1, name: largest(name)}
    assert {row.status for row in rows_of([16], **shape)} <= {"ok", "skipped"}


def test_a_kernel_that_cannot_run_is_a_configuration_error(monkeypatch):
    monkeypatch.setenv("LONGNET_KERNEL", "abacus")
    with pytest.raises(ConfigError, match="abacus"):
        Settings.of(seq=[16])
