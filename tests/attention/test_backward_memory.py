"""The memory of a backward pass of dilated attention on a GPU, without a GPU."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet_cli.attention import Pattern
from longnet_cli.attention.kernels import KERNELS
from longnet_cli.attention.planning import Shard, merged_backward, plan_calls


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
@pytest.mark.parametrize("tokens", [1 << 15, 1 << 17])
def test_memory_of_a_backward(tokens: int) -> None:
    """In times the bytes of q, saved tensors, dout and gradients among them: 8 of them cannot be less.

    On fake tensors: torch knows what its CUDA operators return. They allocate more inside.
    """
    with FakeTensorMode():
        q, k, v, out, dout = (torch.empty(1, tokens, 12, 64, dtype=torch.bfloat16) for _ in range(5))
        lse = torch.empty(1, tokens, 12)
        plan = plan_calls(KERNELS["cuda_flash"], q, k, v, Pattern.paper(), Shard())
        with Live(q, k, v, out, dout, lse) as live:
            grads = merged_backward(plan, 0.125, dout, q, k, v, out, lse, [])
            grads = [d.to(q.dtype) for d in grads]
    assert live.most <= 17 * q.untyped_storage().nbytes()
