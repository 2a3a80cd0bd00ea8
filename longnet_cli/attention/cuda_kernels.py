"""Attention kernels for CUDA: torch's own (aten), and those of FlashAttention's packages."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .packing import PackedRows
from .plain_call import Kernel


class CudaKernel(Kernel):
    """A CUDA kernel: torch's own, or one of a `package`, which is imported on the first GPU that it may serve.

    Packed sequences go through aten's flash operators, unless it has its own calls for them.
    """

    packs = True
    package = ""
    major: int | None = None  # of the compute capability, if only one has the kernel
    _MAX_ELEMENTS = 1 << 31  # beyond it, the backward addresses memory out of bounds
    _MAX_SEGMENTS = 65_535  # the batch is a grid dimension

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return "it runs on a CUDA device"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it has no {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"it needs a head_dim that 8 divides, up to 256, not {head_dim}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "it needs compute capability 8.0"
        if self.major and capability[0] != self.major:
            return f"it needs compute capability {self.major}.x"
        try:
            self.functions()
        except Exception as error:  # parts that do not fit this torch or this CUDA fail in any way
            reason = next(iter(str(error).splitlines()), "no reason given")
            return f"{self.package} cannot be imported: {type(error).__name__}: {reason}"
        return None

    def functions(self) -> tuple[Any, Any] | None:
        """Import the package, and return its forward and its backward function; None without a package."""
        return None

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        elements = heads * (-(-rows // 128) * 128) * max(head_dim, 32)
        return max(1, min(self._MAX_SEGMENTS, (self._MAX_ELEMENTS - 1) // elements))

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, queries: PackedRows, keys: PackedRows, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        q_edges, rows, k_edges, most = queries.edges, queries.longest, keys.edges, keys.longest
        q, k, v = (x[:, None] for x in (q, k, v))  # (rows, heads, head_dim)
        out, lse = torch.ops.aten._flash_attention_forward.default(
            q, k, v, q_edges, k_edges, rows, most, 0.0, causal, False, scale=scale
        )[:2]
        return out[:, 0], lse[0]

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: PackedRows,
        keys: PackedRows,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_edges, rows, k_edges, most = queries.edges, queries.longest, keys.edges, keys.longest
        dout, q, k, v, out = (x[:, None] for x in (dout, q, k, v, out))
        no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
            dout, q, k, v, out, lse[None], q_edges, k_edges, rows, most, 0.0, causal, no_rng, no_rng[:0], scale=scale
        )
        return dq[:, 0], dk[:, 0], dv[:, 0]


class CudaFlashKernel(CudaKernel):
    """The FlashAttention-2 inside torch (aten). Positional arguments are stable since 2.6, names are not."""

    name = "cuda_flash"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        rows, keys = q.shape[2], k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, rows, heads, head_dim)
        out, lse = torch.ops.aten._flash_attention_forward.default(
            q, k, v, None, None, rows, keys, 0.0, causal, False, scale=scale
        )[:2]
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys = q.shape[2], k.shape[2]
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._flash_attention_backward.default(
            dout, q, k, v, out, lse.contiguous(), None, None, rows, keys, 0.0, causal, no_rng, no_rng[:0], scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


class CudaEfficientKernel(CudaKernel):
    """The memory-efficient attention inside torch (aten): slower than flash, but for fp32 too, and for any head_dim.

    It reads 16 bytes at a time. A head_dim that is no multiple of that is padded with zeros, which change no score.
    """

    name = "cuda_efficient"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return "it runs on a CUDA device"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has no {dtype}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        rows, keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
        q, k, v = (_whole_lines(x).transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._efficient_attention_forward.default(
            q, k, v, None, None, None, rows, keys, 0.0, int(causal), True, scale=scale
        )[:2]
        return out.transpose(1, 2)[..., :head_dim], lse[..., :rows]  # lse has a multiple of 32 rows

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
        dout, q, k, v, out = (_whole_lines(x).transpose(1, 2) for x in (dout, q, k, v, out))
        lse = torch.nn.functional.pad(lse, (0, -rows % 32), value=float("inf"))  # as the forward pads it
        no_rng = torch.empty((), dtype=torch.int64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._efficient_attention_backward.default(
            dout, q, k, v, None, out, None, None, rows, keys, lse.contiguous(), 0.0, no_rng, no_rng, int(causal),
            False, scale=scale,
        )[:3]  # fmt: skip
        dq, dk, dv = (x.transpose(1, 2)[..., :head_dim] for x in grads)
        return dq, dk, dv

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, queries: PackedRows, keys: PackedRows, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows, head_dim = q.shape
        q_edges, longest, k_edges, most = queries.edges, queries.longest, keys.edges, keys.longest
        q, k, v = (_whole_lines(x)[None, :, None] for x in (q, k, v))  # (1, rows, heads, head_dim)
        out, lse = torch.ops.aten._efficient_attention_forward.default(
            q, k, v, None, q_edges, k_edges, longest, most, 0.0, int(causal), True, scale=scale
        )[:2]
        return out[0, :, 0, :head_dim], lse.flatten()[_places_in_lse(queries, rows, lse.shape[2])]

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: PackedRows,
        keys: PackedRows,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, head_dim = q.shape
        q_edges, longest, k_edges, most = queries.edges, queries.longest, keys.edges, keys.longest
        dout, q, k, v, out = (_whole_lines(x)[None, :, None] for x in (dout, q, k, v, out))
        width = longest + -longest % 32
        padded = lse.new_full((len(q_edges) - 1, 1, width), float("inf"))
        padded.view(-1).index_copy_(0, _places_in_lse(queries, rows, width), lse)
        no_rng = torch.empty((), dtype=torch.int64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._efficient_attention_backward.default(
            dout, q, k, v, None, out, q_edges, k_edges, longest, most, padded, 0.0, no_rng, no_rng, int(causal),
            False, scale=scale,
        )[:3]  # fmt: skip
        dq, dk, dv = (x[0, :, 0, :head_dim] for x in grads)
        return dq, dk, dv


def _places_in_lse(packed: PackedRows, rows: int, width: int) -> Tensor:
    """Return the indices of all rows in a flattened lse (sequences, 1, width), which pads each sequence to `width`."""
    edges = packed.edges
    begins = torch.arange(0, (len(edges) - 1) * width, width, device=edges.device) - edges[:-1]
    return torch.arange(rows, device=edges.device) + torch.repeat_interleave(begins, edges.diff(), output_size=rows)


def _whole_lines(x: Tensor) -> Tensor:
    """Pad the last dimension of x with zeros to a multiple of 16 bytes."""
    missing = -x.shape[-1] % (16 // x.element_size())
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


class Flash3Kernel(CudaKernel):
    """FlashAttention-3, for Hopper: two operators that its package registers with torch.

    They are called directly: torch could put them in place of its own, but for the whole process. Views are (batch,
    rows, heads, head_dim) there. Packed sequences are (rows, 1, head_dim), with `edges`: the packed rows of queries and
    of keys, by the arguments that tell of them.
    """

    name, package, major = "fa3", "flash_attn_interface", 9

    def functions(self) -> tuple[Any, Any]:
        importlib.import_module(self.package)
        return torch.ops.flash_attn_3.fwd.default, torch.ops.flash_attn_3.bwd.default

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal, scale, {})
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        dq, dk, dv = (x.transpose(1, 2) for x in self._gradients([*tensors, lse.contiguous()], causal, scale, {}))
        return dq, dk, dv

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, queries: PackedRows, keys: PackedRows, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = self._attend(q[:, None], k[:, None], v[:, None], causal, scale, _edges(queries, keys))
        return out[:, 0], lse[0]

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: PackedRows,
        keys: PackedRows,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [*(x[:, None] for x in (dout, q, k, v, out)), lse[None].contiguous()]
        dq, dk, dv = (x[:, 0] for x in self._gradients(tensors, causal, scale, _edges(queries, keys)))
        return dq, dk, dv

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, edges: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return out like q, and the lse (batch, heads, rows) or, of packed sequences, (heads, rows)."""
        function, _ = self.functions()
        splits = 1 if torch.are_deterministic_algorithms_enabled() else 0  # of the keys; 0: as it likes
        out, lse, *_ = function(q, k, v, softmax_scale=scale, is_causal=causal, num_splits=splits, **edges)
        return out, lse

    def _gradients(self, tensors: Sequence[Tensor], causal: bool, scale: float, edges: dict[str, Any]) -> list[Tensor]:
        """Return dq, dk and dv, given dout, q, k, v, out and a contiguous lse."""
        _, function = self.functions()
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[1:4]]
        always_equal = torch.are_deterministic_algorithms_enabled()
        function(*tensors, *grads, softmax_scale=scale, is_causal=causal, deterministic=always_equal, **edges)
        return grads


def _edges(queries: PackedRows, keys: PackedRows) -> dict[str, Any]:
    edges = {"cu_seqlens_q": queries.edges, "cu_seqlens_k": keys.edges}
    return edges | {"max_seqlen_q": queries.longest, "max_seqlen_k": keys.longest}


class FlashAttnKernel(CudaKernel):
    """The flash-attn package, 2.6 or newer. Arguments go by name, because they change between releases."""

    name, package = "flash_attn", "flash_attn.flash_attn_interface"

    def functions(self) -> tuple[Any, Any]:
        module = importlib.import_module(self.package)
        return module._flash_attn_forward, module._flash_attn_backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        function, _ = self.functions()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        results = _call_by_name(function, q=q, k=k, v=v, softmax_scale=scale, causal=causal)
        # since 2.7 four results, out first and lse second; in 2.6 eight, of which lse is the sixth
        out, lse = results[0], results[1] if len(results) == 4 else results[5]
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, function = self.functions()
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        lse = lse.contiguous()  # the kernel ignores its strides
        _call_by_name(
            function,
            dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv,
            softmax_scale=scale, causal=causal, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


_FLASH_ATTN_DEFAULTS: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
}


def _call_by_name(function: Any, **arguments: Any) -> Any:
    """Call `function` with the arguments, and with our defaults for other arguments that it requires."""
    # a custom op of torch has the Python signature (*args, **kwargs)
    if op := getattr(function, "_opoverload", None):
        needed = [argument.name for argument in op._schema.arguments if not argument.has_default_value()]
    else:
        parameters = inspect.signature(function).parameters.values()
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return function(**arguments, **{name: _FLASH_ATTN_DEFAULTS[name] for name in needed if name not in arguments})
