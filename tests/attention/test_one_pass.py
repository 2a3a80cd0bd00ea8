"""The Triton kernels that merge in one pass, without a GPU: right in Triton's interpreter, compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from places import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton cannot be installed here")


@pytest.mark.parametrize(
    "cases", [pytest.param("not slow", marks=pytest.mark.ci), pytest.param("slow", marks=pytest.mark.slow)]
)
def test_in_the_interpreter(cases: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        cases,
        str(ROOT / "tests/interpreted.py"),
    ]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [
        ("merge_parts", "bf16", 80),
        ("merge_parts", "fp32", 100),
        ("add_parts", "bf16", 90),
        ("add_parts", "fp32", 80),
        ("add_parts, fresh", "bf16", 100),
        ("add_parts, fresh", "fp32", 90),
    ],
)
def test_compiled_ahead_of_time_with_vector_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, dtype: str, capability: int
) -> None:
    """Rows of parts and sums move in 16 bytes a thread; what else is loaded are the integers of a part, and its lse."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from longnet_cli.attention import one_pass

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, *fresh = name.split(", ")
    outs = {"out": f"*{dtype}"} | ({"lse": "*fp32"} if name == "merge_parts" else {})
    signature = {"places": "*i64", "pieces": "*i32"} | outs | dict.fromkeys(("number", "total", "heads"), "i32")
    constants = {"HEAD_DIM": 64, "WIDTH": 64, "TILE": 64, "PART": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]}
    constants["VECTOR"] = {"bf16": 8, "fp32": 4}[dtype]
    if name == "add_parts":
        constants["FRESH"] = bool(fresh)
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2 + len(outs))}
    source = ASTSource(getattr(one_pass, name), signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=one_pass._OPTIONS)
    assert len(compiled.asm["cubin"])
    # global loads and stores, by how many bytes a thread moves
    found = re.findall(r"(ld|st)\.global(?:\.\w+)*?((?:\.v\d)?)\.[bfus](\d+)", compiled.asm["ptx"])
    moved = Counter((what, int(vector[2:] or 1) * int(bits) // 8) for what, vector, bits in found)
    tile = 64 * 64 * {"bf16": 2, "fp32": 4}[dtype] // (32 * one_pass._OPTIONS["num_warps"])  # bytes of a thread
    reads = 1 if name == "merge_parts" or fresh else 2  # a part, and the sum so far
    assert moved["ld", 16] == reads * tile // 16, moved
    assert moved["st", 16] == tile // 16, moved


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself launches on the current device, whichever that is."""
    from longnet_cli.attention import one_pass

    current: list[Tensor] = []
    launched: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.remove(x)

    kernel = MagicMock()
    kernel.__getitem__.return_value = lambda *_, **__: launched.extend(current)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    out = torch.empty(1, 5, 2, 8)
    one_pass._LaunchParts().launch(kernel, out)
    assert [x is out for x in launched] == [True]


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        for x in there:
            self._see(x)

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self._seen.remove(key)
        self.now -= nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and not x.is_meta:
                self._see(x)
        return found


@pytest.mark.full
@pytest.mark.parametrize(("fused", "most"), [(True, 11.5), (False, 17)])
@pytest.mark.parametrize("tokens", [1 << 15, 1 << 17])
def test_memory_of_a_backward(monkeypatch: pytest.MonkeyPatch, tokens: int, fused: bool, most: float) -> None:
    """In times the bytes of q, saved tensors, dout and gradients among them: 8 of them cannot be less.

    On fake tensors: torch knows what its CUDA operators return. They allocate more inside.
    """
    from longnet_cli.attention import Pattern, merging, one_pass
    from longnet_cli.attention.kernels import KERNELS
    from longnet_cli.attention.planning import plan_calls
    from longnet_cli.attention.shard import Shard

    monkeypatch.setattr(merging, "_fused", lambda q: one_pass if fused else None)
    launched: list[int] = []  # a launch needs memory to read
    monkeypatch.setattr(one_pass._LaunchParts, "launch", lambda parts, *_, **__: launched.append(parts.number))
    kernel = KERNELS["cuda_flash"]
    with FakeTensorMode():
        q, k, v, out, dout = (torch.empty(1, tokens, 12, 64, dtype=torch.bfloat16) for _ in range(5))
        lse = torch.empty(1, tokens, 12)
        plan = plan_calls(kernel, q, k, v, Pattern.paper(), Shard())
        with Live(q, k, v, out, dout, lse) as live:
            grads = merging.merged_backward(plan, 0.125, dout, q, k, v, out, lse, [])
            grads = [d.to(q.dtype) for d in grads]
    assert live.most <= most * q.untyped_storage().nbytes()
    assert launched == [11] * 3 * fused  # dq, dk and dv: all parts but the first at once
