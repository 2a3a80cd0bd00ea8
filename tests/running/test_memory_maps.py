"""What chunks keep for each other, in a map of memory or of a file: the same numbers, in the bytes that are stated."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pattern_nets import draw, gradients, net
from strategies import patterns, patterns_with_options

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.jobs.training.objective import backward
from longnet_cli.jobs.training.step_bytes import far_bytes
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.memory_maps import MappedMemory


class Measured(MappedMemory):
    """One that knows the most bytes that were used of it."""

    most = 0

    def empty(self, *arguments, **options) -> torch.Tensor:
        found = super().empty(*arguments, **options)
        self.most = max(self.most, self._used)
        return found


# a segment of one token has no room
@example(dtype="fp32", pattern=Pattern((1,), (1,)), tokens=2, chunk=1)
@given(
    dtype=st.sampled_from(["fp32", "bf16"]),
    pattern=patterns() | patterns_with_options(causal=True) | st.just(Pattern.dense()),
    tokens=st.integers(2, 200),
    chunk=st.integers(1, 120),
)
def test_a_file_changes_no_bit_and_has_the_stated_size(
    tmp_path_factory, dtype, pattern, tokens, chunk
):
    model, ids, chunk = net(pattern), draw(1, tokens), max(chunk, tokens // 20)
    in_memory = backward_in_chunks(model, ids, ids, chunk, dtype=dtype)
    expected = gradients(model)
    model.zero_grad()
    stored = far_bytes(model.config, tokens, chunk, 4 if dtype == "fp32" else 2).stored
    room = Measured(stored, tmp_path_factory.getbasetemp())
    found = backward_in_chunks(model, ids, ids, chunk, dtype=dtype, allocate=room.empty)
    assert torch.equal(found, in_memory)
    assert all(map(torch.equal, gradients(model), expected))
    assert not room._alive  # nothing is held any more
    # rows and sums of one size share rooms, in fp32; at least the rows are all alive at the end of the forward
    assert stored / 3 <= room.most <= stored


def test_documents_of_all_lengths_fit_the_room_of_the_longest():
    model, ids = net(Pattern((16, 64), (1, 2), look_back=1)), draw(2, 300)
    room = Measured(far_bytes(model.config, 300, 40, 4).stored)
    starts = [[0], [0, 50, 171]]  # 300 tokens, and 50, 121 and 129
    for _ in range(2):
        backward(model, ids, ids, chunk=40, starts=starts, allocate=room.empty)
    assert 0 < room.most <= len(room._map)
    assert not room._alive


def test_room_is_given_again():
    room = MappedMemory(256)
    first, second = (room.empty((2, 4, 4), dtype=torch.float32) for _ in range(2))
    with pytest.raises(ValueError, match="none are left for 4 more"):
        room.empty((1,), dtype=torch.float32)
    second.fill_(2)
    place, view = first.data_ptr(), first[1]
    del first
    with pytest.raises(ValueError, match="none are left"):  # the view is still there
        room.empty((2, 4, 4), dtype=torch.float32)
    del view
    third = room.empty((8, 4), dtype=torch.float32)
    assert third.data_ptr() == place
    assert (second == 2).all()
    del second, third
    # of another size, where nothing is alive
    assert room.empty((16, 4), dtype=torch.float32).data_ptr() == place


def test_a_folder_or_a_disk_that_does_not_do(tmp_path):
    with pytest.raises(ConfigError, match=r"--spill .*: No such file or directory"):
        MappedMemory(1, tmp_path / "missing")
    with pytest.raises(MemoryLimitError, match="GiB are needed"):
        MappedMemory(10**15, tmp_path)
    with pytest.raises(MemoryLimitError, match="GiB are needed: keep them on a disk"):
        MappedMemory(1 << 46)
    assert list(tmp_path.iterdir()) == []


def test_the_command(run_longnet, tmp_path, small_disk):
    """A full disk is said before work starts; else nothing is left in the folder, and --dry-run tells the size."""
    (tmp_path / "data.txt").write_text("a line of text.\n" * 1000)
    sizes = "dim=16 num_layers=1 num_heads=2 ffn_dim=16 segment_lengths=[64] dilation_rates=[1]"
    sizes += " look_back=1 position=rope"
    settings = [f"--set=model.{setting}" for setting in sizes.split()]
    words = "train --data data.txt --steps 1 --chunk 64 --device cpu -o run --spill"
    command = [words, small_disk, *settings]
    full = run_longnet(*command, "--seq-len", "1Mi", code=5)
    assert full.stderr.splitlines()[1:] == [  # after what is trained
        f"longnet: error: --spill {small_disk}: No space left on device, 0.12 GiB are needed"
    ]
    assert not (tmp_path / "run").exists()
    told = run_longnet(*command, "--seq-len", "1Ki", "--dry-run", "--format", "json")
    rows = (15 + 1) * 2 * 64 * 16 * 4  # of 15 segments, and the gradients of one
    assert json.loads(told.stdout)["spill_bytes"] == rows
    run_longnet(*command, "--seq-len", "1Ki", code=0)
    assert list(small_disk.iterdir()) == []


@pytest.mark.gpu
def test_a_net_on_a_gpu_keeps_its_rows_on_the_host(tmp_path):
    model, ids = net(Pattern((16, 64), (1, 2), look_back=1, sinks=4)).cuda(), draw(1, 300).cuda()
    expected = backward_in_chunks(model, ids, ids, 40)
    grads = gradients(model)
    model.zero_grad()
    room = Measured(far_bytes(model.config, 300, 40, 4).stored, tmp_path)
    assert torch.equal(backward_in_chunks(model, ids, ids, 40, allocate=room.empty), expected)
    for found, whole in zip(gradients(model), grads, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    assert room.most > 0
