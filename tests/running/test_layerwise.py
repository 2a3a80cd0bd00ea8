"""A bidirectional net in chunks, layer by layer, in memory or spilled to a disk = the net at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_nets import TOLERANCE, draw, error, net
from strategies import PAPER_64TH, patterns, patterns_with_options

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.running import layerwise
from longnet_cli.running.layerwise import fits_beside, hidden_in_chunks


@given(
    spilled=st.booleans(),
    dtype=st.sampled_from([*TOLERANCE]),
    pattern=patterns() | patterns_with_options(causal=False),
    heads=st.integers(1, 6),
    tokens=st.integers(1, 200),
    chunk=st.integers(1, 120),
    padding=st.sampled_from(["exact", "zero_key"]),
)
def test_any_chunk_gives_what_the_whole_does(
    tmp_path_factory: pytest.TempPathFactory,
    spilled: bool,
    dtype: torch.dtype,
    pattern: Pattern,
    heads: int,
    tokens: int,
    chunk: int,
    padding: str,
) -> None:
    if pattern.refusal(False, padding):
        padding = "exact"
    model = net(pattern, heads=heads, layers=3, causal=False, padding=padding).to(dtype)
    ids = draw(1, tokens)
    with torch.no_grad():
        whole = model(ids)
    folder = tmp_path_factory.getbasetemp() if spilled else None
    done: list[int] = []
    chunk = max(chunk, tokens // 20)
    parts = list(hidden_in_chunks(model, lambda a, b: ids[:, a:b], tokens, chunk, spill=folder, on_chunk=done.append))
    assert error(torch.cat(parts, 1), whole) <= TOLERANCE[dtype]
    assert [part.shape[1] for part in parts] == [len(part) for part in ids[0].split(chunk)]
    assert sum(done) == 3 * tokens


def test_under_bf16_it_is_near_and_the_collected_rows_are_bf16(tmp_path: Path) -> None:
    model = net(PAPER_64TH, causal=False)
    ids = draw(1, 500)
    with torch.no_grad():
        whole = model(ids)
    parts = list(hidden_in_chunks(model, lambda a, b: ids[:, a:b], 500, 70, spill=tmp_path, dtype="bf16"))
    assert error(torch.cat(parts, 1), whole) <= 2e-2


def test_the_spill_file_has_no_name_and_ends_with_its_reader(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("free", "fits"), [(None, False), (1199, False), (1200, True)])
def test_a_device_keeps_what_leaves_room_for_chunks(
    monkeypatch: pytest.MonkeyPatch, free: int | None, fits: bool
) -> None:
    monkeypatch.setattr(layerwise, "free_memory", lambda device: free)
    assert fits_beside(forward=100, size=1000, device=torch.device("cuda")) == fits


def test_no_room_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
