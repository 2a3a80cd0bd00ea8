"""Proves that an answer is what transformers says to the same prompt, and that no answer is made up.

`longnet ask` as a person and a script meet it: stdout and stderr, exit codes, an index that is kept. What `encode` adds
for search: the place of a span in its text, prefixes, short vectors.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zipfile
from collections import Counter
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import tiny_llama, tiny_model, tiny_net
from files import write_lines, write_rows
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from processes import invoke, refused
from pyarrow.dataset import dataset

from longnet_cli import Inputs, ModelFolder, ask, embed
from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents.passages import Passage, PassageIndex
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.asking import BRIEFLY, SYSTEM, answer, prompt
from longnet_cli.jobs.encoding import TextPlaces
from longnet_cli.models.folder import Loaded

TEMPLATE = """{% for message in messages %}[{{ message.role }}] {{ message.content }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
)
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


def test_an_answer_is_that_of_transformers_to_the_same_prompt(llama):
    hf = pytest.importorskip("transformers")
    made = ask(TEXTS, QUESTION, model=f"{llama}/", passages=2, **HOW)
    assert [(each.doc_id, TEXTS[int(each.doc_id)][each.char_start : each.char_end]) for each in made.sources] == [
        ("0", made.sources[0].text), ("2", TEXTS[2]),
    ]  # fmt: skip
    asked = f"{made.sources[0].text}\n\n{TEXTS[2]}\n\nQuestion: {QUESTION}\n{BRIEFLY}"
    text = {
        "chat": f"[system] {SYSTEM}\n[user] {asked}\n[assistant] ",
        "strict": f"[user] {SYSTEM}\n\n{asked}\n[assistant] ",
        "plain": f"{SYSTEM}\n\n{asked}\nAnswer:",
    }[llama.parent.name.rstrip("0")]
    ids = torch.tensor([[*[256] * text.endswith("Answer:"), *text.encode()]])
    net = hf.AutoModelForCausalLM.from_pretrained(llama)
    said = net.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    tokens = said[: made.n_tokens]
    assert bytes(token for token in tokens if token < 256).decode(errors="replace").strip() in (
        made.answer or ""
    )
    assert (made.n_prompt, made.question, made.model) == (len(text.encode()), QUESTION, f"{llama}/")
    assert (made.finish_reason == "length") == (made.n_tokens == 20)


def test_texts_come_as_tables_and_as_files(llama, tmp_path):
    (tmp_path / "shed.txt").write_text(TEXTS[0])
    table = pa.table({"id": [10, 20, 30], "text": TEXTS})
    by_table = ask(table, QUESTION, model=f"{llama}/", **HOW)
    assert {each.doc_id for each in by_table.sources} == {"10", "30"}
    files = ask(Inputs([tmp_path / "shed.txt"]), QUESTION, model=f"{llama}/", passages=1, **HOW)
    assert files.sources[0].doc_id == "shed.txt"
    for wrong in (pa.table({"words": TEXTS}), table.to_batches(), 5):
        with pytest.raises(ConfigError, match="table"):
            ask(wrong, QUESTION, model=f"{llama}/")


def rounds(text: str, folder: Path, *, chats: bool) -> Loaded:
    """A model that says a text of different characters over and over, after a colon."""
    net = tiny_net(vocab_size=257, position="none", dim=512, tie_embeddings=False, num_layers=1)
    after = {ord(one): ord(other) for one, other in pairwise(f":{text}{text[0]}")}
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.startswith("layers") and weight.ndim < 3:
                weight.zero_()
        said = net.final_norm(net.embedding.weight)
        net.output.weight.zero_()
        for token, following in after.items():
            net.output.weight[following] += said[token]
    net.save_pretrained(folder, Tokenizer.bytes().to_json())
    if chats:
        (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}:")
    return loaded_of(folder)


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize(
    ("text", "said", "reason"),
    [
        ("ab cd\tef\x0bgh\x0cij.\n", "ab cd\tef\x0bgh\x0cij.", "stop"),  # five words
        ("ab cd\tef\x0bghij.\n", "ab cd\tef\x0bghij.\n" * 3, "length"),  # four
        ("x\nQuestion:", "x", "stop"),
    ],
)
def test_an_answer_ends_where_it_repeats_itself_or_asks(text, said, reason, chats, tmp_path):
    loaded, streamed = rounds(text, tmp_path / "rounds", chats=chats), list[str]()
    found = [Passage("a", 0, 1, 1.0, "x")]
    made = answer(loaded, "?", found, streamed.append, max_tokens=3 * len(text))
    assert (made.answer, made.finish_reason) == (said.rstrip(), reason)
    assert "".join(streamed).rstrip() == made.answer
    assert made.n_tokens <= 2 * len(text) or reason == "length"
    never = text[1::-1]  # its letters are said, but not one after the other
    assert answer(loaded, "?", found, max_tokens=3 * len(text), stop=never).answer == made.answer


def test_without_a_model_or_a_passage_nothing_is_said(llama):
    made = ask(TEXTS, QUESTION, passages=2)
    assert [each.doc_id for each in made.sources] == ["2", "0"]  # the best first
    assert (made.answer, *made[3:]) == (None, None, 0, 0, None)
    assert ask(TEXTS, "xyzzy", model=f"{llama}/")[1:] == (None, [], f"{llama}/", 0, 0, None)


def test_the_message_of_the_prompt_is_as_asked(llama):
    loaded = loaded_of(llama)
    document, _ = prompt(loaded, "Which?", [Passage("a", 0, 1, 1.0, "x")], 9, "Say no.")
    said = bytes(document.read().tolist()).decode()
    assert said.index("Say no.") < said.index("x\n\nQuestion: Which?")
    assert SYSTEM not in said
    assert BRIEFLY not in said
    made = [ask(TEXTS, QUESTION, model=f"{llama}/", system=text, **HOW) for text in ("A", "BBBB")]
    assert made[1].n_prompt - made[0].n_prompt == 3


def test_help_of_ask_names_its_arguments():
    kinds = {parameter.kind for parameter in signature(ask).parameters.values()}
    assert Parameter.VAR_KEYWORD not in kinds
    assert {"model", "max_tokens", "system", "temperature", "dtype"} < {*signature(ask).parameters}


def test_the_worst_passages_are_left_out_where_all_do_not_fit(tmp_path):
    loaded = loaded_of(tiny_llama(tmp_path / "llama", max_position_embeddings=430))
    found = [Passage("a", 0, 100, score, str(score) * 50) for score in (1.0, 3.0, 2.0)]
    for room, scores in ((20, [3.0, 2.0]), (40, [3.0]), (999, [3.0])):
        document, kept = prompt(loaded, "Which?", found, room)
        assert [each.score for each in kept] == scores
        assert len(document) + room < 430 or len(kept) == 1
    streamed: list[str] = []
    made = answer(loaded, "Which?", found, streamed.append, max_tokens=500)
    assert made.n_prompt + made.n_tokens <= 431
    assert "".join(streamed).rstrip() == made.answer


TEXT = (
    "Nothing of note happens in this sentence. " * 200
    + "The shed's key is 4821. "
    + "The end is near. " * 90
)
ODD_QUESTION = 'Which "key*" opens the shed?'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_net(vocab_size=257, position="rope").save_pretrained(
        tmp_path / "tiny", Tokenizer.bytes().to_json()
    )
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(TEXT)
    (tmp_path / "texts/b.md").write_text("Another shed. " * 9)
    return tmp_path / "tiny"


def test_an_answer_goes_to_stdout_and_its_sources_to_stderr(model, run_longnet):
    words = [ODD_QUESTION, "-m", model, "-n", "9"]
    done = run_longnet("ask --passages 1 texts", *words, code=0)
    begin, end, shown = re.findall(
        r"source 1: a.txt, characters ([\d,]+) to ([\d,]+): \.\.\. (.+) \.\.\.\n", done.stderr
    )[0]
    passage = TEXT[int(begin.replace(",", "")) : int(end.replace(",", ""))]
    assert "key is 4821" in passage
    assert shown in passage
    # The excerpt has the question's words, and not the beginning
    assert shown.startswith("The shed's key is 4821.")
    row = json.loads(run_longnet("ask --passages 1 --format json texts", *words).stdout)
    assert done.stdout.strip() == row.pop("answer")
    assert re.findall("note: .* parameters: .* of 40 questions .* read the sources", done.stderr)
    assert row.pop("n_prompt") > len(passage)
    assert row.pop("sources")[0].items() >= {"doc_id": "a.txt", "text": passage}.items()
    expected = {"question": ODD_QUESTION, "n_tokens": 9, "finish_reason": "length"}
    assert row == expected | {"model": str(model)}
    for text in (f"A shed. {TEXT}", TEXT):  # a pipe is never taken for what is known
        piped = run_longnet("ask --index i.sqlite --format json -", *words, input=text)
        for source in json.loads(piped.stdout)["sources"]:
            assert text[source["char_start"] :].startswith(source["text"])
    quiet = run_longnet("ask -q --passages 1 -", *words, input=TEXT)
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")
    drawn = run_longnet("ask --temperature 9 texts", *words)
    assert ": b.md, characters 0 to 125: Another shed." in drawn.stderr
    (seed,) = re.findall(r"\(\w+, seed (\d+)\)", drawn.stderr)
    again = run_longnet("ask --temperature 9 --seed", seed, "texts", *words)
    assert again.stdout == drawn.stdout


def test_several_questions_have_a_line_each_and_one_without_a_passage_has_no_answer(
    model, run_longnet, tmp_path
):
    questions = [ODD_QUESTION, "xyzzy?", "When is the end?"]
    write_lines(tmp_path / "q.jsonl", [{"question": question} for question in questions])
    words = ["ask --index i.sqlite -n 3 -q -m", model, "texts"]
    done = run_longnet(*words, "--questions", "q.jsonl", code=1)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["question"] for row in rows] == questions
    assert (rows[1]["answer"], rows[1]["sources"]) == (None, [])
    assert "near" in rows[2]["sources"][0]["text"]
    assert done.stderr.startswith("longnet: error: no passage has any word of 1 of 3 questions")
    assert run_longnet(*words, "xyzzy?", code=1).stdout == ""
    again = run_longnet(*words, ODD_QUESTION, "--format", "json")
    assert {"id": "q.jsonl:0"} | json.loads(again.stdout) == rows[0]


def test_without_a_model_the_passages_are_printed(model, run_longnet):
    words = ["ask", "texts", "shed's key", "--passages", "1"]
    done = run_longnet(*words, code=0)
    begin, end = re.findall(r"a.txt, characters ([\d,]+) to ([\d,]+):\n", done.stdout)[0]
    passage = TEXT[int(begin.replace(",", "")) : int(end.replace(",", ""))]
    assert done.stdout == f"a.txt, characters {begin} to {end}:\n{passage}\n"
    row = json.loads(run_longnet(*words, "--format", "json", code=0).stdout)
    with_a_model = run_longnet(*words, "--format", "json", "-m", model, "-n", "1", code=0)
    assert row.keys() == json.loads(with_a_model.stdout).keys()
    assert row["sources"][0]["text"] == passage
    assert [row[name] for name in ("answer", "model", "finish_reason")] == [None] * 3
    nothing = run_longnet("ask texts xyzzy", code=1)
    assert nothing.stdout == ""


def test_passages_need_no_torch(model, run_python):
    program = (
        "import sys; from longnet_cli.cli.app import app; "
        "app(['ask', 'texts', 'shed', '-q', '--index', 'i.sqlite'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert "shed" in run_python("-c", program, cwd=model.parent).stdout


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_each_row_of_questions_is_one_and_carries_its_id(model, run_longnet, tmp_path, kind):
    """Neighbours of one name too: a set of questions about documents may be named by these."""
    rows = [{"id": "s", "question": f"{word} shed?"} for word in "ab"]
    write_rows(tmp_path / f"q.{kind}", rows)
    done = run_longnet("ask texts -n 1 --questions", f"q.{kind}", "-m", model, code=0)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["id"], row["question"]) for row in answers] == [("s", "a shed?"), ("s", "b shed?")]


def test_what_cannot_be_read_is_left_out_as_asked(model, run_longnet, tmp_path):
    """Also where an index knows the rest."""
    write_lines(tmp_path / "texts/c.jsonl", [{"text": "A shed."}, {"text": None}])
    words = ["ask", "texts", ODD_QUESTION, "-m", model, "-n", "1"]
    run_longnet(*words, code=3)
    for index in ([], ["--index", "i.sqlite"], ["--index", "i.sqlite"]):
        done = run_longnet(*words, "--skip-bad", *index, code=6)
        assert "c.jsonl, line 2: 'text' is null" in done.stderr
        assert done.stdout
    run_longnet(*words, "--index", "i.sqlite", code=3)


@pytest.mark.parametrize("name", ["bytes", "longnet-tiny"])
@given(text=st.text(max_size=60), span=st.integers(1, 7))
def test_places_are_exact(name, text, span):
    words = Tokenizer.load(name)
    ids, data = words.encode(text), text.encode()
    places = TextPlaces(Document("a", ids, len(data), "a", tokenizer=words))
    lengths = words.token_bytes
    edges = np.concatenate([[0], np.cumsum(lengths[ids])])  # in bytes
    # of each byte
    owner = [index for index, character in enumerate(text) for _ in character.encode()]
    for start in range(0, len(ids), span):
        end = min(start + span, len(ids))
        own = owner[edges[start] : edges[end]]
        assert places.of(start, end) == (own[0], own[-1] + 1)


def test_a_text_that_the_tokenizer_changes_has_no_places():
    words = Tokenizer.load("longnet-tiny")
    assert TextPlaces(Document("a", words.encode("abc"), 4, "a", tokenizer=words)).of(0, 1) == (
        None,
        None,
    )
    assert TextPlaces(Document("a", words.encode("abc"), words, "a")).of(0, 1) == (None, None)


TOLD = ["red fox", "blue whale", "green frog"]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("texts", "vectors", "options"),
    [
        (["texts.parquet", "--keep", "text"], ["v.arrow"], ["--text", "text"]),
        (["texts"], ["v.parquet"], ["--root", "texts"]),
        (["texts"], ["v", "--shard-rows", "2", "--no-normalize"], ["--root", "texts"]),
    ],
)
def test_nearest_answers_a_query(
    texts, vectors, options, tmp_path, run_longnet, run_python, python
):
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TOLD)]
    write_rows(tmp_path / "texts.parquet", rows)
    (tmp_path / "texts").mkdir()
    for row in rows:
        (tmp_path / "texts" / row["id"]).write_text(row["text"])
    query = [ROOT / "examples/nearest.py", vectors[0], "--query", "blue whale"]
    missing = run_python(*query, *options, python=python, code=1)
    assert missing.stderr == f"{vectors[0]}: No such file or directory\n"
    run_longnet("encode", *texts, "-o", *vectors, code=0)
    done = run_python(*query, *options, python=python)
    assert "cosines of vectors without their mean" in done.stderr
    assert done.stdout.splitlines()[:2] == ["1.000  1, tokens 0 to 6", "       blue whale"]
    assert all(map(str.strip, run_python(*query, python=python).stdout.splitlines()))


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    """Texts of several passages each, and a small model of sentence-transformers beside them."""
    pytest.importorskip("transformers")
    from sentence_models import save_model

    save_model(tmp_path / "minilm")
    (tmp_path / "texts").mkdir()
    for name in "ab":
        sentences = [f"Sentence {i} of {name} speaks of word{i % 7}. " for i in range(90)]
        (tmp_path / f"texts/{name}.txt").write_text("\n\n  ".join(sentences))
    return tmp_path


@pytest.mark.parametrize("written", ["v.arrow", "v.parquet", "v"])
def test_vectors_and_words_are_joined_by_their_ranks(encoded, written, monkeypatch):
    monkeypatch.chdir(encoded)
    invoke("encode texts -m ./minilm --span passage -o", written, "-q", code=0)
    question, inputs = "word3 of b", Inputs(["texts"])
    files = sorted(Path(written).glob("*.arrow")) or [Path(written)]
    kind = "parquet" if written == "v.parquet" else "ipc"
    rows = dataset(files, format=kind).to_table().to_pylist()
    (asked,) = embed([question], model="./minilm")
    near = sorted(rows, key=lambda row: -float(np.dot(row["embedding"], asked)))[:100]
    index = PassageIndex()
    index.update(inputs)
    words = sorted(index.find(question, 100), key=lambda passage: -passage.score)
    scores: Counter[tuple[str, int]] = Counter()
    for place, passage in enumerate(words, 1):
        scores[passage.doc_id, passage.char_start] += 1 / (60 + place)
    starts = {(each.doc_id, each.char_start): each.char_end for each in index.find("sentence", 999)}
    for place, row in enumerate(near, 1):
        (own,) = [
            (name, start)
            for (name, start), end in starts.items()
            if name == row["doc_id"] and start < (row["char_start"] + row["char_end"]) / 2 < end
        ]
        scores[own] += 1 / (60 + place)
    found = ask(inputs, question, vectors=written, passages=4).sources
    assert [each.score for each in found] == pytest.approx(
        [score for _, score in scores.most_common(4)]
    )
    assert all(each.score == pytest.approx(scores[each.doc_id, each.char_start]) for each in found)
    row = json.loads(
        invoke("ask texts", question, "--vectors", written, "--format", "json", "-q").stdout
    )
    assert len(row["sources"]) == 3
    assert ask(inputs, "zzz", vectors=written).sources  # no word of it is there


def test_vectors_of_other_texts_are_refused(encoded, monkeypatch):
    monkeypatch.chdir(encoded)
    for span in ("passage", "7"):
        invoke("encode texts -m ./minilm --span", span, "-o", f"{span}.arrow", code=0)
    error = refused("ask texts word3 --vectors 7.arrow")
    assert re.search(
        r"7.arrow: the vector of a.txt, characters 0 to \d+, is of no passage", str(error)
    )
    assert "no vectors of passages" in str(refused("ask texts word3 --vectors texts/a.txt"))
    text = Path("texts/a.txt").read_text()
    Path("texts/a.txt").write_text(f"{'A new beginning. ' * 15}\n\n{text}")
    error = refused("ask texts word3 --vectors passage.arrow")
    assert "is of no passage of these texts" in str(error)
    Path("texts/a.txt").write_text(text)
    Path("texts/c.txt").write_text("word3")
    error = refused("ask texts word3 --vectors passage.arrow")
    assert "passage.arrow: it has no vector of c.txt" in str(error)


def write_archives(folder: Path) -> list[Path]:
    """A wheel with six modules, and a Debian package with three manual pages, each with words of its own."""
    folder.mkdir()
    wheel, deb, tar = folder / "a.whl", folder / "b.deb", io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as packed:
        for i in range(6):
            words = " ".join(
                f"x = 'module{i} word{i * 50 + j % 40}'\n" for j in range(400)
            ).replace(" x", "x")
            packed.writestr(f"a/m{i}.py", f'"""The module of word{i * 50} and others."""\n{words}')
    with tarfile.open(fileobj=tar, mode="w:xz") as packed:
        for i in range(3):
            page = (
                f".TH P{i} 1\n.SH NAME\np{i} \\- the tool of word{i}\n.SH DESCRIPTION\n"
                + f"Of word{i}.\n" * 300
            )
            content = gzip.compress(page.encode())
            member = tarfile.TarInfo(f"./usr/share/man/man1/p{i}.1.gz")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    data = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("data.tar.xz", tar.getvalue())):
        data += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    deb.write_bytes(data)
    return [deb, wheel]


@pytest.mark.ci
def test_retrieval_is_measured(tmp_path, run_python, python):

    def run(*args: str | Path, code: int = 0) -> tuple[list[dict], str]:
        done = run_python(ROOT / "examples/retrieval.py", *args, python=python, code=code)
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    archives = write_archives(tmp_path / "archives")
    said = run("make", "bench", *archives)[1]
    assert [line.split(" pairs")[0] for line in said.splitlines()] == [
        "man: 3",
        "py-S: 6",
        "pydoc: 6",
    ]
    assert run("make", "again", *reversed(archives))[1] == said
    pairs = [json.loads(line) for line in (tmp_path / "bench/pairs.jsonl").read_text().splitlines()]
    pages = {pair["first"]: pair["second"] for pair in pairs if pair["task"] == "man"}
    assert pages["the tool of word1"].startswith("\nDESCRIPTION\nOf word1.\n")
    modules = [pair for pair in pairs if pair["task"] == "pydoc"]
    assert all(
        pair["first"].startswith("The module") and "The module" not in pair["second"]
        for pair in modules
    )
    found, _ = run("words", "bench", "--read", "32,all")
    assert len(found) == 2 * 3 * 3
    assert all(
        row["recall_1"] == 1
        for row in found
        if row["read"] is None and row["method"] != "256 counts"
    )
    assert all(row["recall_1"] < 1 for row in found if row["read"] == 32 and row["task"] == "py-S")
    tiny_model(tmp_path / "model")
    command = ["vectors", "bench", "--model", "./model", "--tasks", "man,pydoc", "--read"]
    found, _ = run(*command, "16")
    assert run(*command, "16,48")[0] == found + run(*command, "48", "--", "--chunk", "64")[0]
    assert [(row["task"], row["centred"], row["n"]) for row in found] == [
        *(("man", False, 3), ("man", True, 3)),
        *(("pydoc", False, 6), ("pydoc", True, 6)),
    ]
    for said, *args in (
        ("bench/none: no benchmark", "words", "./bench/none"),
        (
            "--tasks mann: the tasks of bench are man, py-S, pydoc",
            "words",
            "bench",
            "--tasks",
            "mann",
        ),
        ("--read 24: no multiple of 16, the shortest one", *command, "16,24"),
        ("nothing: no such folder", "vectors", "bench", "--model", "./nothing"),
    ):
        error = run(*args, code=1)[1]
        assert error.count("\n") == 1
        assert said in error
