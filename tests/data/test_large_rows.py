"""Proves that a row larger than memory is opened at once and read in windows, in bounded memory. All marked slow."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pytest

pytestmark = pytest.mark.slow

# Runs a body that reads `path`, with the peak of anonymous memory above that of the imports, sampled by a thread: pages
# of mapped files (RssFile) are the system's to drop and do not count.
MEASURE = """
import json, sys, threading, time
import numpy as np, pyarrow as pa
from longnet_cli.data import documents
from longnet_cli.data.inputs import Inputs

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def sample():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

path, before, peak, done, result = sys.argv[1], anonymous(), 0, threading.Event(), {}
sampler = threading.Thread(target=sample)
sampler.start()
try:
    exec(sys.argv[2])
finally:
    done.set()
    sampler.join()
print(json.dumps({**result, "peak": max(peak, anonymous()) - before}))
"""

SCAN = """
total = count = 0
started = time.perf_counter()
for document in Inputs([path], vocab_size=50_000).documents():
    for start in range(0, len(document), 2048):
        total += int(document.read(start, start + 2049)[:2048].sum())
    count += len(document)
result = {"sum": total, "count": count, "seconds": time.perf_counter() - started}
"""


def measure(path: str | Path, body: str, env: dict[str, str], **options: Any) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURE, str(path), body]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=300, **options)
    return dict(json.loads(done.stdout))


class Sparse:
    """A binary sink in which large runs are holes: 1e9 tokens (all 0) take no disk and no time."""

    closed = False

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size < 1 << 20:
            return self.file.write(data)
        self.file.seek(size, 1)
        return size

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self.file.close()


@pytest.mark.parametrize("kind", ["list", "large_list"])
def test_a_row_of_1e9_tokens_opens_at_once(tmp_path, command_env, capsys, kind):
    tokens = 1_000_000_000
    zeros = pa.py_buffer(np.zeros(tokens, np.int32))  # pages that nobody touches
    values = pa.Array.from_buffers(pa.int32(), tokens, [None, zeros])
    if kind == "list":
        rows = pa.ListArray.from_arrays(pa.array([0, tokens], pa.int32()), values)
    else:
        rows = pa.LargeListArray.from_arrays(pa.array([0, tokens], pa.int64()), values)
    batch = pa.record_batch({"input_ids": rows})
    sink = Sparse(tmp_path / "x.arrow")
    with ipc.new_file(pa.PythonFile(sink, "w"), batch.schema) as writer:
        writer.write_batch(batch)
    sink.close()
    assert (tmp_path / "x.arrow").stat().st_size > 4e9
    body = """
started = time.perf_counter()
document, = Inputs([path], vocab_size=50_000).documents()
opened = time.perf_counter()
window = document.read(len(document) - 2049)
result = {"count": len(document), "window": len(window)}
result |= {"open": opened - started, "read": time.perf_counter() - opened, "mapped": pa.total_allocated_bytes()}
"""
    got = measure(tmp_path / "x.arrow", body, command_env)
    assert (got["count"], got["window"]) == (tokens, 2049)
    assert got["peak"] < 20 << 20
    assert got["mapped"] < 1 << 20
    with capsys.disabled():
        print(f"\n1e9 tokens in a {kind}: opened in {got['open'] * 1e3:.1f} ms, window in {got['read'] * 1e3:.1f} ms")


def random_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50_000, 100_000_000, dtype=np.int32)


def test_windows_of_a_row_of_400_mb_take_no_memory(tmp_path, command_env, capsys):
    ids = random_ids()
    table = pa.table({"input_ids": pa.array([ids], pa.large_list(pa.int32()))})
    with ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    got = measure(tmp_path / "x.arrow", SCAN, command_env)
    assert (got["sum"], got["count"]) == (int(ids.sum(dtype=np.int64)), len(ids))
    assert got["peak"] < 100 << 20
    with capsys.disabled():
        rate = got["count"] / got["seconds"] / 1e6
        print(f"\nwindows of 2049 tokens: {rate:.0f} M tokens/s, peak {got['peak'] / 2**20:.0f} MiB anonymous")


def test_a_document_in_parts_through_a_pipe_takes_disk_not_memory(tmp_path, command_env):
    """800 MB of rows that share a doc_id: at most SPOOL_BYTES of them are kept in memory."""
    ids = random_ids()
    schema = pa.schema([("doc_id", pa.string()), ("part", pa.int32()), ("input_ids", pa.large_list(pa.int32()))])
    with ipc.new_stream(tmp_path / "x.arrow", schema) as writer:
        for part, values in enumerate(np.split(np.concatenate([ids, ids]), 40)):
            writer.write_batch(
                pa.record_batch(
                    [pa.array(["a"]), pa.array([part], pa.int32()), pa.array([values], schema.field(2).type)], schema
                )
            )
    with subprocess.Popen(["cat", tmp_path / "x.arrow"], stdout=subprocess.PIPE) as cat:
        got = measure("-", "documents.SPOOL_BYTES = 64 << 20\n" + SCAN, command_env, stdin=cat.stdout)
    assert (got["sum"], got["count"]) == (2 * int(ids.sum(dtype=np.int64)), 2 * len(ids))
    assert got["peak"] < 300 << 20


def test_json_lines_through_a_pipe_take_memory_for_some_lines(tmp_path, command_env):
    line = json.dumps({"input_ids": list(range(10_000))}) + "\n"
    (tmp_path / "x").write_text(line * 2000)  # 118 MB
    with subprocess.Popen(["cat", tmp_path / "x"], stdout=subprocess.PIPE) as cat:
        got = measure("-", SCAN, command_env, stdin=cat.stdout)
    assert got["count"] == 2000 * 10_000
    assert got["peak"] < 100 << 20
