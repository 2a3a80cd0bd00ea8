"""What was chosen is told: the passages of an answer (`generate --sources`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model
from conftest import RunLongnet
from pattern_nets import native
from strategies import chosen_by_hand

from longnet_cli.attention import Pattern, chosen
from longnet_cli.attention.choosing import Choice, Voting
from longnet_cli.data.documents import Document
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.generating import SourceWatch, generate
from longnet_cli.running.causal_stream import CausalStream

WORDS = Tokenizer.bytes()
PATTERN = "window:16,chosen=4x8,chosen_every=4"
BOOK = "The key of the red fox is 48213, and that of the dog is 77. " * 6


@pytest.mark.parametrize(("saved", "vote"), [(False, 1), (True, 1), (False, 0.2)])
def test_the_passages_that_the_answer_chose(
    saved: bool, vote: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks 0 and 1 are always chosen; 2 and 3 before the answer; in it, 12, and 9 or 10, which are one passage.

    Block 12 has a smaller vote or not.
    """

    def drawn(voting: Voting) -> Choice:
        firsts = [first for slot in voting.slots for first in slot.starts]
        answer = [1, 9 + (firsts[0] // 4 % 2), 12]
        found = [answer if first >= 200 else [1, 2, 3] for first in firsts]
        return chosen_by_hand(torch.tensor(found))

    monkeypatch.setattr(chosen, "choose", lambda means, voting: drawn(voting))
    monkeypatch.setattr(chosen, "votes_by_keys", lambda *given: torch.where(given[-1] == 12, vote, 1))
    net = native(Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4))
    stream = CausalStream(net)
    text = "aé" * 66 + "z" * 2  # 200 bytes, of which three make "aé"
    ids = WORDS.encode(text)
    for part in torch.from_numpy(ids).long()[None].split(90, 1)[:2]:
        stream(part)
    if saved:
        stream.save(tmp_path / "state")
        stream = CausalStream.load(net, tmp_path / "state")
        stream.fork()(torch.from_numpy(ids[180:]).long()[None])  # which counts for itself alone
    how: dict[str, Any] = {"bos": None, "tokenizer": WORDS, "max_tokens": 17, "sources": True}
    *others, last = generate(net, Document("d", ids[180:], None, "d"), stream=stream, **how)
    assert (last.finish_reason, [*filter(None, (step.sources for step in others))]) == ("length", [])
    found = last.sources if vote == 1 else last.sources[::-1]
    assert [(round(each.share * 17), each.share_before) for each in found] == [(16, 0), (8, 0)]
    counts = [cache.past.counts[0] for cache in stream.caches if cache.past and cache.past.counts is not None]
    assert [x[1].item() for x in counts] == 2 * [
        (216 - 64) // 4 + 1
    ]  # groups from 64, where one block is left out, to 216
    assert [each[:2] for each in found] == [(64, 69), (48, 59)]  # bytes 96 to 104, and 72 to 88; a cut character is out
    assert all(each.text == text[each.start : each.end] for each in found)


def test_three_questions_have_three_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks 1 and 2 are chosen by three in five groups, and always in answers; each answer's own by every third."""
    own = 0

    def drawn(voting: Voting) -> Choice:
        found = []
        for group in [first // 4 for slot in voting.slots for first in slot.starts]:
            hubs = [1, 2] if group % 5 < 3 or group >= 50 else [5, 6]
            found.append([*hubs, own if group >= 50 and group % 3 == 0 else 3 + group % 2])
        return chosen_by_hand(torch.tensor(found))

    monkeypatch.setattr(chosen, "choose", lambda means, voting: drawn(voting))
    monkeypatch.setattr(chosen, "votes_by_keys", lambda *given: torch.ones(given[-1].shape))
    net = native(Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4))
    text = "".join(chr(97 + i // 8) for i in range(200))  # a letter per block
    read, found = CausalStream(net), {}
    read(torch.from_numpy(WORDS.encode(text)).long()[None])
    for own in (9, 13, 17):
        how: dict[str, Any] = {"bos": None, "tokenizer": WORDS, "max_tokens": 60, "sources": True}
        *_, last = generate(net, "what", stream=read.fork(), **how)
        found[own] = [each.text for each in last.sources]
    assert [first for first, *_ in found.values()] == [8 * chr(97 + own) for own in found]


def test_a_question_that_chooses_more_often_counts_in_its_own_groups(tmp_path: Path) -> None:
    net, finer = (native(Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=n)) for n in (8, 4))
    finer.load_state_dict(net.state_dict())
    stream, ids = CausalStream(net), torch.randint(256, (1, 528))
    stream(ids[:, :512])
    stream.save(tmp_path)
    stream = CausalStream.load(finer, tmp_path)
    watch = SourceWatch(stream, WORDS)
    stream(ids[:, 512:])
    watch.begin()
    assert watch._before[0] == 1  # every group sees the first block


def test_the_command(run_longnet: RunLongnet, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    model = tiny_model(tmp_path / "native", position="rope")
    options = ["--model", model, "--pattern", PATTERN, "-n", "9"]
    plain = run_longnet("generate", "-i", "book.txt", *options)
    done = run_longnet("generate", "-i", "book.txt", *options, "--sources")
    assert (done.returncode, done.stdout) == (0, plain.stdout)
    assert done.stderr.splitlines()[0].startswith("source 1: characters ")
    run_longnet("generate", "-i", "book.txt", *options[:-2], "--save-state", "book.state")
    for asked in (["-i", "book.txt"], ["--state", "book.state"], ["What?", "--state", "book.state"]):
        line = json.loads(run_longnet("generate", *asked, *options, "--sources", "--format", "jsonl").stdout)
        assert 0 < len(line["sources"]) <= 3
        for source in line["sources"]:
            assert source["text"] == (BOOK + "What?" + line["text"])[source["start"] : source["end"]]
            assert 0 <= source["share_before"] < source["share"] <= 1
