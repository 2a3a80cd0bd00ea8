"""Check in ten minutes that this machine's GPU computes correctly, and how fast: a report in Markdown.

    make gpu                                     or python examples/gpu_report.py -o runs/gpu.md
    python examples/gpu_report.py --small        tries this script on a CPU, in tiny sizes

Where there is torch but no package index, copy the checkout with `build/wheels`, which `make wheels` fills elsewhere:
`make gpu` then runs the machine's own Python, with the packages from there, and installs nothing.

The report names the card and the versions, the kernels that work and why others do not, the outcome of `pytest -m gpu`,
the figures of `longnet bench` and of three steps of training, and the kernels that take the time of a forward and
backward pass, each with its command. Every step runs in its own process, with a share of the time. A step that fails,
or takes too long, becomes a line in the report, and the others go on. Exit codes: 0, everything was right; 1, a test or
a step failed, and the report says which; 2, there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PREDICTED = ROOT / "docs/measurements/gpu_predicted.json"  # from before any GPU had run this
DTYPES = ("bf16", "fp16", "fp32")
# How Python runs a command
MODULES = {
    "longnet": ["-m", "longnet_cli"],
    "pytest": ["-m", "pytest"],
    "python": [],
}
MOST_SHOWN = 15  # kernels
# Seconds that a process may take to start, and to end once it is asked to
START, GRACE = (
    25.0,
    10.0,
)
TRIED = "fp32 and not (compiled or math)"  # the tests that run with --small

Row = dict[str, Any]
TINY = ["--heads", "2", "--head-dim", "16", "--repeats", "1"]
SMALL_NET = {"vocab_size": 300, "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64}


@dataclass(frozen=True)
class Step:
    """A command, and `show`, which turns its output into lines of Markdown and a list of failures."""

    title: str
    command: list[str]  # its first word is one of MODULES
    weight: float  # its share of the time that is left, relative to the steps to come
    show: Callable[[str], tuple[list[str], list[str]]]
    bounded: bool = False  # whether it takes --max-time

    def run(self, seconds: float, env: dict[str, str]) -> tuple[list[str], list[str]]:
        """Return its part of the report, and its failures. Interrupt it after `seconds`, and kill it soon after."""
        command = [*self.command]
        if self.bounded:
            command += ["--max-time", f"{max(2.0, seconds - min(START, seconds / 2)):.0f}"]
        shown = shlex.join(command)
        argv = [sys.executable, *MODULES[command[0]], *command[1:]]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                argv, stdout=out, stderr=err, cwd=ROOT, env=env, start_new_session=True
            )
            code = _wait(process, seconds)
            out.seek(0)
            err.seek(0)
            found, said = out.read(), [line.strip() for line in err if line.strip()]
        failures = []
        if code is None:
            failures.append(
                f"`{shown}` was ended after {seconds:.0f} s; below is what it had done until then"
            )
        elif code:
            failures.append(
                f"`{shown}` ended with exit code {code}: {said[-1] if said else 'it said nothing'}"
            )
        try:
            lines, wrong = self.show(found)
        except (ValueError, KeyError, OSError, ElementTree.ParseError) as error:
            # A killed process leaves only a part of its output
            reason = f"{type(error).__name__}: {error}"
            lines, wrong = [f"Nothing can be read of its output: {reason}"], []
        if wrong and code == 1:  # the exit code only repeats it
            failures = []
        return [f"    {shown}", "", *lines], failures + wrong


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Return the exit code, or None if the process had to be ended. Kill all processes that it started."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest and bench keep what they have
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(head: str, rows: list[list[object]]) -> list[str]:
    """Return the lines of a table; `head` is `a | b`, and None is an empty cell."""
    cells = [
        " | ".join("" if cell is None else str(cell).replace("|", "/") for cell in row)
        for row in rows
    ]
    return [f"| {head} |", f"{'|---' * len(head.split('|'))}|", *(f"| {line} |" for line in cells)]


def scaled(value: float | None, unit: float, digits: int = 1) -> str | None:
    return None if value is None else f"{value / unit:,.{digits}f}"


def not_measured(rows: list[Row]) -> list[str]:
    found = [
        f"- {row['impl']} {row['direction']}, {row['seq']:,} tokens: {row['status']}"
        for row in rows
    ]
    return (
        ["", *(f"{line}, {row['reason']}" for line, row in zip(found, rows, strict=True))]
        if rows
        else []
    )


def rows_of(text: str) -> list[Row]:
    # The last line may be cut off
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def show_attention(text: str) -> tuple[list[str], list[str]]:
    """Return a line for each length and direction, with dilated beside dense attention."""
    rows = rows_of(text)
    seconds = {
        (row["seq"], row["direction"], row["impl"]): row for row in rows if row["status"] == "ok"
    }
    lines: list[list[object]] = []
    for seq, direction in dict.fromkeys((seq, direction) for seq, direction, _ in seconds):
        dilated, dense = (seconds.get((seq, direction, impl), {}) for impl in ("dilated", "dense"))
        times = [each.get("seconds") for each in (dilated, dense)]
        ratio = times[1] / times[0] if all(times) else None
        lines.append(
            [
                f"{seq:,}", direction, *(scaled(each, 1e-3, 2) for each in times),
                scaled(ratio, 1, 2),
                *(scaled(each.get("flops_per_second"), 1e12) for each in (dilated, dense)),
                scaled(dilated.get("tokens_per_second"), 1e6, 2), scaled(dilated.get("peak_rss_bytes"), 2**30, 2),
            ]
        )  # fmt: skip
    head = (
        "tokens | direction | dilated, ms | dense, ms | dense / dilated | dilated, TFLOP/s | dense, TFLOP/s | "
        "dilated, M tokens/s | dilated, GiB"
    )
    facts = [f"One layer's attention, {of_all(rows)}; {rows[0]['pattern']}.", ""] if rows else []
    return facts + table(head, lines) + not_measured(
        [row for row in rows if row["status"] != "ok"]
    ), []


def of_all(rows: list[Row]) -> str:
    row = rows[0]
    return f"{row['batch']} x {row['heads']} heads x {row['head_dim']}, causal, {row['dtype']}, kernel {row['kernel']}"


def show_stream(text: str) -> tuple[list[str], list[str]]:
    """Return a line for each decade of positions, and one for the whole."""
    rows = rows_of(text)
    measured = [row for row in rows if row["seconds"]]
    lines: list[list[object]] = [
        [
            f"{row['start'] or 0:,} to {row['stop'] or row['seq']:,}", scaled(row["seconds"], 1),
            scaled(row["tokens_per_second"], 1e6, 2), scaled(row["flops_per_second"], 1e12),
            scaled(row["peak_rss_bytes"], 2**30, 2), row["status"],
        ]
        for row in measured
    ]  # fmt: skip
    facts = []
    if rows:
        levels = f"{rows[0]['pattern'].count(',') + 1} levels"
        facts = [
            f"One layer's attention, {of_all(rows)}, {levels}, {rows[0]['chunk'] or 0:,} tokens at a time.",
            "",
        ]
    head = "positions | seconds | M tokens/s | TFLOP/s | GiB | status"
    return facts + table(head, lines) + not_measured(
        [row for row in rows if row not in measured]
    ), []


def trained(lengths: list[int], device: str, small: bool, seconds: float) -> Iterator[Row]:
    """Train longnet-125m for three steps of one sequence of each length, on random tokens; yield a row for each.

    A row has what the last step says in metrics.jsonl. With `small`, the net is tiny. No run begins after `seconds`.
    """
    import numpy as np
    import pyarrow as pa

    from longnet_cli.jobs.training.costs import step_flops
    from longnet_cli.jobs.training.recipe import load_recipe
    from longnet_cli.running.device import resolve_dtype, select_device
    from longnet_cli.running.ranks.ranks import Ranks

    begin = time.monotonic()
    sizes = SMALL_NET if small else {}
    vocabulary = sizes.get("vocab_size", 100_277)
    settings = [f"model.{name}={value}" for name, value in sizes.items()] + ["train.log_every=1"]
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).integers(256, vocabulary, 4 * max(lengths), dtype=np.int32)
        table = pa.table({"input_ids": pa.array([ids], pa.large_list(pa.int32()))})
        with pa.ipc.new_file(f"{folder}/tokens.arrow", table.schema) as file:
            file.write_table(table)
        for length in lengths:
            if time.monotonic() - begin > seconds:
                yield {"seq": length, "status": "stopped", "reason": "the time is over"}
                continue
            run = f"{folder}/{length}"
            command = [
                "-m",
                "longnet_cli",
                "train",
                "longnet-125m",
                "--data",
                f"{folder}/tokens.arrow",
            ]
            command += [
                "--seq-len",
                str(length),
                "--steps",
                "3",
                "--device",
                device,
                "-o",
                run,
                "-q",
            ]
            for setting in (*settings, f"train.batch_tokens={length}"):
                command += ["--set", setting]
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, check=False
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                yield {"seq": length, "status": f"exit code {done.returncode}", "reason": reason}
                continue
            recipe = load_recipe(f"{run}/recipe.json", {})
            last = json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1])
            flops = step_flops(recipe, recipe.train.stages[0], Ranks()).all
            yield {
                "seq": length,
                "status": "ok",
                "dtype": resolve_dtype(recipe.train.dtype, select_device(device)),
                "tokens_per_second": last["tokens_per_second"],
                "flops_per_second": flops * last["tokens_per_second"],
                "peak_memory_bytes": last["peak_memory_bytes"],
            }


def show_training(text: str, machine: Row) -> tuple[list[str], list[str]]:
    """Return a line for each length, with its share of the rate of matrix products."""
    rows = rows_of(text)
    lines: list[list[object]] = []
    for row in (row for row in rows if row["status"] == "ok"):
        peak = machine.get("matmul", {}).get(row["dtype"])
        share = f"{100 * row['flops_per_second'] / peak:.0f} %" if peak else None
        lines.append(
            [
                f"{row['seq']:,}", scaled(row["tokens_per_second"], 1e3), scaled(row["flops_per_second"], 1e12),
                share, scaled(row["peak_memory_bytes"], 2**30, 2), row["dtype"],
            ]
        )  # fmt: skip
    facts = [
        "The last of three steps of one sequence, as metrics.jsonl has it. MFU is the share that executed FLOPs have "
        "of the rate of large matrix products, above.",
        "",
    ]
    head = "tokens | K tokens/s | TFLOP/s | MFU | GiB | type"
    refused = [
        f"- {row['seq']:,} tokens: {row['status']}, {row['reason']}"
        for row in rows
        if row["status"] != "ok"
    ]
    return facts + table(head, lines) + ["", *refused], []


def show_tests(path: Path) -> tuple[list[str], list[str]]:
    """Return counts, failures by name, and the reasons why tests were skipped."""
    failures, skipped, passed = [], Counter[str](), 0
    # The case of an interrupted test has no name
    for case in ElementTree.parse(path).iterfind(".//testcase[@name]"):
        outcome = next(
            (child for child in case if child.tag in ("failure", "error", "skipped")), None
        )
        message = (
            (outcome.get("message") if outcome is not None else None) or ""
        ).strip() or "no reason given"
        if outcome is None:
            passed += 1
        elif outcome.tag == "skipped":
            skipped[message] += 1
        else:
            failures.append(f"`{case.get('name')}`: {'; '.join(message.splitlines()[:4])}")
    lines = [f"{passed} passed, {len(failures)} failed, {skipped.total()} skipped.", ""]
    lines += [f"- failed: {line}" for line in failures]
    lines += [f"- {count} skipped: {reason}" for reason, count in skipped.items()]
    return lines, failures if passed or failures else ["no test ran"]


def describe(device_name: str) -> Row:
    """Return the card, versions, kernels and the rate of matrix products, which `--machine` prints."""
    import torch

    from longnet_cli.attention import kernels
    from longnet_cli.running import device as runtime

    device = torch.device(device_name)
    facts: dict[str, object] = {"device": "CPU"}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = _said_by(query).splitlines()
        facts = {
            "card": f"{torch.cuda.device_count()} x {card.name}",
            "compute capability": f"{card.major}.{card.minor}",
            "memory": f"{card.total_memory / 2**30:.1f} GiB, {runtime.free_memory(device) / 2**30:.1f} GiB free",
            "driver": driver[0] if driver else "unknown",
            "CUDA of torch": torch.version.cuda,
        }
    facts["cores"] = os.cpu_count()
    facts["commit"] = (
        _said_by(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]).strip() or "unknown"
    )
    for name in ("longnet-cli", "torch", "flash-attn", "flash-attn-3"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["Python"] = sys.version.split()[0]
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    works: dict[str, dict[str, str]] = {}
    with warnings.catch_warnings(record=True):  # they repeat the table
        warnings.simplefilter("always")
        for name in kernels.KERNELS:
            works[name] = {dtype: _kernel(name, dtype, device) for dtype in DTYPES}
        works["**chosen**"] = {
            dtype: kernels.select_kernel(device, runtime.DTYPES[dtype], 64).name for dtype in DTYPES
        }
    return {
        "facts": facts,
        "kernels": works,
        "matmul": {dtype: runtime.matmul_peak(device, dtype) for dtype in ("bf16", "fp32")},
    }


def _kernel(name: str, dtype: str, device: Any) -> str:
    from longnet_cli.attention import kernels
    from longnet_cli.running.device import DTYPES as TYPES

    try:
        kernels.select_kernel(device, TYPES[dtype], 64, name)
    except ValueError as refusal:
        return str(refusal).partition("cannot run here: ")[2]
    return "works"


def profiled(device_name: str, small: bool) -> list[Row]:
    """Return what a forward and backward pass of one layer takes, and its kernels, which `--profile` prints."""
    import torch
    from torch.profiler import profile

    from longnet_cli.attention import Pattern, dilated_attention
    from longnet_cli.running.device import DTYPES as TYPES
    from longnet_cli.running.device import resolve_dtype

    device = torch.device(device_name)
    cuda, sizes = device.type == "cuda", (1, 2048, 2, 16) if small else (1, 65536, 12, 64)
    draw = torch.Generator(device).manual_seed(0)
    dtype = TYPES[resolve_dtype("auto", device)]
    q, k, v, dout = (
        torch.randn(sizes, generator=draw, device=device, dtype=dtype) for _ in range(4)
    )

    def seconds(passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            torch.autograd.grad(dilated_attention(*inputs, Pattern.paper()), inputs, dout)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / passes

    seconds(3)
    rows: list[Row] = [{"name": "all", "calls": 1, "seconds": seconds(5)}]
    with profile() as found:
        seconds(1)
    for event in found.key_averages():
        # A kernel, not the operator that calls it
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA:
            taken = event.self_device_time_total if cuda else event.self_cpu_time_total
            rows.append({"name": event.key, "calls": event.count, "seconds": taken / 1e6})
    return rows


def show_profile(text: str) -> tuple[list[str], list[str]]:
    """Return a line for each of the kernels that take longest, and one for all of them."""
    whole, *kernels = rows_of(text)
    kernels.sort(key=lambda row: row["seconds"], reverse=True)
    taken = sum(row["seconds"] for row in kernels)
    lines: list[list[object]] = [
        [
            f"`{row['name'][:80]}`",
            row["calls"],
            scaled(row["seconds"], 1e-3, 3),
            f"{100 * row['seconds'] / taken:.0f} %",
        ]
        for row in kernels[:MOST_SHOWN]
    ]
    lines.append(["all", sum(row["calls"] for row in kernels), scaled(taken, 1e-3, 3), "100 %"])
    milliseconds = scaled(whole["seconds"], 1e-3, 3)
    facts = f"Without a profiler, a forward and backward pass of one layer takes {milliseconds} ms."
    return [facts, "", *table("kernel | calls | ms | share", lines)], []


def needed(names: list[str]) -> list[str]:
    """Return what this script needs beside torch, as `name==version` of what is here; with `names`, only these."""
    packages = (
        requirements("longnet-cli", "pytest", "pytest-xdist", "hypothesis")
        - requirements("torch")
        - {"longnet-cli"}
    )
    wanted = packages & {*names} if names else packages
    return [f"{name}=={importlib.metadata.version(name)}" for name in sorted(wanted)]


def requirements(*names: str) -> set[str]:
    """Return the names of these packages and of all that they need, by what is installed here."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found, left = set[str](), [*names]
    while left:
        name = canonicalize_name(left.pop())
        if name not in found:
            found.add(name)
            lines = map(Requirement, importlib.metadata.requires(name) or [])
            left += [
                line.name
                for line in lines
                if line.marker is None or line.marker.evaluate({"extra": ""})
            ]
    return found


def with_wheels(folder: Path, arguments: list[str]) -> int:
    """Run this script again, with the packages whose wheels are in `folder`. Return its exit code."""
    wheels = [str(path) for path in sorted(folder.glob("*.whl"))]
    with tempfile.TemporaryDirectory() as site:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-index",
        ]
        done = subprocess.run(
            [*pip, "--no-deps", "--no-compile", "--target", site, *wheels], check=False
        )
        if done.returncode:
            return 1
        return subprocess.run(
            [sys.executable, __file__, *arguments], env=importing(site), check=False
        ).returncode


def importing(*folders: str) -> dict[str, str]:
    """Return an environment whose Python imports from these folders and from this checkout, installed or not."""
    path = [*folders, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def _said_by(command: list[str]) -> str:
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def show_machine(text: str, machine: Row) -> tuple[list[str], list[str]]:
    """Fill `machine`, which the training step needs. Return lines that describe it."""
    machine.update(json.loads(text))
    lines = table(" | ", [[name, value] for name, value in machine["facts"].items()])
    lines += [
        "",
        "Kernels, for a head size of 64, each tried against plain math before its first use:",
        "",
    ]
    lines += table(
        f"kernel | {' | '.join(DTYPES)}",
        [[name, *found.values()] for name, found in machine["kernels"].items()],
    )
    rates = ", ".join(
        f"{scaled(rate, 1e12, 2)} in {dtype}" for dtype, rate in machine["matmul"].items()
    )
    return [*lines, "", f"Large matrix products, TFLOP/s: {rates}."], []


def judged(title: str, found: list[Row], card: str) -> list[str]:
    """Return a line for each prediction of this step on such a card: what was found, and whether it is inside."""
    predicted = json.loads(PREDICTED.read_text(encoding="utf-8"))["cards"]
    lines = []
    for row in next((of_card["rows"] for name, of_card in predicted.items() if name in card), []):
        step, field, low, high = (row.pop(key) for key in ("step", "field", "low", "high"))
        numbers = [
            each[field]
            for each in found
            if row.items() <= each.items() and each.get(field) is not None
        ]
        if step == title and numbers:
            verdict = "inside" if low <= numbers[-1] <= high else "OUTSIDE"
            what = ", ".join(map(str, (*row.values(), field.replace("_", " "))))
            lines.append(
                f"- predicted: {what} {low:.3g} to {high:.3g}; found {numbers[-1]:.3g}: {verdict}"
            )
    return ["", *lines] if lines else []


def with_predictions(step: Step, machine: Row) -> Step:
    """Return the step with its predictions below what it shows."""

    def show(text: str) -> tuple[list[str], list[str]]:
        lines, failures = step.show(text)
        found = [
            {"dtype": dtype, "flops_per_second": rate}
            for dtype, rate in machine.get("matmul", {}).items()
        ]
        found = rows_of(text) if step.bounded else found
        return lines + judged(step.title, found, machine.get("facts", {}).get("card", "")), failures

    return replace(step, show=show)


def steps(small: bool, folder: Path) -> list[Step]:
    """Return the steps to run, in order."""
    device, machine, junit = "cpu" if small else "cuda", Row(), folder / "tests.xml"
    bench = ["longnet", "bench", "--device", device, "--format", "jsonl", "-q"]
    attention = (
        ["--seq", "256,512", *TINY] if small else ["--seq", "32Ki,128Ki,1Mi", "--chunk", "1Mi"]
    )
    attention += [
        "--impl",
        "dilated,dense",
        "--direction",
        "forward,backward",
        "--pattern",
        "paper",
    ]
    attention += ["--max-dense-time", "5"]
    lengths = [128, 256] if small else [1 << n for n in range(14, 21)]
    stream = [
        "--seq",
        *(["8Ki", "--chunk", "2Ki", *TINY] if small else ["1e9"]),
        "--impl",
        "dilated",
    ]
    tests = [
        "pytest",
        "-m",
        "gpu",
        "tests/test_gpu.py",
        "-n",
        "1",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
    ]
    this, tiny = ["python", "examples/gpu_report.py"], ["--small"] if small else []
    found = [
        Step(
            "The machine", [*this, "--machine", *tiny], 2, lambda text: show_machine(text, machine)
        ),
        Step(
            "Is it right?",
            [*tests, *(["-k", TRIED] if small else [])],
            6,
            lambda _: show_tests(junit),
        ),
        Step("Where the time goes", [*this, "--profile", *tiny], 1, show_profile),
        Step("Attention", [*bench, *attention], 3, show_attention, bounded=True),
        Step("A billion tokens", [*bench, *stream], 2, show_stream, bounded=True),
        Step(
            "Training longnet-125m",
            [*this, "--train", *map(str, lengths), *tiny],
            2,
            lambda text: show_training(text, machine),
            bounded=True,
        ),
    ]
    return [with_predictions(step, machine) for step in found]


def report(output: Path, small: bool, minutes: float) -> list[str]:
    """Run all steps within the time, and rewrite the report after each. Return the failures."""
    begin = time.monotonic()
    env = importing() | ({"LONGNET_TEST_DEVICE": "cpu"} if small else {})
    sections: list[str] = []
    failures: list[str] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        to_come = steps(small, Path(folder))
        while to_come:
            step, left = to_come[0], 60 * minutes - (time.monotonic() - begin)
            seconds = left * step.weight / sum(each.weight for each in to_come) - GRACE
            to_come.pop(0)
            print(f"{step.title}: up to {max(0, seconds):.0f} s", file=sys.stderr, flush=True)
            if seconds > 0:
                lines, wrong = step.run(seconds, env)
            else:
                lines, wrong = [], ["not run, the time was over"]
            failures += [f"{step.title}: {line}" for line in wrong]
            sections += ["", f"## {step.title}", "", *lines]
            spent = time.monotonic() - begin
            rest = (
                [f"Not run yet: {', '.join(each.title for each in to_come)}.", ""]
                if to_come
                else []
            )
            verdict = [f"- {line}" for line in failures] or ["Nothing failed."]
            head = ["# On a GPU" if not small else "# On a CPU, in tiny sizes", "", *rest]
            head += [
                f"`make gpu`, {spent:.0f} s. What failed:"
                if failures
                else f"`make gpu`, {spent:.0f} s.",
                "",
                *verdict,
            ]
            output.write_text(
                "\n".join([*head, *sections, ""]).replace(f"{folder}/", ""), encoding="utf-8"
            )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "runs/gpu.md", help="the report [runs/gpu.md]"
    )
    parser.add_argument("--minutes", type=float, default=10, help="for all of it [10]")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes on the CPU, to try this script"
    )
    parser.add_argument(
        "--machine",
        action="store_true",
        help="print what the machine is and has, as JSON, and stop",
    )
    parser.add_argument(
        "--profile", action="store_true", help="print what a pass takes, as JSON Lines, and stop"
    )
    parser.add_argument(
        "--train",
        nargs="*",
        type=int,
        metavar="TOKENS",
        help="print how fast longnet-125m trains, as JSON Lines, and stop",
    )
    parser.add_argument("--max-time", type=float, default=600, help="seconds for --train [600]")
    parser.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="wheels of the packages to run with"
    )
    parser.add_argument(
        "--needs",
        nargs="*",
        metavar="NAME",
        help="print what those wheels must be, or some of them",
    )
    args = parser.parse_args()
    if args.needs is not None:
        print(*needed(args.needs))
        return 0
    if args.wheels:
        small = ["--small"] if args.small else []
        return with_wheels(
            args.wheels, ["-o", str(args.output), "--minutes", str(args.minutes), *small]
        )
    sys.path.insert(0, str(ROOT))
    from longnet_cli import ConfigError
    from longnet_cli.running.device import select_device

    try:
        device = select_device("cpu" if args.small else "cuda")
    except ConfigError as error:
        print(f"gpu_report: {error}; --small tries this script without one", file=sys.stderr)
        return 2
    if args.machine:
        print(json.dumps(describe(str(device))))
        return 0
    if args.profile:
        print(*map(json.dumps, profiled(str(device), args.small)), sep="\n")
        return 0
    if args.train:
        for row in trained(args.train, str(device), args.small, args.max_time):
            print(json.dumps(row), flush=True)
        return 0
    failures = report(args.output, args.small, args.minutes)
    print(
        f"{args.output}: {f'{len(failures)} failures' if failures else 'nothing failed'}",
        file=sys.stderr,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
