"""A causal net in chunks = the net at once: logits, loss and every parameter's gradient. A bidirectional one in chunks,
layer by layer, in memory or spilled to a disk = the net at once.

What the reader reads: documents as sequences, in batches. That its numbers are right, scoring and encoding test.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import slide, slide_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_nets import CAUSAL, TOLERANCE, draw, error, gradients, net
from strategies import (
    PAPER_64TH,
    chosen_patterns,
    cuts,
    patterns,
    patterns_with_options,
    split,
)
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.data.documents.token_documents import Document, Part
from longnet_cli.data.documents.vectors import Vectors
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Bos, InputSequence
from longnet_cli.running import layerwise
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.layerwise import fits_beside, hidden_in_chunks
from longnet_cli.running.reader import batches_by_length, default_chunk

NESTED = Pattern((16, 32, 128), (1, 3, 8))  # xPos needs segments that nest
# of patterns with chosen blocks and without
TWICE = settings(max_examples=2 * settings.default.max_examples)


def asked(
    pattern: Pattern, position: str, dtype: torch.dtype, **sizes: int
) -> tuple[LongNet, float]:
    """A net, and how near it is to be."""
    if pattern.chosen:
        position = "rope" if position == "xpos" else position
    return net(NESTED if position == "xpos" else pattern, position, **sizes).to(dtype), TOLERANCE[
        dtype
    ]


@TWICE
@given(
    position=st.sampled_from(["rope", "rope_by_level", "none", "xpos"]),
    dtype=st.sampled_from([*TOLERANCE]),
    pattern=CAUSAL | chosen_patterns(),
    heads=st.integers(1, 6),
    llama=st.booleans(),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 200),
    sizes=cuts(),
)
def test_any_chunks_give_the_logits_of_the_whole(
    position, dtype, pattern, heads, llama, batch, tokens, sizes
):
    model, near = asked(pattern, position, dtype, heads=heads, llama=llama)
    ids = draw(batch, tokens)
    with torch.no_grad():
        whole = model.logits(model(ids))
        stream = CausalStream(model)
        parts = [model.logits(stream(part)) for part in ids.split(split(tokens, sizes), 1)]
    assert error(torch.cat(parts, 1), whole) <= near
    assert stream.position == tokens
    rows = model.config.pattern.cache_rows
    assert (
        pattern.chosen
        or stream.cache_bytes <= 2 * 2 * batch * model.config.dim * whole.itemsize * rows
    )


@TWICE
@given(
    position=st.sampled_from(["rope", "rope_by_level", "none", "xpos"]),
    dtype=st.sampled_from([*TOLERANCE]),
    pattern=CAUSAL,
    llama=st.booleans(),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 200),
    chunk=st.integers(1, 120),
)
def test_chunked_training_is_whole_training(position, dtype, pattern, llama, batch, tokens, chunk):
    model, near = asked(pattern, position, dtype, llama=llama)
    ids, targets = draw(batch, tokens), draw(batch, tokens, seed=1)
    targets[:, ::5] = -100
    loss = model.nll(model(ids), targets).sum(dtype=torch.float64)
    (loss * 0.5).backward()
    expected = gradients(model)
    model.zero_grad()
    found = backward_in_chunks(model, ids, targets, max(chunk, tokens // 20), scale=0.5)
    floor = max(x.double().norm().item() for x in expected)
    if floor == 0:  # no target was left
        assert found == loss == 0
        return
    assert error(found, loss.detach()) <= near
    for (name, _), a, b in zip(model.named_parameters(), gradients(model), expected, strict=True):
        # a bias of k moves no softmax: its gradient is rounding alone, measured against the largest
        off = (a - b).double().norm().item() / max(b.double().norm().item(), 0.1 * floor)
        assert off <= near, f"{name} is off by {off:.2e}"


def test_training_with_dropout_computes_again_what_it_dropped():
    """Against one graph over all chunks, drawn from the same random numbers."""
    model = net(PAPER_64TH, dropout=0.3).double().train()
    ids, targets = draw(1, 300), draw(1, 300, seed=1)
    torch.manual_seed(5)
    found = backward_in_chunks(model, ids, targets, 70)
    after, in_chunks = torch.rand(1), gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    loss = whole_graph(model, ids, targets, 70)
    loss.backward()
    assert torch.equal(after, torch.rand(1))
    assert error(found, loss.detach()) <= 1e-12
    assert all(
        error(a, b) <= 1e-10
        for a, b in zip(in_chunks, gradients(model), strict=True)
        if b.norm() > 1e-9
    )


def whole_graph(model: LongNet, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """The loss of all chunks in one graph: far keys are taken, differentiably, from all that came before."""
    from longnet_cli.attention import FarSpan, Outside, far_keys

    pattern = model.config.pattern
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    for part, wanted in zip(ids.split(chunk, 1), targets.split(chunk, 1), strict=True):

        def far(layer: int, q: Tensor, k: Tensor, v: Tensor, start: int = start) -> Outside:
            before = past[layer]
            past[layer] = [*before, (k, v)]
            spans = [
                FarSpan(i, start // w * w, start)
                for i, (w, _) in enumerate(pattern.levels)
                if start % w
            ]
            everything = [torch.cat(x, 1) for x in zip(*before, strict=True)]
            return Outside([far_keys(*everything, pattern, span) for span in spans])

        total = total + model.nll(model(part, start=start, far=far), wanted).sum(
            dtype=torch.float64
        )
        start += part.shape[1]
    return total


def test_bf16_training_in_chunks_is_near():
    model = net(PAPER_64TH)
    ids, targets = draw(1, 400), draw(1, 400, seed=1)
    backward_in_chunks(model, ids, targets, 64)
    exact = gradients(model)
    model.zero_grad()
    backward_in_chunks(model, ids, targets, 64, dtype="bf16")
    floor = max(x.norm().item() for x in exact)
    for a, b in zip(gradients(model), exact, strict=True):
        assert (a - b).norm().item() <= 0.05 * max(b.norm().item(), floor * 0.1)


def test_only_one_chunk_of_activations_lives():
    """Tensors alive at the end of each chunk's backward do not grow with the number of chunks."""
    model = net(Pattern((64,), (1,)), layers=3)
    peaks = []
    for chunks in (4, 12):
        ids = draw(1, 64 * chunks)
        gc.collect()
        counts: list[int] = []

        def look(*_: object, counts: list[int] = counts) -> None:
            tensors = (x for x in gc.get_objects() if type(x) is Tensor)
            counts.append(sum(x.is_floating_point() and x.shape[:2] == (1, 64) for x in tensors))

        hook = model.final_norm.register_full_backward_hook(look)
        backward_in_chunks(model, ids, ids, 64)
        hook.remove()
        peaks.append(max(counts))
    assert peaks[0] == peaks[1] > 0


def test_a_bidirectional_net_cannot_be_streamed():
    with pytest.raises(ConfigError, match="bidirectional"):
        CausalStream(net(PAPER_64TH, causal=False))


def test_default_chunk_follows_the_models_size():
    device = torch.device("cpu")
    small, large = (net(PAPER_64TH, heads=h).config for h in (2, 32))
    assert default_chunk(small, device) > default_chunk(large, device) > 256
    assert default_chunk(large, device).bit_count() == 1


def test_batches_by_length():
    lengths = [3, 100, 7, 7, 1, 40, 0]
    batches = list(batches_by_length(lengths, limit=50))
    assert batches == [[1], [5], [2, 3, 0, 4]]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 50 for b in batches)
    lengths = [100 - i for i in range(50)] * 3
    padded = 0
    for batch in batches_by_length(lengths, limit=2048, least=256):
        longest, shortest = max(lengths[i] for i in batch), min(lengths[i] for i in batch)
        assert longest * len(batch) <= 2048
        assert longest * (len(batch) - 1) < 256 or 16 * shortest >= 15 * longest
        padded += longest * len(batch)
    assert padded < 1.06 * sum(lengths)


def of_ids(bos: Bos) -> tuple[InputSequence, np.ndarray]:
    """A sequence of token ids, and all its rows."""
    document = Document("a", np.arange(5), None, "a.txt")
    return LongNet.from_pretrained("longnet-tiny").sequence(document, bos), np.append(
        np.atleast_1d(bos or ()), range(5)
    )


def of_tiles(grid: int) -> tuple[InputSequence, np.ndarray]:
    encoder, (x, at) = slide_encoder(grid=grid), slide(5)
    document = Vectors(
        "a", "a.h5", 6, [Part(x.numpy().ravel())], at.double().numpy(), None, str, {}
    )
    rows = encoder.net.rows(x[None], at[None] if grid else None, torch.tensor([5]))
    return encoder.net.sequence(document), rows[0].numpy()


@pytest.mark.parametrize(
    ("found", "given"),
    [(of_ids, None), (of_ids, 7), (of_ids, (7, 8, 9)), (of_tiles, 50), (of_tiles, 0)],
)
def test_any_part_of_a_sequence_is_that_part_of_all_its_rows(found, given):
    sequence, rows = found(given)
    assert len(sequence) == len(rows) == sequence.own_start + 5
    for start in range(len(rows) + 1):
        for stop in range(start, len(rows) + 1):
            part = sequence.read(start, stop)
            np.testing.assert_array_equal(part, rows[start:stop])
            assert part.dtype == (np.int64 if found is of_ids else np.float32)


@given(
    spilled=st.booleans(),
    dtype=st.sampled_from([*TOLERANCE]),
    pattern=patterns() | patterns_with_options(causal=False),
    heads=st.integers(1, 6),
    llama=st.booleans(),
    tokens=st.integers(1, 200),
    chunk=st.integers(1, 120),
    padding=st.sampled_from(["exact", "zero_key"]),
)
def test_any_chunk_gives_what_the_whole_does(
    tmp_path_factory, spilled, dtype, pattern, heads, llama, tokens, chunk, padding
):
    if pattern.refusal(False, padding):
        padding = "exact"
    sizes = {"heads": heads, "layers": 3, "llama": llama}
    model = net(pattern, causal=False, padding=padding, **sizes).to(dtype)
    ids = draw(1, tokens)
    with torch.no_grad():
        whole = model(ids)
    folder = tmp_path_factory.getbasetemp() if spilled else None
    done: list[int] = []
    chunk = max(chunk, tokens // 20)
    parts = list(
        hidden_in_chunks(
            model, lambda a, b: ids[:, a:b], tokens, chunk, spill=folder, on_chunk=done.append
        )
    )
    assert error(torch.cat(parts, 1), whole) <= TOLERANCE[dtype]
    assert [part.shape[1] for part in parts] == [len(part) for part in ids[0].split(chunk)]
    assert sum(done) == 3 * tokens


def test_under_bf16_it_is_near_and_the_collected_rows_are_bf16(tmp_path):
    model = net(PAPER_64TH, causal=False)
    ids = draw(1, 500)
    with torch.no_grad():
        whole = model(ids)
    parts = list(
        hidden_in_chunks(model, lambda a, b: ids[:, a:b], 500, 70, spill=tmp_path, dtype="bf16")
    )
    assert error(torch.cat(parts, 1), whole) <= 2e-2


def test_the_spill_file_has_no_name_and_ends_with_its_reader(tmp_path):
    model = net(PAPER_64TH, causal=False)
    ids = draw(1, 300)
    parts = hidden_in_chunks(model, lambda a, b: ids[:, a:b], 300, 64, spill=tmp_path)
    next(parts)
    assert list(tmp_path.iterdir()) == []
    assert _maps(tmp_path)
    del parts
    assert not _maps(tmp_path)


def _maps(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("free", "fits"), [(1199, False), (1200, True)])
def test_a_device_keeps_what_leaves_room_for_chunks(monkeypatch, free, fits):
    monkeypatch.setattr(layerwise, "free_memory", lambda device: free)
    assert fits_beside(forward=100, size=1000, device=torch.device("cuda")) == fits


def test_no_room_is_said_before_any_work(tmp_path, monkeypatch):
    model = net(PAPER_64TH, causal=False)

    def read(start: int, stop: int) -> torch.Tensor:
        raise AssertionError("nothing should be read")

    monkeypatch.setattr(layerwise, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match="--spill"):
        next(hidden_in_chunks(model, read, 10_000, 64))
    with pytest.raises(ConfigError, match="No such file or directory"):
        next(hidden_in_chunks(model, read, 10_000, 64, spill=tmp_path / "missing"))
    with pytest.raises(MemoryLimitError, match="GiB are needed"):
        next(hidden_in_chunks(model, read, 10**13, 10**10, spill=tmp_path))
