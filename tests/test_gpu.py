"""What only a GPU can show, against float64 on the CPU: every kernel and dtype on odd shapes and views;
gradients whole, in chunks and compiled; streams; commands; and two ranks over NCCL, where there are two cards.

pytest -m gpu tests/test_gpu.py       without a GPU, to try the tests: LONGNET_TEST_DEVICE=cpu

LONGNET_TEST_DEVICE=emulated computes the operators of a GPU on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import emulated
import pytest
import torch
from builders import job_folder, losses
from conftest import EMULATED, GPU
from emulated import emulate
from pattern_nets import EOS, draw, error, gradients, net
from processes import TORCHRUN
from strategies import PAPER_64TH, document_starts, turn
from torch import Tensor

from longnet_cli.attention import Pattern, dilated_attention, far_keys, kernels, planning
from longnet_cli.attention.spans import far_spans
from longnet_cli.jobs.benchmark import Settings, bench
from longnet_cli.jobs.training.objective import backward
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.device import DTYPES, free_memory, precision, resolve_dtype
from longnet_cli.running.layerwise import hidden_in_chunks

# a kernel that fails its probe is a failure
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:attention kernel")]
only_emulated = pytest.mark.skipif(not EMULATED, reason="needs what is emulated")
own_processes = pytest.mark.skipif(EMULATED, reason="processes of their own have no emulated GPU")

DEVICE, CUDA = torch.device(GPU), GPU != "cpu"
if EMULATED:
    emulate()
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}  # of attention and its gradients
OF_NETS = {"fp32": (1e-5, 1e-5), "bf16": (2e-2, 5e-2)}  # of hidden states, of gradients
TOKENS, HALF = 700, 333
GROUPED = Pattern(PAPER_64TH.segment_lengths, PAPER_64TH.dilation_rates, "grouped")
TILED = Pattern((32, 128, 512), (1, 4, 16), look_back=1, overlap="once", queries="all", sinks=2)
ALL = Pattern((32, 128), (1, 4), look_back=(1, 2), overlap="once", queries="all", sinks=3)
BOTH_WAYS = Pattern((48, 160), (1, 3), "grouped", look_back=(2, 1))


def in_halves(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options: Any) -> Tensor:
    """The first half, then the second, which is given what it sees of the first as far keys."""
    spans = far_spans(pattern, HALF, TOKENS, True)
    far = [
        far_keys(k[:, :HALF], v[:, :HALF], pattern, span, num_heads=q.shape[2]) for span in spans
    ]
    first, second = ([x[:, part] for x in (q, k, v)] for part in (slice(HALF), slice(HALF, None)))
    return torch.cat(
        [
            dilated_attention(*first, pattern, **options),
            dilated_attention(*second, pattern, start=HALF, far=far, **options),
        ],
        1,
    )


# name -> pattern; shape and view of the tensors, options of `dilated_attention`
CASES: dict[str, tuple[Pattern, dict[str, Any]]] = {
    "paper": (PAPER_64TH, {"batch": 2}),
    "a start within segments": (PAPER_64TH, {"start": 77}),
    "bidirectional, grouped heads": (GROUPED, {"causal": False}),
    "zero keys": (PAPER_64TH, {"causal": False, "padding": "zero_key"}),
    "a padded batch": (PAPER_64TH, {"batch": 3, "causal": False, "lengths": (TOKENS, 0, HALF)}),
    "documents": (PAPER_64TH, {"batch": 2, "documents": (5, 300, 1, 394)}),
    "documents with sinks": (TILED, {"documents": (5, 300, 1, 394), "turn": turn}),
    "far keys": (PAPER_64TH, {"attend": in_halves}),
    "far keys and sinks, shared key heads": (
        TILED,
        {"kv_heads": 2, "attend": in_halves, "turn": turn},
    ),
    "a window and sinks": (Pattern.window(48, sinks=4), {"turn": turn}),
    "all queries, one key head": (ALL, {"kv_heads": 1}),
    "a look both ways": (BOTH_WAYS, {"causal": False, "kv_heads": 3}),
    "queries in no level": (Pattern((96, 80), (3, 5)), {}),
    "head_dim 128": (PAPER_64TH, {"head_dim": 128}),
    "head_dim 20": (PAPER_64TH, {"head_dim": 20}),
    "one token": (PAPER_64TH, {"tokens": 1}),
    "slices of one tensor": (PAPER_64TH, {"view": lambda x: torch.stack((x, x, x), 2)[:, :, 1]}),
    "heads before tokens": (
        TILED,
        {"view": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)},
    ),
    "features apart": (
        PAPER_64TH,
        {"view": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)},
    ),
    "every other token": (PAPER_64TH, {"view": lambda x: x.repeat_interleave(2, 1)[:, ::2]}),
    "heads without a stride": (PAPER_64TH, {"view": lambda x: x[:, :, :1].expand_as(x)}),
}


def split_options(name: str) -> tuple[Pattern, dict[str, Any], dict[str, Any]]:
    """(pattern, what the tensors are like, options of `dilated_attention`)."""
    pattern, options = CASES[name]
    options = dict(options)
    like = {"batch": 1, "tokens": TOKENS, "heads": 6, "kv_heads": 6, "head_dim": 64}
    like |= {"view": Tensor.clone, "attend": dilated_attention}
    return pattern, {key: options.pop(key, value) for key, value in like.items()}, options


def run(
    attend: Callable[..., Tensor], like: dict[str, Any], dtype: str, where: torch.device, wide: bool
) -> list[Tensor]:
    """out, dq, dk, dv, moved to the CPU in float64; numbers of `dtype`, computed with as they are or in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for heads in (like["heads"], like["kv_heads"], like["kv_heads"], like["heads"]):
        x = torch.randn(
            like["batch"], like["tokens"], heads, like["head_dim"], generator=generator
        ).to(DTYPES[dtype])
        inputs.append(like["view"]((x.double() if wide else x).to(where)))
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attend(q, k, v)
    assert out.dtype == q.dtype
    return [
        x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, (q, k, v), inputs[3]))
    ]


@lru_cache(maxsize=100)
def exact_attention(name: str, dtype: str) -> list[Tensor]:
    pattern, like, options = split_options(name)
    attend = partial(dilated_attention, pattern=pattern, **options)
    return run(attend, like, dtype, torch.device("cpu"), wide=True)


def refusal(kernel: str, dtype: str, head_dim: int = 64) -> str | None:
    return kernels.KERNELS[kernel].refusal(DEVICE, DTYPES[dtype], head_dim)


def wrong_results(kernel: str, dtype: str, names: Iterable[str] = CASES) -> list[str]:
    """What is off in these cases; with a kernel that fails its probe, why."""
    wrong = []
    try:
        kernels.select_kernel(DEVICE, DTYPES[dtype], 64, kernel)
        for name in names:
            pattern, like, options = split_options(name)
            if refusal(kernel, dtype, like["head_dim"]):
                continue
            attend = partial(like["attend"], pattern=pattern, kernel=kernel, **options)
            found = run(attend, like, dtype, DEVICE, wide=False)
            exact = exact_attention(name, dtype)
            # dq and dk of a single token are zero
            floor = 0.1 * max(x.norm().item() for x in exact)
            for what, a, b in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
                off = (a - b).norm().item() / max(b.norm().item(), floor)
                if not off <= TOLERANCE[dtype]:
                    wrong.append(f"{name}: {what} is off by {off:.1e}")
    except (ValueError, UserWarning) as error:
        wrong.append(str(error))
    return wrong


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_attention(kernel, dtype):
    if EMULATED and kernel == "math":
        pytest.skip("is the same on every device")
    if reason := refusal(kernel, dtype):
        pytest.skip(reason)
    wrong = wrong_results(kernel, dtype)
    assert not wrong, "\n".join(wrong)


@contextmanager
def fresh_selection() -> Iterator[None]:
    """Forget which kernels have passed their probes, and the plans for them, before and after."""
    for cache in (kernels._select, planning._plan):
        cache.cache_clear()
    yield
    for cache in (kernels._select, planning._plan):
        cache.cache_clear()


@only_emulated
def test_a_card_without_flash_attention(monkeypatch):
    """A T4: efficient attention serves fp16 and fp32, and nothing but plain math serves bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert resolve_dtype("auto", torch.device("cuda")) == "fp32"
    with fresh_selection():
        chosen = [
            kernels.select_kernel(DEVICE, DTYPES[dtype], 64).name
            for dtype in ("fp32", "fp16", "bf16")
        ]
        assert chosen == ["cuda_efficient", "cuda_efficient", "math"]
        assert not wrong_results("cuda_efficient", "fp16")


def test_another_card_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    pattern, like, options = split_options("documents")
    attend = partial(dilated_attention, pattern=pattern, **options)
    found = run(attend, like, "bf16", torch.device("cuda:1"), wide=False)
    for a, b in zip(found, exact_attention("documents", "bf16"), strict=True):
        assert error(a, b) <= TOLERANCE["bf16"]


@only_emulated
def test_flash_attention_reads_shared_key_heads_where_they_are(monkeypatch):
    """The query heads of a key head get views of it: nothing is repeated in memory."""
    model = net(Pattern((64,), (1,)), layers=1, heads=6, kv_heads=2).to(DEVICE, torch.bfloat16)
    kernels.select_kernel(DEVICE, torch.bfloat16, 8)  # tries itself on calls of its own
    keys: list[Tensor] = []
    check = emulated._check_flash

    def watched(*tensors: Tensor) -> None:
        check(*tensors)
        keys.extend(tensors[1:])

    monkeypatch.setattr(emulated, "_check_flash", watched)
    model(draw(1, 256).to(DEVICE))
    assert [x.shape[2] for x in keys] == [3] * 4
    assert all(x.stride(2) == 0 for x in keys)
    made = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in keys}
    assert [*made.values()] == [
        256 * 2 * 8 * 2
    ] * 2  # of keys and of values: tokens, heads, D, bf16


def test_what_is_fast_serves():
    """Where a card has compute capability 8.0, nothing falls back to what is slower without anybody's notice."""
    if CUDA and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the card has no compute capability 8.0")
    chosen = {dtype: kernels.select_kernel(DEVICE, DTYPES[dtype], 64).name for dtype in TOLERANCE}
    flash = {"flash_attn", "cuda_flash"} if CUDA or EMULATED else {"cpu_flash"}
    assert chosen["bf16"] in flash
    assert chosen["fp16"] in flash
    assert chosen["fp32"] == ("cuda_efficient" if CUDA or EMULATED else "cpu_flash")


def test_more_numbers_than_32_bits_count():
    """The last segment of a long sequence is what it is alone: segments end there at every level."""
    pattern, segments, shape = (Pattern.paper(), 86, (12, 64)) if CUDA else (PAPER_64TH, 3, (2, 8))
    last = pattern.segment_lengths[-1]
    numbers = segments * last * shape[0] * shape[1]
    assert numbers > 2**31 or not CUDA
    needed, free = 14 * 2 * numbers, free_memory(DEVICE)
    if needed > free:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")
    torch.manual_seed(0)
    whole = [
        torch.randn(1, segments * last, *shape, dtype=torch.bfloat16, device=DEVICE)
        for _ in range(4)
    ]
    results = []
    for inputs in ([x[:, -last:].clone() for x in whole], whole):
        q, k, v = (x.requires_grad_() for x in inputs[:3])
        out = dilated_attention(q, k, v, pattern)
        results.append(
            [
                x.detach()[:, -last:].clone()
                for x in (out, *torch.autograd.grad(out, (q, k, v), inputs[3]))
            ]
        )
    for found, expected in zip(*reversed(results), strict=True):
        assert error(found, expected) <= TOLERANCE["bf16"]


def windows(packed: bool) -> tuple[Tensor, Tensor, list[list[int]] | None]:
    """Two windows, and where their documents start if they are packed."""
    ids, targets = draw(2, 400).clamp_(max=EOS - 1), draw(2, 400, seed=1)
    ids[0, [3, 90, 91, 300]] = EOS
    return ids, targets, document_starts(ids, EOS) if packed else None


@lru_cache(maxsize=2)
def exact_step(packed: bool) -> list[Tensor]:
    """The loss, and every parameter's gradient."""
    ids, targets, starts = windows(packed)
    model = net(PAPER_64TH).double()
    return [backward(model, ids, targets, chunk=1000, starts=starts), *gradients(model)]


def check_step(model: Any, dtype: str, chunk: int, packed: bool) -> None:
    ids, targets, starts = windows(packed)
    loss = backward(
        model, ids.to(DEVICE), targets.to(DEVICE), chunk=chunk, starts=starts, dtype=dtype
    )
    exact_loss, *exact = exact_step(packed)
    of_loss, of_gradients = OF_NETS[dtype]
    assert error(loss.cpu(), exact_loss) <= of_loss
    floor = 0.1 * max(x.norm().item() for x in exact)
    for (name, _), a, b in zip(model.named_parameters(), gradients(model), exact, strict=True):
        off = (a.cpu().double() - b).norm().item() / max(b.norm().item(), floor)
        assert off <= of_gradients, f"{name} is off by {off:.1e}"


@pytest.mark.parametrize("packed", [False, True], ids=["windows", "documents"])
@pytest.mark.parametrize("chunk", [1000, 130], ids=["whole", "in chunks"])
@pytest.mark.parametrize("dtype", OF_NETS)
def test_training_step(dtype, chunk, packed):
    check_step(net(PAPER_64TH).to(DEVICE), dtype, chunk, packed)


@pytest.mark.parametrize("dtype", OF_NETS)
def test_compiled_layers(dtype):
    """As `train.compile` compiles them; Inductor's kernels on a GPU."""
    torch._dynamo.reset()
    model = net(PAPER_64TH).to(DEVICE)
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend="inductor" if CUDA else "aot_eager")
    check_step(model, dtype, 1000, packed=False)
    torch._dynamo.reset()


@lru_cache(maxsize=2)
def exact_hidden(causal: bool, padding: str = "exact") -> Tensor:
    with torch.no_grad():
        return net(PAPER_64TH, causal=causal, padding=padding).double()(draw(1, 400))


@pytest.mark.parametrize("dtype", OF_NETS)
def test_stream(dtype):
    """Chunks of any sizes, single tokens too, as in decoding."""
    stream, ids = CausalStream(net(PAPER_64TH).to(DEVICE)), draw(1, 400).to(DEVICE)
    with precision(dtype, DEVICE):
        found = torch.cat([stream(part) for part in ids.split([1, 1, 62, 200, 1, 135], 1)], 1)
    assert error(found.cpu(), exact_hidden(True)) <= OF_NETS[dtype][0]


@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "spilled"])
@pytest.mark.parametrize("padding", ["exact", "zero_key"])
@pytest.mark.parametrize("dtype", OF_NETS)
def test_layer_by_layer(dtype, padding, spilled, tmp_path):
    model, ids = net(PAPER_64TH, causal=False, padding=padding).to(DEVICE), draw(1, 400).to(DEVICE)
    spill = tmp_path if spilled else None
    parts = hidden_in_chunks(model, lambda a, b: ids[:, a:b], 400, 70, spill=spill, dtype=dtype)
    found = torch.cat([part.cpu() for part in parts], 1)
    assert error(found, exact_hidden(False, padding)) <= OF_NETS[dtype][0]


@own_processes
def test_commands(tmp_path, run_longnet):
    """`train` and `score` in fp32 on both devices: the same losses, and the same nats of its model."""
    job_folder(tmp_path)
    nats = []
    for device in ("cpu", GPU):
        how = f"--dtype fp32 --device {device}"
        train = f"train recipe.toml -o on-{device} {how}"
        run_longnet(train, cwd=tmp_path, fresh=CUDA, code=0)
        score = f"score texts -m ./on-cpu --chunk 100 --format json {how}"
        scored = run_longnet(score, cwd=tmp_path, fresh=CUDA, code=0)
        nats.append(json.loads(scored.stdout)["total"]["nll_sum"])
    assert losses(tmp_path / f"on-{GPU}") == pytest.approx(losses(tmp_path / "on-cpu"), rel=1e-3)
    assert nats[1] == pytest.approx(nats[0], rel=1e-5)


def test_bench():
    """A case of each kind, and the peak is that of the device."""
    kinds = {"direction": ["forward", "backward"], "impl": ["dilated", "dense"]}
    rows = [*bench(Settings.of(seq=[256], **kinds, device=GPU, repeats=1))]
    assert {row.status for row in rows} == {"ok"}
    assert all(row.peak_rss_bytes for row in rows)


@pytest.mark.parametrize(
    "mesh", [[], ["--dp", "2"], ["--shard", "full"]], ids=["sp2", "dp2", "sp2 sharded"]
)
def test_two_ranks(mesh, tmp_path, run_python):
    """Two processes of torchrun over NCCL train as one does, in fp32."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    job_folder(tmp_path)
    for name, start, more in (("alone", [], []), ("both", TORCHRUN, mesh)):
        command = f"-m longnet_cli train recipe.toml -o {name} --dtype fp32 --device {GPU}"
        run_python(*start, *command.split(), *more, timeout=120)
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
