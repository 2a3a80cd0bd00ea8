"""Plans for machines that are not here: the exchange of many ranks without processes, the table of machines, `--on`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.attention.reference import key_counts
from longnet_cli.attention.spans import lanes, span_positions
from longnet_cli.basics.errors import ConfigError
from longnet_cli.jobs.benchmark import Settings
from longnet_cli.jobs.benchmark.simulated import simulate
from longnet_cli.jobs.estimating.plan import HIDDEN, ROOM, TABLE, Machine, find_machine, shared
from longnet_cli.jobs.estimating.training_job import memory_by_kind, plan_training, step_flops
from longnet_cli.jobs.training.recipe import Recipe, load_recipe
from longnet_cli.jobs.training.start import check_windows
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.running.ranks.exchange import Exchange, even_edges
from longnet_cli.running.ranks.ranks import Ranks

OWN = """
device = "cpu"
dtype = "fp32"
devices = 4
node = 2
[measured]
products = 1e10
attention = 1e10
attention_backward = 2e10
bandwidth = 1e9
memory = 1e9
[others]
node_link = 1e9
network = 1e8
[assumed]
share = 0.5
message = 1e-4
host_link = 1e9
disk = 1e9
reserved = 0
host_memory = 1e9
"""


@pytest.fixture
def own(tmp_path: Path) -> Machine:
    (tmp_path / "own.toml").write_text(OWN)
    return find_machine(str(tmp_path / "own.toml"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "pattern", ["8/1,16/2,48/3", "geometric:200,base=4", "window:16", "window:16,sinks=3", "nested:200,base=8"]
)
def test_ranks_receive_what_their_queries_see(pattern: str, causal: bool) -> None:
    """The reference, a dense mask, says which keys outside a shard its queries see."""
    levels = Pattern.geometric(200, 4) if pattern.startswith("geo") else None
    levels = levels or (Pattern.nested(200, 8) if pattern.startswith("nested") else parse_pattern(pattern))
    heads, tokens, edges = 4, 200, even_edges(0, 200, 11)
    config = LongNetConfig(
        vocab_size=1, dim=8, num_layers=1, num_heads=heads, ffn_dim=1, position="none", causal=causal, pattern=levels
    )
    counts = key_counts(levels, heads, tokens, causal, 0, "exact")[0]
    first = Exchange(config, edges, rank=0)
    for plan in map(first.of_rank, range(11)):
        a, b = edges[plan.rank], edges[plan.rank + 1]
        seen = counts[:, a:b].any(1)
        seen[:, a:b] = False
        got = seen.new_zeros(seen.shape)
        for parcel in (parcel for parcels in plan.received for parcel in parcels):
            of_lanes = lanes(levels, parcel.span.level, heads).kv_heads
            for head, places in zip(of_lanes, span_positions(levels, parcel.span, heads), strict=True):
                got[head, list(places)] = True
        assert not (seen & ~got).any(), f"rank {plan.rank} lacks rows"
        assert plan.received == [first.of_rank(maker).sent[plan.rank] for maker in range(11)]


def settings(seq: tuple[int, ...], ranks: int, **options: object) -> Settings:
    shape = {"heads": 2, "head_dim": 8, "dtype": "fp32", "device": "cpu"}
    return Settings.of(op="exchange", simulate=ranks, seq=seq, **shape | options)


@pytest.mark.parametrize("causal", [True, False])
def test_bytes_are_the_formulas_and_do_not_grow_with_the_sequence(causal: bool) -> None:
    short, long = simulate(settings((1 << 12, 1 << 20), 32, base=64, pattern="geometric", causal=causal))
    for row in (short, long):
        assert row.received == row.sent == row.far_bytes == row.formula == 2 * 4 * 16 * 64 * (5 - 1 + 1 / 32)
        assert row.received_mean == row.sent_mean == row.received / (2 if causal else 1)
        assert (row.peers, row.ranks) == (31, 32)
    assert short.flops_share >= long.flops_share >= 1


def test_uneven_shards_agree_too() -> None:
    for pattern in ("paper", parse_pattern("window:1000,sinks=4"), Pattern.nested(10**6)):
        rows = list(simulate(settings((100_003, 999_983), 13, pattern=pattern)))
        assert all(row.received_mean == row.sent_mean > 0 for row in rows)


def test_the_table_of_machines_and_their_devices() -> None:
    for kind in ("h100", "h200", "a100"):
        found = find_machine(f"{kind}x64")
        assert (found.devices, found.node, found.rate("memory") > 7e10) == (64, 8, True)
        assert "measured" not in found.known()
    assert TABLE.read_text().count("\n[") == 3
    assert find_machine("h100").devices == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h10x8", "", "--on: unknown machine 'h10x8': did you mean 'h100x8'?"),
        ("there.toml", None, "there.toml: no such file"),
        ("own.toml", "device = ", "not TOML: "),
        ("own.toml", OWN.replace("disk = 1e9\n", ""), "disk is missing: give it in one of the tables measured"),
        ("own.toml", OWN + "network = 1e9\n", "network is in others and in assumed: give it in one of the tables"),
        ("own.toml", OWN.replace("products", "product"), "'measured.product': did you mean 'measured.products'?"),
        ("own.toml", OWN.replace("1e10", "-1"), "measured.products: Input should be greater than 0 (got -1)"),
    ],
)
def test_a_wrong_machine_is_said_in_one_line(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    path = str(tmp_path / name) if name.endswith(".toml") else name
    if text:
        Path(path).write_text(text)
    with pytest.raises(ConfigError) as error:
        find_machine(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def small(**changes: object) -> Recipe:
    model = {"vocab_size": 100, "dim": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 192, "position": "rope",
             "segment_lengths": [64, 256, 1024], "dilation_rates": [1, 2, 8]}  # fmt: skip
    train = {"stages": [{"seq_len": 1024, "steps": 3}], "batch_tokens": 4096}
    tables = {"model": model, "train": train}
    return load_recipe(
        None, {f"{name}.{key}": x for name, table in tables.items() for key, x in table.items()} | changes
    )


def test_a_plan_adds_up(own: Machine) -> None:
    plans = plan_training(small(), own)
    assert {(plan.sp, plan.dp, plan.shard, plan.again) for plan in plans} == {
        (sp, 4 // sp, shard, again) for sp in (1, 2, 4) for shard in ("none", "full") for again in (True, False)
    }
    assert [plan.total for plan in plans] == sorted(plan.total for plan in plans)
    for plan in plans:
        assert plan.total == pytest.approx(3 * (sum(plan.seconds.values()) - plan.seconds[HIDDEN]))
        assert plan.fits
        assert plan.seconds[plan.limit] == max(x for part, x in plan.seconds.items() if part != HIDDEN)
        crossing = plan.seconds["exchange"] + plan.seconds[HIDDEN]
        assert (crossing > 0) == (plan.sp > 1)
    alone = next(plan for plan in plans if plan.sp == 1 and plan.shard == "none" and not plan.again)
    work = step_flops(small(**{"train.chunk": alone.chunk}), small().train.stages[0], Ranks(0, 4, 1))
    assert alone.seconds["matrix products"] == pytest.approx(work.products * 1024 / 5e9)  # a window for each rank
    assert alone.seconds["attention"] == pytest.approx((work.attention + work.attention_backward / 2) * 1024 / 1e10)
    crossed = 2 * 3 / 4 * 4 * small().model.num_parameters() / 1e8  # over the network, in a ring
    assert alone.seconds["weights"] == pytest.approx(crossed + 40 * 1e-4)
    kinds = memory_by_kind(small(**{"train.chunk": alone.chunk}), torch.device("cpu"), Ranks(0, 4, 1))
    assert alone.memory == {kind: size for kind, size in kinds.items() if size}


def test_a_step_of_any_size_is_planned(own: Machine) -> None:
    """No list is made of its windows: that would take days."""
    plan, huge = (plan_training(small(**{"train.batch_tokens": n}), own)[0] for n in (1 << 20, (1 << 63) - 1))
    assert huge.total / plan.total == pytest.approx(huge.tokens / plan.tokens, rel=0.05)
    ranks = Ranks(0, 4, 1)
    with pytest.raises(ConfigError, match=r"which 4 groups of ranks cannot share equally: --dp 1 would fit"):
        check_windows(ranks, 1024, (1 << 62) + 1)


def test_what_is_named_stays_and_the_exchange_is_the_planners(own: Machine) -> None:
    (plan,) = plan_training(
        small(
            **{"parallel.sp": 4, "parallel.shard": "none", "train.chunk": 256, "train.activation_checkpointing": False}
        ),
        own,
    )
    assert (plan.sp, plan.dp, plan.chunk) == (4, 1, 256)
    exchange = Exchange(small().model, even_edges(0, 1024, 4), rank=3)
    inside, outside = (
        exchange.sizes(exchange.received, (1, 0, 4, 16))[2],
        sum(exchange.sizes(exchange.received, (1, 0, 4, 16))[:2]),
    )
    seconds = max(4 * inside / 1e9, 4 * outside / 1e8) + 3e-4
    assert plan.seconds["exchange"] + plan.seconds[HIDDEN] == pytest.approx(
        4 * 2 * 2 * seconds
    )  # windows, layers, ways
    assert plan.memory["far rows"] == 2 * 4 * (inside + outside)
    with pytest.raises(ConfigError, match="dp x sp is any x 3, and there are 4 devices: 4 x 1, 2 x 2, 1 x 4 would fit"):
        plan_training(small(**{"parallel.sp": 3}), own)
    with pytest.raises(ConfigError, match="are of fp32: leave out --dtype bf16"):
        plan_training(small(**{"train.dtype": "bf16"}), own)


def test_contrast_reads_two_or_three_texts_per_pair(own: Machine) -> None:
    pairs = {"train.objective": "contrast", "data.column": "a", "data.pair": "b", "train.batch_tokens": 8192}
    pairs |= {"parallel.sp": 1, "parallel.shard": "none", "train.activation_checkpointing": False, "train.chunk": 1024}
    (two,), (three,) = (plan_training(small(**pairs, **more), own) for more in ({}, {"data.negative": "c"}))
    assert (two.tokens, three.tokens) == (8192, 3 * 4096)
    for part in ("matrix products", "attention", "reading"):
        assert three.seconds[part] == pytest.approx(1.5 * two.seconds[part])


def test_chosen_blocks_on_many_devices(own: Machine) -> None:
    """What is chosen from is gathered once per chunk and layer; shards have even work, and a disk can hold the past."""
    pattern = {"segment_lengths": [64], "dilation_rates": [1], "look_back": 1, "chosen": 8, "chosen_block": 16}
    changes = {f"model.{key}": value for key, value in pattern.items()} | {
        "train.stages": [{"seq_len": 8192, "steps": 3}], "train.batch_tokens": 8192, "train.chunk": 256,
        "train.activation_checkpointing": False, "parallel.sp": 4, "parallel.shard": "none",
    }  # fmt: skip
    recipe = small(**changes)
    costs = shared(recipe.model, own, 8192, 256, 4)
    exchange = Exchange(recipe.model, even_edges(7168, 1024, 4), rank=3)
    assert costs.gathering == pytest.approx(3 * 4 * exchange.gathered((1, 0, 4, 16)) / 1e8)
    assert 1 <= costs.balance < 1.05
    (plan,) = plan_training(recipe, own)
    again = small(**changes | {"train.activation_checkpointing": True})
    (more,) = plan_training(again, own)
    exchanged = [each.seconds["exchange"] + each.seconds[HIDDEN] for each in (plan, more)]
    assert exchanged[1] - exchanged[0] == pytest.approx(8 * 2 * costs.seconds)  # chunks, layers: far rows alone
    room = plan.peak - plan.memory["cache"] - plan.memory["key_gradients"]
    rates = own.measured.model_copy(update={"memory": (room + 1) / ROOM})
    (tight,) = plan_training(recipe, own.model_copy(update={"measured": rates}))
    assert (plan.fits, tight.fits) == (True, False)
    assert "on a disk (--spill DIR)" in tight.advice
