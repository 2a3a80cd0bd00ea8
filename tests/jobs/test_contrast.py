"""Training by contrast: the gradient in chunks and over ranks is that of the plain loss; pairs, and whole runs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from builders import SIZES, metrics_of, tiny_llama, tiny_net
from conftest import RunLongnet
from files import write_rows
from many_ranks import mesh, run_ranks
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents import Document
from longnet_cli.jobs.training.contrast import TextReader, backward_pairs, contrast_loss, ranking, read_pairs
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.recipe import ContrastRecipe, Recipe, load_recipe
from longnet_cli.jobs.training.windows import SHORTEST, PairBatch, PairStream, PairWindows, draw_spans
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.ranks.ranks import Ranks

BEFORE = ([256], [256, 70, 71])
ENCODER = {"model.causal": False, "model.position": "rope"}
KEYS = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 7, 8], [9, 10, 6]])


def documents(count: int) -> list[Document]:
    draw = np.random.default_rng(0)
    return [Document(str(i), draw.integers(0, 256, 30 + 40 * i), None, str(i)) for i in range(count)]


def windows(rank: int = 0, world: int = 1, columns: int = 1, pairs: int = 4) -> PairWindows:
    """Spans of six documents; or columns of five, the last one a hard negative that is some other row's partner."""
    others = [documents(6)[1:], documents(6)[:5]][: columns - 1]
    stream = PairStream(documents(6)[: 5 if others else 6], 256, others)
    return PairWindows([stream], 90, pairs // world, 3, before=BEFORE, rank=rank, world=world)


def plain_loss(net: Net, batch: PairBatch, settings: ContrastRecipe) -> Tensor:
    """As a textbook has it: every text in one forward pass of its own, all in one graph."""
    sides = []
    for texts in filter(None, (batch.firsts, batch.seconds, batch.negatives)):
        hidden = [(net(torch.from_numpy(ids)[None])[0], first) for ids, first in texts]
        sides.append(torch.stack([x[first:].mean(0) if settings.pool == "mean" else x[-1] for x, first in hidden]))
    losses = []
    for width in (*settings.dims, net.config.dim):
        a, b, *hard = (F.normalize(side[:, :width], dim=1) for side in sides)
        keys = batch.keys[:, :3]
        for i in range(len(a)):
            others = [j for j in range(len(a)) if i == j or not {*keys[i]} & {*keys[j]}]
            more = [x[[j for j in range(len(a)) if batch.keys[j, 3] not in keys[i]]] for x in hard]
            for x, y in ((a, torch.cat([b[others], *more])), (b, a[others])):
                scores = x[i] @ y.T / settings.divisor
                losses.append(scores.logsumexp(0) - scores[others.index(i)])
    return torch.stack(losses).mean()


def gradients(net: Net) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    floor = max(x.norm().item() for x in expected.values()) * 1e-2
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= tolerance * max(wanted.norm().item(), floor), name


def make_net(kind: str, folder: Path) -> Net:
    if kind == "native":
        return tiny_net().train()
    if kind == "encoder":
        return tiny_net(causal=False, position="rope").train()
    pattern = Pattern((8, 32), (1, 2), look_back=1, overlap="once", queries="all", sinks=2)
    net = ModelFolder(tiny_llama(folder / "llama", initializer_range=0.2)).net(pattern=pattern)
    if kind == "lora":
        pytest.importorskip("peft")
        net.add_lora({"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]})
        for name, p in net.named_parameters():
            if "lora_B" in name:  # zeros, by which A would have no gradient
                torch.nn.init.normal_(p)
    return net


LAST = {"pool": "last", "temperature": 0.5}


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "columns", "settings"),
    [
        ("native", 1, {"dims": [3, 8]}),
        ("native", 1, LAST),
        ("native", 3, {}),
        ("encoder", 2, LAST),
        ("lora", 1, {}),
        *(
            pytest.param(*case, marks=pytest.mark.ci)
            for case in (("native", 3, {"dims": [3, 8]}), ("encoder", 2, {}), ("llama", 1, LAST))
        ),
    ],
)
def test_the_gradient_is_that_of_the_plain_loss(
    kind: str, columns: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    net, settings = make_net(kind, tmp_path), ContrastRecipe(**settings)
    batch = windows(columns=columns).batch(range(8))  # of five or six documents: some come twice
    assert {text.first for text in batch.texts} == {1}  # prompts are pooled, as in encode
    assert batch.shape == (max(columns, 2), 8)
    loss = plain_loss(net, batch, settings)
    loss.backward()
    expected = gradients(net)
    for chunk in (20, 1000):
        net.zero_grad()
        found, slope, tokens = backward_pairs(net, batch, settings, Ranks(), chunk=chunk)
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        assert tokens == sum(len(text.ids) for text in batch.texts)
        assert_same(gradients(net), expected)
    with torch.no_grad():
        warmer, cooler = (
            plain_loss(net, batch, settings.model_copy(update={"temperature": settings.divisor * x}))
            for x in (1.02, 1 / 1.02)
        )
    assert slope.item() == pytest.approx((warmer - cooler).item() / (2 * np.log(1.02)), rel=1e-2)


def test_dropout_draws_the_same_masks_on_the_way_back() -> None:
    """The derivative along the gradient is its squared norm; with other masks, it would be another."""
    net, settings = tiny_net(dropout=0.2).double().train(), ContrastRecipe()
    batch = windows().batch(range(4))

    def loss() -> float:
        torch.manual_seed(5)
        net.zero_grad()
        return backward_pairs(net, batch, settings, Ranks(), chunk=30)[0].item()

    loss()
    found, step = gradients(net), 1e-6
    norm = sum((x**2).sum().item() for x in found.values())
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name in found:
                    p += sign * step * found[name]
        values.append(loss())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm, rel=1e-5)


WINDOW = {"segment_lengths": (8,), "dilation_rates": (1,), "look_back": 1, "position": "rope"}
CHOSEN = WINDOW | {"chosen": 2, "chosen_block": 4, "chosen_every": 4}
Case = tuple[int, int, int, dict[str, Any]]  # groups of ranks, columns, tokens of a chunk, changes of the net


def case_gradients(case: Case, ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
    dp, columns, chunk, changes = case
    net = tiny_net(**changes).train()
    batch = next(iter(windows(ranks.dp_rank, ranks.dp, columns, pairs=6 if dp == 3 else 4)))[0]
    loss, *_ = backward_pairs(net, batch, ContrastRecipe(dims=[8]), ranks, chunk=chunk)
    return loss, gradients(net)


def rank_gradients(cases: list[Case], folder: Path) -> None:
    for number, case in enumerate(cases):
        ranks = mesh(case[0])
        loss, found = case_gradients(case, ranks)
        ranks.sum(*found.values())
        if ranks.first:
            torch.save({"loss": loss, **found}, folder / f"{number}.pt")
    ranks, net, whole = (
        mesh(dist.get_world_size()),
        tiny_net(),
        windows(columns=3).batch([0]),
    )  # one pair for all groups
    place = slice(ranks.dp_rank, 1, ranks.dp)
    found, wanted = (
        read_pairs(TextReader(net, "mean", 20, "fp32"), whole.part(part), part, 1, of)
        for part, of in ((place, ranks), (slice(1), Ranks()))
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


TWO = [(2, 3, 20, {}), (1, 1, 20, {}), (1, 1, 20, CHOSEN), (1, 1, 500, CHOSEN)]  # the last one in a single chunk


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, TWO),
        pytest.param(3, [(3, 1, 20, {}), (1, 1, 20, CHOSEN)], marks=pytest.mark.slow),
        pytest.param(4, [(4, 1, 20, {}), (2, 1, 20, {})], marks=pytest.mark.slow),
    ],
)
def test_ranks_together_have_the_gradient_of_one_process(world: int, cases: list[Case], tmp_path: Path) -> None:
    run_ranks(world, tmp_path, rank_gradients, cases, tmp_path)
    for number, case in enumerate(cases):
        loss, wanted = case_gradients(case, Ranks())
        found = torch.load(tmp_path / f"{number}.pt")
        assert found.pop("loss").item() == pytest.approx(loss.item(), rel=1e-6)
        assert_same(found, wanted)


def test_equal_texts_and_one_document_are_no_negatives() -> None:
    """Pairs 0 and 2 are of one document, the second texts of 1 and 3 are equal."""
    vectors = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def score(i: int, j: int) -> Tensor:
        return F.cosine_similarity(vectors[0, i], vectors[1, j], dim=0) / 0.1

    rows = {0: (1, 3), 1: (0, 2), 2: (1, 3), 3: (0, 2)}
    losses = [
        torch.logsumexp(torch.stack([f(i, i), *(f(i, j) for j in rows[i])]), 0) - f(i, i)
        for i in rows
        for f in (score, lambda i, j: score(j, i))
    ]
    assert contrast_loss(vectors, KEYS, 0.1).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)


def test_ranking_counts_places() -> None:
    keys = torch.arange(36).view(12, 3)
    first = torch.eye(12, dtype=torch.float64)
    second = first.roll(1, 0) + 0.5 * first  # each finds another first, then its own
    second[3] = first[3]
    found = ranking(torch.stack([first, second]), keys)
    assert found["held_out_recall_10"] == 1
    assert found["held_out_recall_1"] == pytest.approx(2 / 12)  # 3, and 2, which pair 3 no longer disturbs
    assert found["held_out_mrr"] == pytest.approx((2 + 10 / 2) / 12)
    alike = ranking(torch.ones(2, 12, 4, dtype=torch.float64), keys)
    assert (alike["held_out_recall_1"], alike["held_out_mrr"]) == (0, pytest.approx(1 / 12))


def test_spans_are_separate_and_even_in_the_logarithm_of_their_length() -> None:
    sizes = []
    for n in range(2000):
        (a, b), (c, d) = sorted(draw_spans(10_000, (2048, 2048), (0, n)))
        assert 0 <= a < b <= c < d <= 10_000
        sizes += [b - a, d - c]
    assert SHORTEST <= min(sizes) < 20
    assert max(sizes) <= 2048
    shares = np.histogram(sizes, [16, 64, 256, 1024])[0] / len(sizes)
    assert np.abs(shares - np.log(4) / np.log(2048 / 16)).max() < 0.03
    assert draw_spans(2, (9, 9), (0, 0)) in ([(0, 1), (1, 2)], [(1, 2), (0, 1)])


def recipe(corpus: Path, **changes: Any) -> Recipe:
    model = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {
        "segment_lengths": [16, 64],
        "dilation_rates": [1, 2],
    }
    settings = {
        "model": model,
        "data.train": [str(corpus)],
        "data.held_out": [str(corpus)],
        "data.column": "text",
        "optimizer.lr": 1e-2,
        "schedule.warmup_steps": 2,
        "train.objective": "contrast",
        "train.stages": [{"seq_len": 64, "steps": 4}],
        "train.batch_tokens": 1024,
        "train.chunk": 256,
        "train.log_every": 1,
        "train.save_every": 2,
    }
    return load_recipe(None, settings | changes)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents of one word each, a question about each, and another document that is like it."""
    words = [chr(97 + i) * 3 + " " for i in range(24)]
    rows = [{"text": word * 40, "question": f"where is {word}?", "other": f"no {word}" * 20} for word in words]
    return write_rows(tmp_path / "corpus.parquet", rows)


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({"contrast.pool": "last", "contrast.document_prompt": "q: "}, ("last", "", "q: ")),
        (ENCODER, ("mean", "", "")),
    ],
)
def test_a_run_learns_to_find(settings: dict[str, Any], stored: Any, corpus: Path, tmp_path: Path) -> None:
    changes = {"data.pair": "question", **settings}
    changes |= {"train.stages": [{"seq_len": 64, "steps": 20}], "train.evaluate_every": 19}
    found = recipe(corpus, **changes)
    train(found, tmp_path / "run")
    last = metrics_of(tmp_path / "run")[-1]
    assert found.tokens / 4 < last["tokens"] <= found.tokens == 20 * 8 * 2 * 64
    assert last["held_out_mrr"] > 0.5  # by chance, 0.16
    assert last["held_out_recall_1"] <= last["held_out_recall_10"]
    assert last["held_out_ppl"] is None
    assert ModelFolder(tmp_path / "run").embedder == stored


def test_a_resumed_run_is_the_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    found = recipe(corpus, **{"model.dropout": 0.1, "contrast.temperature": "learned"})
    train(found, tmp_path / "whole")
    train(found, tmp_path / "again", resume=str(tmp_path / "whole/checkpoints/step-00000002"))
    whole, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again"))
    assert whole == again
    assert load_recipe(str(tmp_path / "whole/recipe.json"), {}) == found  # by which `train -o` goes on
    assert [line["step"] for line in metrics_of(tmp_path / "again")] == [3, 4]
    assert metrics_of(tmp_path / "whole")[-1]["tokens"] == pytest.approx(found.tokens, rel=0.2)
    temperatures = [[line["temperature"] for line in metrics_of(tmp_path / name)] for name in ("whole", "again")]
    assert temperatures[0][2:] == temperatures[1]
    assert len({0.05, *temperatures[0]}) == 5


def train_on(corpus: Path, folder: Path) -> None:
    for shard in ("none", "full"):
        train(recipe(corpus, **{"parallel.shard": shard}), folder / shard, ranks=mesh(2))


@pytest.mark.ci
@pytest.mark.full
def test_a_run_of_ranks_is_that_of_one_process(corpus: Path, tmp_path: Path) -> None:
    train(recipe(corpus), tmp_path / "alone")
    run_ranks(2, tmp_path, train_on, corpus, tmp_path)
    for shard in ("none", "full"):
        for found, wanted in zip(metrics_of(tmp_path / shard), metrics_of(tmp_path / "alone"), strict=True):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
            assert found["tokens"] == wanted["tokens"]
        assert found["held_out_loss"] == pytest.approx(wanted["held_out_loss"], rel=1e-3)


def test_negatives_are_what_their_column_says_and_count(tmp_path: Path) -> None:
    """The first loss, by hand from the texts. A row's own question is no negative for it, but for the other rows."""
    texts = {"text": "a cat here", "question": "what mews?", "negative": "a dog there"}
    rows = [{key: value.replace(" ", f" {n} ") for key, value in texts.items()} for n in (3, 14, 159, 2653)]
    corpus = write_rows(tmp_path / "corpus.parquet", rows)
    found = {}
    for negative in (None, "negative", "text"):
        changes = {"data.column": "text", "data.pair": "question", "data.negative": negative, "data.held_out": None}
        chosen = recipe(corpus, **changes, **{"train.batch_tokens": 4 * 2 * 64, "contrast.temperature": 0.5})
        train(chosen, tmp_path / str(negative))
        found[negative] = [line["loss"] for line in metrics_of(tmp_path / str(negative))]

        torch.manual_seed(0)
        net, sides = LongNet(chosen.model), []
        for column in filter(None, ("text", "question", negative)):
            ids = [torch.tensor([[256, *row[column].encode()]]) for row in rows]
            sides.append(F.normalize(torch.stack([net(one)[0, 1:].mean(0) for one in ids]), dim=1))
        scores, wanted = sides[0] @ sides[1].T / 0.5, torch.arange(4)
        hard = sides[0] @ sides[-1].T / 0.5 if negative else scores[:, :0]
        if negative == "text":
            hard = hard.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
        losses = F.cross_entropy(torch.cat([scores, hard], 1), wanted), F.cross_entropy(scores.T, wanted)
        assert found[negative][0] == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    for one, other in combinations(found.values(), 2):
        assert all(abs(x - y) > 1e-3 for x, y in zip(one, other, strict=True))


NOTHING = "contrast learns to tell a pair from others, and needs two with different texts"


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b")], "there is only one pair"),
        ([("a", "b"), ("", "c"), ("d", "")], "there is only one pair"),
        ([("a", "b")] * 3, "all 3 pairs have the same text"),
        ([("a", " "), ("b", " "), ("c", " ")], "all 3 pairs have the same text"),
        ([("a", "")], "no document that gives a pair"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(
    rows: list[tuple[str, str]], message: str, held_out: bool, corpus: Path, tmp_path: Path
) -> None:
    bad = write_rows(tmp_path / "bad.parquet", [{"text": one, "question": other} for one, other in rows])
    changes = {"data.held_out" if held_out else "data.train": [str(bad)], "data.pair": "question"}
    said = f"data.held_out: .*{message}" if held_out else message
    with pytest.raises(DataError, match=f"{said}: {NOTHING}" if "no document" not in said else said):
        train(recipe(corpus, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_equal_documents_teach_nothing_by_their_spans(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"all 2 pairs have the same text: {NOTHING}"):
        train(recipe(write_rows(tmp_path / "c.parquet", [{"text": "a b c " * 9}] * 2)), tmp_path / "run")


def test_what_gives_no_pair_is_counted(run_longnet: RunLongnet, tmp_path: Path) -> None:
    """On stderr, for rows of columns and for documents; with -q, nothing is said at all."""
    rows = [{"text": x, "question": y} for x, y in (("a b", "c d"), ("", "c"), ("e f", ""), ("g", "h i"), ("j", "k"))]
    corpus = write_rows(tmp_path / "corpus.parquet", rows)
    for pair, why in (("question", "2 of 5 documents give no pair (one of the texts is empty)"), (None, "3 of 5 doc")):
        (tmp_path / "recipe.json").write_text(recipe(corpus, **{"data.pair": pair}).model_dump_json())
        said, quiet = (run_longnet("train", "recipe.json", "-o", f"{pair}{q}", *q) for q in ([], ["-q"]))
        assert said.stderr.count(f"corpus.parquet: {why}") == 2  # the held-out file is the same
        assert said.stderr.count("\n") == 5
        assert (said.returncode, quiet.returncode, said.stdout, quiet.stdout, quiet.stderr) == (0, 0, "", "", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.objective": "causal", "contrast.pool": "last"}, r"\[contrast\] is of train.objective"),
        ({"contrast.dims": [16]}, "prefixes are shorter than model.dim, 16"),
        ({"train.objective": "causal", **ENCODER}, 'set train.objective = "masked"'),
        (ENCODER | {"contrast.query_prompt": "q: "}, "leave out its prompts"),
        ({"data.negative": "question"}, "set both"),
    ],
)
def test_recipes_that_do_not_fit(changes: dict[str, Any], message: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(corpus, **changes)
