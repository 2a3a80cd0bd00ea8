"""Attention kernels for CUDA: torch's own (aten), and those of the flash-attn package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import PackedRows
from .plain_call import Gradients, Kernel


class CallSizes(NamedTuple):
    """The most rows of queries and of keys that a sequence of a call has, and the edges of packed sequences."""

    rows: int
    keys: int
    q_edges: Tensor | None = None
    k_edges: Tensor | None = None

    @classmethod
    def of(cls, queries: PackedRows, keys: PackedRows) -> CallSizes:
        return cls(queries.longest, keys.longest, queries.edges, keys.edges)


class CudaFlashKernel(Kernel):
    """The FlashAttention-2 inside torch (aten), and what all CUDA kernels have in common.

    Each has its own `attend` and `gradients`, for views and for packed sequences. The positional arguments of aten's
    flash operators are stable since torch 2.6, names are not.
    """

    name, device = "cuda_flash", "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    packs = True
    _MAX_ELEMENTS = 1 << 31  # beyond it, the backward addresses memory out of bounds
    _MAX_SEGMENTS = 65_535  # the batch is a grid dimension

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if refusal := super().refusal(device, dtype, head_dim):
            return refusal
        if head_dim % 8 or head_dim > 256:
            return f"it needs a head_dim that 8 divides, up to 256, not {head_dim}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0"
        return None

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        elements = heads * (-(-rows // 128) * 128) * max(head_dim, 32)
        return max(1, min(self._MAX_SEGMENTS, (self._MAX_ELEMENTS - 1) // elements))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sizes: CallSizes, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out like q, and lse (batch, heads, rows), given views (batch, rows, heads, head_dim).

        Packed sequences are (rows, 1, head_dim), and their lse is (1, rows).
        """
        out, lse = torch.ops.aten._flash_attention_forward.default(
            q,
            k,
            v,
            sizes.q_edges,
            sizes.k_edges,
            sizes.rows,
            sizes.keys,
            0.0,
            causal,
            False,
            scale=scale,
        )[:2]
        return out, lse

    def gradients(
        self, tensors: Sequence[Tensor], sizes: CallSizes, causal: bool, scale: float
    ) -> Sequence[Tensor]:
        """Return dq, dk and dv, given dout, q, k, v, out and a contiguous lse, in the shapes of `attend`."""
        no_rng = torch.empty(
            2, dtype=torch.uint64, device=tensors[0].device
        )  # read only with dropout
        grads: Sequence[Tensor] = torch.ops.aten._flash_attention_backward.default(
            *tensors, sizes.q_edges, sizes.k_edges, sizes.rows, sizes.keys, 0.0, causal, no_rng, no_rng[:0],
            scale=scale,
        )  # fmt: skip
        return grads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        sizes, (q, k, v) = CallSizes(q.shape[2], k.shape[2]), (x.transpose(1, 2) for x in (q, k, v))
        out, lse = self.attend(q, k, v, sizes, causal, scale)
        return out.transpose(1, 2), lse

    def backward(self, tensors: Sequence[Tensor], causal: bool, scale: float) -> Gradients:
        *of_rows, lse = tensors
        _, q, k, *_ = of_rows
        given = [
            *(x.transpose(1, 2) for x in of_rows),
            lse.contiguous(),
        ]  # kernels ignore the lse's strides
        grads = self.gradients(given, CallSizes(q.shape[2], k.shape[2]), causal, scale)
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv

    def forward_packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: PackedRows,
        keys: PackedRows,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = self.attend(
            q[:, None], k[:, None], v[:, None], CallSizes.of(queries, keys), causal, scale
        )
        return out[:, 0], lse[0]

    def backward_packed(
        self,
        tensors: Sequence[Tensor],
        queries: PackedRows,
        keys: PackedRows,
        causal: bool,
        scale: float,
    ) -> Gradients:
        *of_rows, lse = tensors
        given = [*(x[:, None] for x in of_rows), lse[None].contiguous()]
        dq, dk, dv = (
            x[:, 0] for x in self.gradients(given, CallSizes.of(queries, keys), causal, scale)
        )
        return dq, dk, dv


class CudaEfficientKernel(CudaFlashKernel):
    """The memory-efficient attention inside torch (aten): slower than flash, but for fp32 too, and for any head_dim.

    It reads 16 bytes at a time. A head_dim that is no multiple of that is padded with zeros, which change no score. An
    lse has a multiple of 32 rows for each sequence. Packed sequences are (1, rows, 1, head_dim).
    """

    name, dtypes = "cuda_efficient", (torch.float32, torch.bfloat16, torch.float16)

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if refusal := Kernel.refusal(self, device, dtype, head_dim):
            return refusal
        old = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)
        return "it needs compute capability 8.0 for bf16" if old else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sizes: CallSizes, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows, keys, q_edges, k_edges = sizes
        tensors = [_whole_lines(x if q_edges is None else x[None]) for x in (q, k, v)]
        out, lse = torch.ops.aten._efficient_attention_forward.default(
            *tensors, None, q_edges, k_edges, rows, keys, 0.0, int(causal), True, scale=scale
        )[:2]
        out = out[..., : q.shape[-1]]
        if q_edges is None:
            return out, lse[..., :rows]
        return out[0], lse.flatten()[_places_in_lse(q_edges, len(q), lse.shape[2])][None]

    def gradients(
        self, tensors: Sequence[Tensor], sizes: CallSizes, causal: bool, scale: float
    ) -> Sequence[Tensor]:
        (*of_rows, out, lse), (rows, keys, q_edges, k_edges) = tensors, sizes
        width, head_dim = rows + -rows % 32, out.shape[-1]
        of_rows.append(
            out.contiguous()
        )  # in half precision, its rows are read as if they followed each other
        dout, q, k, v, out = (_whole_lines(x if q_edges is None else x[None]) for x in of_rows)
        if q_edges is None:
            padded = torch.nn.functional.pad(lse, (0, width - rows), value=float("inf"))
        else:
            padded = lse.new_full((len(q_edges) - 1, 1, width), float("inf"))
            padded.view(-1).index_copy_(0, _places_in_lse(q_edges, lse.shape[1], width), lse[0])
        no_rng = torch.empty((), dtype=torch.int64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._efficient_attention_backward.default(
            dout, q, k, v, None, out, q_edges, k_edges, rows, keys, padded, 0.0, no_rng, no_rng, int(causal), False,
            scale=scale,
        )[:3]  # fmt: skip
        return [(x if q_edges is None else x[0])[..., :head_dim] for x in grads]


def _places_in_lse(edges: Tensor, rows: int, width: int) -> Tensor:
    """Return the indices of all rows in a flattened lse (sequences, 1, width), which pads each sequence to `width`."""
    begins = torch.arange(0, (len(edges) - 1) * width, width, device=edges.device) - edges[:-1]
    return torch.arange(rows, device=edges.device) + torch.repeat_interleave(
        begins, edges.diff(), output_size=rows
    )


def _whole_lines(x: Tensor) -> Tensor:
    """Pad the last dimension of x with zeros to a multiple of 16 bytes."""
    missing = -x.shape[-1] % (16 // x.element_size())
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


class FlashAttnKernel(CudaFlashKernel):
    """The flash-attn package, 2.7 or newer: two operators that it registers with torch. Arguments go by name.

    It is imported on the first GPU that it may serve. Packed sequences go through aten's operators.
    """

    name = "flash_attn"

    def functions(self) -> tuple[Any, Any]:
        """Import the package, and return its forward and its backward function."""
        module = importlib.import_module("flash_attn.flash_attn_interface")
        return module._flash_attn_forward, module._flash_attn_backward

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if refusal := super().refusal(device, dtype, head_dim):
            return refusal
        try:
            self.functions()
        except Exception as error:  # parts that do not fit this torch or this CUDA fail in any way
            reason = next(iter(str(error).splitlines()), "no reason given")
            return f"flash_attn cannot be imported: {type(error).__name__}: {reason}"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sizes: CallSizes, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        if sizes.q_edges is not None:
            return super().attend(q, k, v, sizes, causal, scale)
        out, lse, *_ = self.functions()[0](
            q=q, k=k, v=v, softmax_scale=scale, causal=causal, return_softmax=False, **_PLAIN
        )
        return out, lse

    def gradients(
        self, tensors: Sequence[Tensor], sizes: CallSizes, causal: bool, scale: float
    ) -> Sequence[Tensor]:
        if sizes.q_edges is not None:
            return super().gradients(tensors, sizes, causal, scale)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[1:4]]
        names = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
        always_equal = torch.are_deterministic_algorithms_enabled()
        options = {
            "softmax_scale": scale,
            "causal": causal,
            "deterministic": always_equal,
            **_PLAIN,
        }
        self.functions()[1](**dict(zip(names, [*tensors, *grads], strict=True)), **options)
        return grads


# options of flash-attn's operators that have no default
_PLAIN: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
