"""Generation: greedy output is that of uncached full forwards, whatever the chunk; draws are exact; texts end.

Of a text that comes token by token, the parts are the whole: none is half a character, none is past a stop text.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
import torch
from builders import tiny_model
from files import write_lines
from hypothesis import given
from hypothesis import strategies as st
from pattern_nets import WINDOW, WORDS, foreign, generated, native, prompt
from processes import invoke
from tokenizers import decoders, models, pre_tokenizers

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, DataError, NotFiniteError
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import REPLACEMENT, TextStream, Tokenizer
from longnet_cli.jobs.generating import (
    Sampler,
    Step,
    StopTexts,
    generate,
    plan_generation,
)
from longnet_cli.nets.longnet import LongNet


def text_of(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


TILED = Pattern((8, 32, 128), (1, 4, 16), look_back=1, overlap="once", queries="all")
NETS = {
    "window": lambda: native(),
    "paper": lambda: native(Pattern((8, 24, 96), (1, 3, 8))),
    "far levels": lambda: native(TILED),
    "llama": lambda: foreign(TILED),
    "sliding layers": lambda: foreign(WINDOW, "mixed"),
}


@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_every_token_is_the_best_of_a_full_forward(kind):
    """Of the whole sequence at once, and its log-probability is that one's; across segments, after any chunks."""
    model = NETS[kind]()
    for length, bos, chunk in ((1, None, None), (50, 3, 7), (50, 3, None), (61, None, 16)):
        steps = generated(model, length, bos=bos, chunk=chunk, tokenizer=None)
        found = torch.tensor([step.id for step in steps])
        before = [*([] if bos is None else [bos]), *prompt(length).tokens]
        logits = model.logits(model(torch.tensor([[*before, *found.tolist()]])))[
            0, len(before) - 1 : -1
        ]
        assert torch.equal(logits.argmax(-1), found)
        expected = logits.log_softmax(-1)[torch.arange(40), found]
        assert (torch.tensor([step.logprob for step in steps]) - expected).abs().max() < 1e-4
        assert [step.finish_reason for step in steps] == [None] * 39 + ["length"]
    assert len(set(found.tolist())) > 5


def test_draws_follow_the_softmax_and_top_p_takes_the_fewest_tokens():
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()

    def shares(temperature: float, top_p: float, draws: int = 50) -> list[float]:
        sampler = Sampler(temperature, top_p, seed=5)
        drawn = torch.tensor([sampler(logits)[0] for _ in range(draws)])
        return (torch.bincount(drawn, minlength=4) / draws).tolist()

    assert shares(1, 1, 4000) == pytest.approx([0.125, 0.5, 0.125, 0.25], abs=0.03)
    # of equal ones the first
    assert shares(1, 0.875, 4000) == pytest.approx([1 / 7, 4 / 7, 0, 2 / 7], abs=0.03)
    assert shares(1, 0.75, 4000) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert shares(1, 0.5) == shares(1, 1e-9) == shares(1e-9, 1) == shares(0, 1) == [0, 1, 0, 0]
    # 0 / 0 in float32
    assert all(shares(tiny, 1) == [0, 1, 0, 0] for tiny in (1e-37, 1e-39, 1e-45, 1e-46))
    assert shares(0.5, 1, 4000) == pytest.approx([1 / 22, 16 / 22, 1 / 22, 4 / 22], abs=0.03)
    # what the model says, whatever is cut
    assert Sampler(1, 0.5, 0)(logits)[1] == pytest.approx(np.log(0.5))
    with pytest.raises(NotFiniteError, match="not finite"):
        Sampler(0, 1, 0)(torch.tensor([0.0, torch.nan]))


def test_a_seed_gives_the_same_text_in_any_company():
    model = native()
    options = {"temperature": 1.0, "top_p": 0.9}
    first = generated(model, seed=1, **options)
    generated(model, 20, seed=1, **options)
    assert [x.id for x in generated(model, seed=1, chunk=9, **options)] == [x.id for x in first]
    assert [x.id for x in generated(model, seed=2, **options)] != [x.id for x in first]


def test_many_equal_prompts_follow_the_distribution_of_the_model(tmp_path):
    """By a chi-squared test. Each prompt has random numbers of its own, which depend on the seed and on its number."""
    model, text = tiny_model(tmp_path / "model", position="rope"), "the same prompt"
    path = write_lines(tmp_path / "x.jsonl", [{"text": text}] * 200)
    words = ["-m", model, "--temperature", 1.3, "-n", 1, "--seed", 7, "--format", "jsonl", "-q"]
    printed = invoke("generate -i", path, *words).stdout
    net = LongNet.from_pretrained(model)
    shares = (
        (net.logits(net(torch.tensor([[256, *text.encode()]])))[0, -1].double() / 1.3)
        .softmax(-1)
        .detach()
    )
    tenth = (shares.cumsum(0) * 10).long().clamp(max=9)  # of the probabilities, by id
    drawn = torch.bincount(
        tenth[[json.loads(line)["tokens"][0] for line in printed.splitlines()]], minlength=10
    )
    expected = 200 * torch.zeros(10).double().index_add(0, tenth, shares)
    # Of 9 degrees of freedom, one sum in a thousand is above 27.9
    assert ((drawn - expected) ** 2 / expected).sum() < 27.9
    assert invoke("generate -i", path, *words).stdout == printed


def test_it_ends_at_an_id_at_a_text_and_at_the_last_position():
    model = native()
    whole = generated(model)
    ids, text = [step.id for step in whole], text_of(whole)
    assert text == WORDS.decode(np.array(ids))
    place = next(i for i in range(10, 40) if ids[i] not in ids[:i])
    ended = generated(model, end_ids={ids[place]})
    assert [step.id for step in ended] == ids[: place + 1]
    assert (ended[-1].finish_reason, text_of(ended)) == ("eos", WORDS.decode(np.array(ids[:place])))
    stop = text[12:17]  # over several tokens
    for given_stop in ([stop, "\0never"], stop):
        stopped = generated(model, stop=given_stop)
        assert (text_of(stopped), stopped[-1].finish_reason) == (text[: text.index(stop)], "stop")
    assert generated(model, max_tokens=7)[-1].finish_reason == "length"
    short = foreign(WINDOW, "gpt2")  # whose positions are a table
    assert len(generated(short, 1000)) == 25  # the last of which is not read
    with pytest.raises(ConfigError, match="1025 tokens, and the model has 1024 positions"):
        generated(short, 1025)
    text = Document("a", np.zeros(1000, np.int32), None, "a")
    assert plan_generation(short, [text], None, 500, chunk=64).longest == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("inf")}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be more than 0"),
        ({"top_p": 1.1}, "top_p must be more than 0 and at most 1"),
        ({"stop": [""]}, "a stop text needs characters"),
        ({"stop": ["a"], "tokenizer": None}, "a stop text needs characters, and a tokenizer"),
        ({"chunk": 0}, "chunk must be 1 or more"),
        ({"chat": True}, "a prompt of text needs a tokenizer, and a chat template"),
        ({"bos": "own"}, "a net alone does not say what it reads before a text"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        generated(native(), **options)


def test_a_prompt_may_be_a_text():
    model = native()
    ids = WORDS.encode("some text")
    given = {"bos": None, "tokenizer": WORDS, "max_tokens": 8}
    found = [
        [step.id for step in generate(model, each, **given)]
        for each in ("some text", Document("a", ids, None, "a.txt"))
    ]
    assert found[0] == found[1]


def test_what_cannot_be_continued():
    with pytest.raises(DataError, match=r"prompt.txt: the prompt is empty"):
        generated(native(), 0)
    assert len(generated(native(), 0, bos=256)) == 40


TEXT = "naïve 漢字 🙂🏽 ends. "


def pieces() -> Tokenizer:
    """As of SentencePiece: words begin with a sign of their own, and characters it lacks are written in bytes."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocab |= {sign: len(vocab) + i for i, sign in enumerate(["▁", *"naive d.s"])}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(inner)


TOKENIZERS = {
    "bytes": Tokenizer.bytes(),
    "bpe": Tokenizer.train([[TEXT * 20]], 300),
    "pieces": pieces(),
}


def streamed(words: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(words)
    return [*(stream.add(token) for token in ids), stream.end()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_part_is_half_a_character(name):
    words = TOKENIZERS[name]
    ids = words.encode(TEXT * 3).tolist()
    parts = streamed(words, ids)
    assert "".join(parts) == words.decode(np.array(ids)) == TEXT * 3
    assert not any(REPLACEMENT in part for part in parts)
    assert max(map(len, parts)) <= 8
    # cut in a character
    assert streamed(words, words.encode("añ").tolist()[:-1])[-1] == REPLACEMENT


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@given(data=st.data())
def test_any_ids_give_the_text_of_them_all(name, data):
    """Bytes that are no character, special tokens and ids beyond the vocabulary too."""
    words = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, words.vocab_size + 2), max_size=30))
    assert "".join(streamed(words, ids)) == words.decode(np.array(ids, np.int64), special=False)


def test_bytes_that_are_no_text_are_not_waited_for_without_end():
    stream = TextStream(TOKENIZERS["pieces"])
    parts = [stream.add(1 + 0xFF) for _ in range(200)]
    assert sum(map(bool, parts)) == 3


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 3),
)
def test_a_text_ends_before_the_first_stop_text(text, stops, size):
    """However it is cut into parts, it ends where the first stop text to be complete begins; nothing is shown twice."""
    stop, shown = StopTexts(stops), ""
    for first in range(0, len(text), size):
        shown += stop.add(text[first : first + size])
        if stop.reached:
            break
    shown += stop.end()
    ends = [text.find(x) for x in stops if x in text]
    assert stop.reached == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert any(text.startswith(x, len(shown)) for x in stops)
        complete = min(text.find(x) + len(x) for x in stops if x in text)
        assert len(shown) < complete
