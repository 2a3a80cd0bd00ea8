"""The plan of `score --dry-run --on` and `encode --dry-run --on`: the memory and the time to read all documents."""

from __future__ import annotations

from longnet_cli.errors import ConfigError
from longnet_cli.estimating.machines import Machine
from longnet_cli.estimating.plan import HIDDEN, JobPlan, meshes, ordered, shared
from longnet_cli.estimating.reading_job import Counted, Job
from longnet_cli.model.net import Net
from longnet_cli.runtime.ranks import Ranks


def plan_reading(
    net: Net, job: Job, counted: Counted, machine: Machine, *, sp: int | None, dp: int | None, dtype: str, spill: bool
) -> list[JobPlan]:
    """Return plans for reading the `counted` documents on all devices, as `plan_training` orders them.

    The chunk is the one with which they were counted. Raises ConfigError for a dtype that the machine's rates are not
    of, and for a net that ranks cannot share.
    """
    if dtype not in ("auto", machine.dtype):
        raise ConfigError(f"the rates of {machine.name} are of {machine.dtype}: leave out --dtype {dtype}")
    found = meshes(machine.devices, sp, dp)
    if not net.layer_by_layer:  # a Hugging Face model: every rank reads documents of its own
        found = meshes(machine.devices, 1, dp)
    return ordered([_plan(net, job, counted, machine, Ranks(0, machine.devices, each), spill) for each, _ in found])


def _plan(net: Net, job: Job, counted: Counted, machine: Machine, ranks: Ranks, spill: bool) -> JobPlan:
    config, sums, rate = net.config, counted.sums, machine.rate
    chunk, longest, itemsize = sums.chunk, sums.longest, 2 if machine.dtype == "bf16" else 4
    cut = sums.in_chunks(chunk)
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    wide = 8 if itemsize == 4 else 10  # logits and logarithms; 16-bit logits
    memory = {
        "program": int(rate("reserved")),
        "weights": weights + (0 if itemsize == 4 else itemsize * config.layer_weights),  # autocast copies matrices
        "activations": config.forward_bytes(sums.tokens_at_once(chunk)),
        "logits": wide * sums.logits_at_once(chunk) if job.scores else 0,
        **sums.kept_bytes(chunk, machine.dtype, "a disk" if spill or not config.causal else None, ranks.of_group()),
        **job.keeps(counted.longest),
    }
    # what a bidirectional net keeps between its layers: on the device, on the host or on the disk of --spill
    kept = sums.spilled_bytes(chunk, machine.dtype, ranks.of_group()) if cut and not config.causal else 0
    beside = kept and not spill and sum(memory.values()) + kept <= 0.5 * rate("memory")
    memory["hidden"] += kept if beside or (machine.device == "cpu" and not spill) else 0
    tokens = sums.read / ranks.world
    layers, logits = config.moved_bytes(itemsize)
    attention = sums.attention_flops() / (sums.read or 1) / rate("attention")
    sharing = cut and (config.causal or longest <= chunk * ranks.sp)
    costs = shared(config, machine, longest, chunk, ranks.sp if sharing else 1)
    exchanges = sums.chunks(chunk * ranks.sp) / ranks.dp * config.num_layers if costs.seconds else 0
    near = min(longest, chunk) * attention / config.num_layers
    traffic = 3 * 4 * config.dim * config.num_layers * tokens if kept and not beside else 0
    seconds = {
        "matrix products": sums.product_flops(job.scores) / ranks.world / rate("products") / rate("share"),
        "attention": tokens * costs.balance * attention,
        "elementwise": (sums.read * layers + sums.wanted * logits * job.scores) / ranks.world / rate("bandwidth"),
        "exchange": exchanges * max(0.0, costs.seconds - near),
        HIDDEN: exchanges * min(costs.seconds, near),
        "host": traffic / rate("host_link") if not spill and machine.device == "cuda" else 0,
        "spilling": traffic / rate("disk") if spill else 0,
        "reading": 4 * counted.tokens / rate("disk"),
    }
    busy = sum(seconds.values()) - seconds[HIDDEN]
    seconds["waiting"] = max(0.0, busy * (longest / ranks.sp / (tokens or 1) - 1))  # for the longest document
    on_host = traffic and machine.device == "cuda" and not spill
    return JobPlan(
        machine=machine,
        host=kept * min(machine.node, ranks.world) if on_host else 0,
        sp=ranks.sp,
        dp=ranks.dp,
        chunk=chunk,
        memory={kind: size for kind, size in memory.items() if size},
        seconds=seconds,
        total=busy + seconds["waiting"],
        tokens=sums.read,
        flops=sums.flops(job.scores),
        forward=busy,
        what="all documents",
    )
