"""Proves that an answer is what transformers says to the same prompt, and that no answer is made up."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from builders import tiny_llama

from longnet_cli import Inputs, ModelFolder, ask
from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.passages import Passage
from longnet_cli.jobs.asking import SYSTEM, Answer, answer, prompt
from longnet_cli.models.folder import Loaded

TEMPLATE = """{% for message in messages %}[{{ message.role }}] {{ message.content }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
TEXTS = ["The key of the shed is 4821. " * 30, "Nothing of note. " * 90, "A key opens a door."]
QUESTION = "Which key opens the shed?"
HOW = {"max_tokens": 20}


@pytest.fixture(scope="module", params=["chat", "strict", "plain"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp(request.param) / "llama", initializer_range=0.3)
    if request.param != "plain":
        (folder / "chat_template.jinja").write_text(TEMPLATE if request.param == "chat" else STRICT)
    return folder


def loaded_of(folder: Path, **how: object) -> Loaded:
    return ModelFolder(folder).load(device=torch.device("cpu"), chat=None, **how)


def test_an_answer_is_that_of_transformers_to_the_same_prompt(llama: Path) -> None:
    hf = pytest.importorskip("transformers")
    made = ask(TEXTS, QUESTION, model=f"{llama}/", passages=2, **HOW)
    assert [(each.doc_id, TEXTS[int(each.doc_id)][each.char_start : each.char_end]) for each in made.sources] == [
        ("0", made.sources[0].text), ("2", TEXTS[2]),
    ]  # fmt: skip
    asked = f"{made.sources[0].text}\n\n{TEXTS[2]}\n\nQuestion: {QUESTION}"
    text = {
        "chat": f"[system] {SYSTEM}\n[user] {asked}\n[assistant] ",
        "strict": f"[user] {SYSTEM}\n\n{asked}\n[assistant] ",
        "plain": f"{SYSTEM}\n\n{asked}\nAnswer:",
    }[llama.parent.name.rstrip("0")]
    ids = torch.tensor([[*[256] * text.endswith("Answer:"), *text.encode()]])
    net = hf.AutoModelForCausalLM.from_pretrained(llama)
    said = net.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    tokens = said[: made.n_tokens]
    assert bytes(token for token in tokens if token < 256).decode(errors="replace").strip() in (made.answer or "")
    assert (made.n_prompt, made.question, made.model) == (len(text.encode()), QUESTION, f"{llama}/")
    assert (made.finish_reason == "length") == (made.n_tokens == 20)


def test_texts_come_as_tables_and_as_files(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "shed.txt").write_text(TEXTS[0])
    table = pa.table({"id": [10, 20, 30], "text": TEXTS})
    by_table = ask(table, QUESTION, model=f"{llama}/", **HOW)
    assert {each.doc_id for each in by_table.sources} == {"10", "30"}
    files = ask(Inputs([tmp_path / "shed.txt"]), QUESTION, model=f"{llama}/", passages=1, **HOW)
    assert files.sources[0].doc_id == "shed.txt"
    for wrong in (pa.table({"words": TEXTS}), table.to_batches(), 5):
        with pytest.raises(ConfigError, match="table"):
            ask(wrong, QUESTION, model=f"{llama}/")


def test_nothing_is_made_up_and_nothing_is_read_without_a_passage(llama: Path) -> None:
    assert ask(TEXTS, "xyzzy", model=f"{llama}/") == Answer("xyzzy", None, [], f"{llama}/", 0, 0, None)


def test_the_worst_passages_are_left_out_where_all_do_not_fit(tmp_path: Path) -> None:
    loaded = loaded_of(tiny_llama(tmp_path / "llama", max_position_embeddings=400))
    found = [Passage("a", 0, 100, score, str(score) * 50) for score in (1.0, 3.0, 2.0)]
    for room, scores in ((20, [3.0, 2.0]), (40, [3.0]), (999, [3.0])):
        document, kept = prompt(loaded, "Which?", found, room)
        assert [each.score for each in kept] == scores
        assert len(document) + room < 400 or len(kept) == 1
    streamed: list[str] = []
    made = answer(loaded, "Which?", found, streamed.append, max_tokens=500)
    assert made.n_prompt + made.n_tokens <= 401
    assert "".join(streamed).rstrip() == made.answer
