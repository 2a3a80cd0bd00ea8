"""Proves that a resumed run sees what an uninterrupted one would, on any number of ranks, and that an epoch shows every
token once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import NotedDocument as Document
from builders import ids_of
from files import write_file, write_rows
from hypothesis import given
from hypothesis import strategies as st
from strategies import document_starts

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents.document_index import index_documents
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.training import windows as module
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.objective import inputs_and_targets, stored_tokens
from longnet_cli.jobs.training.recipe import Recipe, load_recipe
from longnet_cli.jobs.training.training_data import build_data
from longnet_cli.jobs.training.windows import LONGEST_PERIOD, Batch, Mix, TokenStream, TokenWindows
from longnet_cli.nets.net import IGNORED
from longnet_cli.running.ranks.ranks import Ranks

EOS = -1  # no document holds it
SHIPPED = {name: getattr(module, name) for name in ("RUN_TOKENS", "POOL_RUNS")}

lengths = st.lists(st.integers(0, 30), min_size=1, max_size=25)


def documents(lengths: list[int], first: int = 0) -> list[Document]:
    """Documents in which no token occurs twice."""
    ends = first + np.cumsum(lengths)
    return [
        Document(np.arange(end - length, end)) for end, length in zip(ends, lengths, strict=True)
    ]


def stream(*lengths: int, first: int = 0) -> TokenStream:
    return TokenStream(documents(list(lengths), first), np.array(lengths), EOS)


def packed(stream: TokenStream) -> np.ndarray:
    return np.concatenate([np.append(EOS, document.tokens) for document in stream.documents])


def positions(windows: TokenWindows, count: int) -> list[tuple[int, int, int]]:
    return [windows.locate(n) for n in range(count)]


@pytest.fixture(scope="module", autouse=True)
def small_runs() -> Iterator[None]:
    """Blocks of 64 tokens and pools of 3 of them, so that small streams have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RUN_TOKENS", 64)
        patch.setattr(module, "POOL_RUNS", 3)
        yield


@given(lengths=lengths, data=st.data())
def test_a_stream_is_eos_doc_eos_doc(lengths, data):
    found = stream(*lengths)
    expected = packed(found)
    assert len(found) == len(expected)
    start = data.draw(st.integers(0, len(found) - 1))
    stop = data.draw(st.integers(start + 1, len(found)))
    out = np.full(stop - start, 99)
    for document in found.documents:
        document.reads.clear()
    found.read_into(out, start)
    assert np.array_equal(out, expected[start:stop])
    read = sum(b - a for document in found.documents for a, b in document.reads)
    assert read == np.count_nonzero(out != EOS)  # and nothing else
    assert all(len(document.reads) <= 1 for document in found.documents)


@given(lengths=lengths, data=st.data())
def test_a_batch_knows_where_documents_start(lengths, data):
    found = stream(*lengths)
    start = data.draw(st.integers(0, len(found) - 1))
    tokens = data.draw(st.integers(1, len(found) - start))
    batch = Batch([(found, start)], tokens, [0])
    assert [batch.document_starts(0, tokens)] == document_starts(ids_of(batch), EOS)


@pytest.mark.parametrize("seq_len", [1, 7, 32, 100])
def test_every_token_is_an_input_once_an_epoch(seq_len):
    @given(lengths=lengths, seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
    def check(lengths, seed, epoch):
        source = stream(*lengths, seq_len)
        windows = TokenWindows([source], seq_len, 1, seed)
        count = (len(source) - 1) // seq_len
        visited = [windows.locate(n) for n in range(epoch * count, (epoch + 1) * count)]
        assert {(s, e) for s, e, _ in visited} == {(0, epoch)}
        inputs = np.sort(
            np.concatenate([np.arange(start, start + seq_len) for _, _, start in visited])
        )
        # each once, without a gap
        assert np.array_equal(inputs, np.arange(inputs[0], inputs[0] + count * seq_len))
        # the last token is nothing but a target
        head, tail = (inputs[0], len(source) - 1 - (inputs[-1] + 1))
        assert head >= 0
        assert tail >= 0
        assert head + tail == (len(source) - 1) % seq_len
        assert windows.locate((epoch + 1) * count)[1] == epoch + 1

    check()


@st.composite
def runs(draw):
    """Arguments of TokenWindows with one to three sources, and (rows, world) to take them with."""
    seq_len = draw(st.integers(1, 40))
    sources = [
        stream(*draw(lengths), seq_len, first=1000 * s) for s in range(draw(st.integers(1, 3)))
    ]
    weights = [draw(st.sampled_from([1, 2, 0.5, 0.3])) for _ in sources]
    return sources, seq_len, draw(st.integers(0, 2**40)), weights


def take(run, count, rows=1, world=1, state=None):
    """The first `count` windows after `state`, as `world` ranks of `rows` see them, and the state after each batch."""
    sources, seq_len, seed, weights = run
    ranks = [
        TokenWindows(sources, seq_len, rows, seed, weights=weights, rank=d, world=world)
        for d in range(world)
    ]
    for windows in ranks:
        if state is not None:
            windows.resume(state)
    found, states = [], []
    for batches in islice(zip(*ranks, strict=True), -(-count // (rows * world))):
        assert all(after == batches[0][1] for _, after in batches)  # the same on every rank
        found += [ids_of(batch)[row] for row in range(rows) for batch, _ in batches]
        assert found[-1].dtype == np.int64
        states.append(batches[0][1])
    return np.array(found)[:count], states


@given(
    run=runs(), before=st.tuples(*[st.integers(1, 5)] * 3), rows=st.integers(1, 7), world=st.integers(1, 5),
)  # fmt: skip
def test_a_run_resumed_on_other_ranks_goes_on_as_one_that_was_not_stopped(run, before, rows, world):
    rows_before, world_before, batches = before
    whole, _ = take(run, 150)
    assert whole.shape == (150, run[1] + 1)
    count = batches * rows_before * world_before
    first, states = take(run, count, rows_before, world_before)
    assert np.array_equal(first, whole[:count])
    state = json.loads(json.dumps(states[-1]))
    assert state == states[-1]
    assert state["step"] == count
    second, _ = take(run, 150 - count, rows, world, state)
    assert np.array_equal(second, whole[count:])


@given(run=runs(), data=st.data())
def test_what_is_asked_for_is_read_and_nothing_else(run, data):
    first = data.draw(st.integers(0, run[1] + 1))
    last = data.draw(st.integers(first, run[1] + 1))
    whole, _ = take(run, 20)
    sources, seq_len, seed, weights = run
    batch, _ = next(iter(TokenWindows(sources, seq_len, 20, seed, weights=weights)))
    assert batch.shape == whole.shape
    assert np.array_equal(ids_of(batch), whole)
    for source in sources:
        for document in source.documents:
            document.reads.clear()
    part = np.stack([batch.read(row, first, last) for row in range(20)])
    assert np.array_equal(part, whole[:, first:last])
    reads = sum(
        b - a for source in sources for document in source.documents for a, b in document.reads
    )
    assert reads == np.count_nonzero(part != EOS)


@given(weights=st.lists(st.integers(1, 300), min_size=1, max_size=7))
def test_a_mix_is_within_one_window_of_its_weights_at_every_count(weights):
    mix = Mix(weights)
    counts = np.zeros(len(weights), np.int64)
    for n in range(2 * mix.period):
        source, before = mix.source(n)
        assert before == counts[source]
        counts[source] += 1
        assert np.all(np.abs(counts * sum(weights) - np.array(weights) * (n + 1)) < sum(weights))
    assert mix.source(10**15 * mix.period)[1] == 10**15 * mix.shares[mix.source(0)[0]]


def test_weights_are_what_was_typed():
    assert Mix([0.7, 0.3]).shares == [7, 3]
    assert Mix([2, 4, 6]).shares == [1, 2, 3]
    assert [Mix([0.5, 0.25, 0.25]).source(n)[0] for n in range(8)] == [0, 1, 0, 2, 0, 1, 0, 2]
    assert Mix([LONGEST_PERIOD - 1, 1]).period == LONGEST_PERIOD
    with pytest.raises(ConfigError, match="round them"):
        Mix([LONGEST_PERIOD, 1])


def test_a_short_source_begins_anew_without_the_others():
    windows = TokenWindows([stream(90), stream(20)], 10, 1, seed=0, weights=[1, 1])
    epochs = {source: [e for s, e, _ in positions(windows, 36) if s == source] for source in (0, 1)}
    assert epochs[0] == [0] * 9 + [1] * 9  # 9 windows an epoch
    assert epochs[1] == [epoch for epoch in range(9) for _ in range(2)]  # 2


@given(run=runs(), numbers=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_window_is_the_same_in_whatever_order_one_asks(run, numbers):
    sources, seq_len, seed, weights = run
    windows = TokenWindows(sources, seq_len, 1, seed, weights=weights)
    in_order = positions(TokenWindows(sources, seq_len, 1, seed, weights=weights), 201)
    assert [windows.locate(n) for n in numbers] == [in_order[n] for n in numbers]


def test_reads_of_a_pool_are_few_long_ranges():
    windows = TokenWindows([stream(10_000)], 8, 1, seed=5)  # 1250 windows, 8 a block, 24 a pool
    starts = np.array([start for _, _, start in positions(windows, 1250)])
    ranges = []
    for pool in np.split(starts, range(24, 1250, 24)):
        pool = np.sort(pool)
        ranges.append(np.split(pool, np.flatnonzero(np.diff(pool) != 8) + 1))
    # 3 blocks, and what is left of one that the pool before did not finish
    assert max(map(len, ranges)) <= 4
    assert np.mean([len(run) for pool in ranges for run in pool]) > 6
    # yet neighbours are hardly ever visited in a row
    assert np.mean(np.abs(np.diff(starts)) == 8) < 0.1


def test_epochs_differ_in_phase_and_order_and_so_do_seeds_and_sources():
    def epochs(seed: int, source: int = 0) -> list[list[int]]:
        windows = TokenWindows([stream(1000), stream(1000)], 16, 1, seed, weights=[1, 1])
        return np.array(
            [start for s, _, start in positions(windows, 2 * 62 * 40) if s == source]
        ).reshape(40, 62)

    found = epochs(seed=3)
    assert {min(epoch) for epoch in found.tolist()} == set(range(1000 % 16 + 1))
    assert not np.array_equal(found[0], np.sort(found[0]))
    orders = [*found, *epochs(seed=4), *epochs(seed=3, source=1)]
    assert len({tuple(np.argsort(order)) for order in orders}) == len(orders)


def test_the_order_is_pinned(monkeypatch):
    # A checkpoint of today must resume on the numpy of tomorrow. A change here needs another POSITION_VERSION.
    windows = TokenWindows([stream(200), stream(40)], 16, 1, seed=7, weights=[0.75, 0.25])
    assert positions(windows, 16) == [
        (0, 0, 39), (0, 0, 119), (0, 0, 183), (1, 0, 0), (0, 0, 167), (0, 0, 151), (0, 0, 7), (1, 0, 16),
        (0, 0, 135), (0, 0, 23), (0, 0, 55), (1, 1, 5), (0, 0, 87), (0, 0, 71), (0, 0, 103), (1, 1, 21),
    ]  # fmt: skip
    for name, value in SHIPPED.items():
        monkeypatch.setattr(module, name, value)
    large = TokenStream([Document(np.broadcast_to(0, 10**9))], np.array([10**9]), EOS)
    starts = [start for _, _, start in positions(TokenWindows([large], 2048, 1, seed=2**40), 6)]
    assert starts == [391844336, 337060336, 523823600, 602057200, 440703472, 309271024]


def test_a_batch_and_its_state():
    source = TokenStream(
        [
            Document(np.array([1, 2, 3]), "a.arrow, row 0"),
            Document(np.array([4]), "a.arrow, row 1"),
        ],
        np.array([3, 1]),
        9,
    )
    batch, state = next(iter(TokenWindows([source], 5, 2, seed=0)))
    assert ids_of(batch).tolist() == [[9, 1, 2, 3, 9, 4], [9, 1, 2, 3, 9, 4]]
    assert state == {
        "version": 2, "seed": 0, "seq_len": 5, "weights": [1], "tokens": [6],
        "digests": ["8bfe1ba2dc94cc89"],
        "step": 2,
    }  # fmt: skip


def test_a_state_far_into_a_run_is_reached_at_once():
    source = stream(1000)
    state = TokenWindows([source], 8, 1, seed=0).state(10**15) | {"step": 10**15 + 3}
    windows = TokenWindows([source], 8, 2, seed=0)
    windows.resume(state)
    batch, after = next(iter(windows))
    assert batch.shape == (2, 9)
    assert after["step"] == 10**15 + 5
    assert windows.locate(after["step"])[1] == (10**15 + 5) // 125


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 1}, ConfigError, "version 2"),
        ({"step": -1}, ConfigError, "version 2"),
        ({"step": "3"}, ConfigError, "version 2"),
        ({"seed": 1}, ConfigError, "seed 1, not 0"),
        ({"seq_len": 9}, ConfigError, "seq_len 9, not 8"),
        ({"weights": [1, 2]}, ConfigError, "weights"),
        ({"tokens": [102]}, DataError, "restore the data"),
        ({"digests": ["0"]}, DataError, "restore the data"),
        ({"digests": None}, DataError, "restore the data"),
    ],
)
def test_a_state_of_another_run_is_refused(change, error, message):
    state = TokenWindows([stream(100)], 8, 1, seed=0).state(7)
    windows = TokenWindows([stream(100)], 8, 1, seed=0)
    windows.resume(state)
    with pytest.raises(error, match=message):
        windows.resume(state | change)
    with pytest.raises(ConfigError):
        windows.resume({"seed": 0})


@pytest.mark.parametrize("other", [stream(49, 50), stream(50, 49, first=1)], ids=["lengths", "ids"])
def test_other_data_of_the_same_size_is_refused(other):
    state = TokenWindows([stream(50, 49)], 8, 1, seed=0).state(7)
    windows = TokenWindows([other], 8, 1, seed=0)
    with pytest.raises(DataError, match="restore the data"):
        windows.resume(state)


def test_too_little_data():
    with pytest.raises(DataError, match=r"the data has 4 tokens, fewer than one window of 5 "):
        TokenWindows([stream(3)], 4, 1, seed=0)
    with pytest.raises(DataError, match=r"source 1 of the mix has 0 tokens"):
        TokenWindows(
            [stream(5), TokenStream([], np.array([], int), EOS)], 4, 1, seed=0, weights=[1, 1]
        )


def test_windows_of_a_mapped_shard_are_copies(tmp_path):
    rows = pa.array([list(range(50)), [], list(range(50, 80))], pa.large_list(pa.uint16()))
    write_file(tmp_path / "a.arrow", pa.table({"input_ids": rows}))
    index = index_documents(Inputs([tmp_path / "a.arrow"], vocab_size=100))
    source = TokenStream(index, index.lengths, 99)
    windows = TokenWindows([source], 82, 1, seed=0)
    batch, _ = next(iter(windows))
    assert ids_of(batch).tolist() == [[99, *range(50), 99, 99, *range(50, 80)]]
    assert "a.arrow, row 0" in windows.places(0, 1)[0]
    batch.read(0, 0, 82)[:] = 0  # a view of the map would crash here


def recipe(**data: object) -> Recipe:
    model = {"dim": 8, "num_layers": 1, "num_heads": 1, "ffn_dim": 8, "pattern": "8/1"}
    train = {"stages": [{"seq_len": 16, "steps": 2}], "batch_tokens": 64, "log_every": 1}
    return load_recipe(None, {"model": model, "train": train, "data": data})


def test_a_recipe_mixes_sources(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 100)
    weights = {"a": 0.75, "b": 0.25}
    mix = [{"inputs": [str(tmp_path / f"{x}.txt")], "weight": weights[x]} for x in weights]
    (windows,) = build_data(recipe(mix=mix), Ranks()).windows
    batch, _ = next(iter(windows))
    assert (ids_of(batch) == ord("b")).any(1).tolist() == [False] * 3 + [True]
    assert train(recipe(mix=mix), tmp_path / "out").tokens == 2 * 64
    saved = Recipe.model_validate_json((tmp_path / "out/recipe.json").read_text())
    assert saved == recipe(mix=mix)


def test_a_mix_takes_the_place_of_inputs():
    with pytest.raises(ConfigError, match="not both"):
        recipe(train=["a"], mix=[{"inputs": ["a"], "weight": 1}])


# writes `A` and `.` in answers alone
CHATS = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}.{% endgeneration %}"
    "{% else %}{{ message.content }}?{% endif %}{% endfor %}"
)


def test_answers_alone_are_targets(tmp_path):
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(CHATS)
    turns = [(3, 5, 1, 0), (1, 9), (8,), (2, 2, 2, 2, 4, 30), (7, 1)]
    chats = [
        [
            {"role": ("user", "assistant")[turn % 2], "content": "qA"[turn % 2] * letters}
            for turn, letters in enumerate(chat)
        ]
        for chat in turns
    ]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    given = {"train": [str(path)], "tokenizer": str(tmp_path)}
    asked = recipe(**given, loss="answers")
    (windows,) = build_data(asked, Ranks()).windows
    answers = {ord("A"), ord(".")}
    counted = 0
    for batch, _ in islice(windows, 5):
        ids, targets, count = inputs_and_targets(
            batch, asked, torch.device("cpu"), Ranks(), eos_id=256, seed=0
        )
        plain = stored_tokens(batch, 1, 16, torch.device("cpu"))[:, :]
        wanted = torch.tensor([[token in answers for token in row] for row in plain.tolist()])
        assert torch.equal(targets[:, :], plain.where(wanted, IGNORED))
        assert torch.equal(targets[1, 3:9], targets[:, :][1, 3:9])
        assert torch.equal(ids[:, 1:], plain[:, :-1])
        assert count == wanted.sum()
        counted += count
    assert counted
    learned = {
        loss: train(recipe(**given, loss=loss), tmp_path / loss).loss for loss in ("all", "answers")
    }
    assert learned["all"] != learned["answers"]
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ConfigError, match="this is plain text, and answers of chats are asked for"):
        build_data(recipe(train=[str(tmp_path / "text.txt")], loss="answers"), Ranks())
    write_rows(path, [{"messages": chat[:1]} for chat in chats])
    with pytest.raises(DataError, match="no chat has an answer"):
        build_data(asked, Ranks())
