"""Chats are documents: the tokens of what the tokenizer's template makes of their messages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from files import write_rows
from processes import contents
from tokenizers import models, normalizers, pre_tokenizers, trainers

from longnet_cli.basics.errors import ConfigError, DataError, RefusedError
from longnet_cli.data.documents.chat import ChatTemplate
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.token_documents import Document, Unread
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.tokenizing import tokenize

TEMPLATE = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, <|im_end|> you"}],
    [{"role": "system", "content": "wörld"}],
]


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (tmp_path / "words").mkdir()
    inner.save(str(tmp_path / "words/tokenizer.json"))
    (tmp_path / "words/chat_template.jinja").write_text(TEMPLATE)
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (tmp_path / "words/tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(tmp_path / "words")


REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
)


def write(path: Path, chats: list[list[dict]]) -> Path:
    return write_rows(
        path, [{"id": index, "messages": chat, "n": index} for index, chat in enumerate(chats)]
    )


def test_a_template_without_system_has_it_in_the_first_message(words, tmp_path):
    (tmp_path / "words/chat_template.jinja").write_text(REFUSING)
    template = ChatTemplate(tmp_path / "words", words)
    said, more = (
        {"role": "user", "content": "Hi"},
        [{"role": "assistant", "content": "Hello"}, *CHATS[0][:1]],
    )
    with_system = {**said, "content": "Be brief.\n\nHi"}
    assert [*template.encode([said, *more], "Be brief.")] == [
        *template.encode([with_system, *more])
    ]
    with pytest.raises(RefusedError, match="no system"):
        template.encode([*CHATS[1], said])


@pytest.mark.parametrize(
    "options",
    [
        "",
        "separators=(',', ':')",
        "ensure_ascii=True",
        "sort_keys=True",
        "true, 2",
        "indent=4, separators=(', ', ' = ')",
    ],
)
def test_tojson_has_the_options_of_transformers(words, tmp_path, options):
    hf = pytest.importorskip("transformers")
    fast = hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "words/tokenizer.json"))
    template = "{{ messages | tojson(" + options + ") }} {{ messages[0].content | tojson }}"
    (tmp_path / "words/chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "<ä> \u6f22"}]
    (text,) = Inputs([write(tmp_path / "x.jsonl", [chat])]).texts(words)
    assert text.text == fast.apply_chat_template(chat, chat_template=template, tokenize=False)


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.stream"])
def test_a_chat_is_what_transformers_makes_of_it(words, tmp_path, name):
    hf = pytest.importorskip("transformers")
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "words/tokenizer.json"), bos_token="<|endoftext|>"
    )
    path = write(tmp_path / name, CHATS)
    found = list(Inputs([path], words, keep=("n",)).documents())
    for document, chat in zip(found, CHATS, strict=True):
        text = fast.apply_chat_template(chat, chat_template=TEMPLATE, tokenize=False)
        # the start is the reader's, as of any document
        assert "<|endoftext|>" + words.decode(document.read()) == text
    start, end = words.id_of("<|im_start|>"), words.id_of("<|im_end|>")
    # A message of the first chat has the words "<|im_end|>", which are no special token here
    assert [token for token in found[0].read().tolist() if token > 255] == [start, end] * 2
    assert [(document.doc_id, document.kept["n"].as_py()) for document in found] == [
        ("0", 0),
        ("1", 1),
    ]
    assert found[1].n_bytes == len("system\nwörld\n".encode())
    assert (
        list(Inputs([path], words, column="messages").documents())[1].read().tolist()
        == found[1].read().tolist()
    )


FORGED = {  # special tokens beside those of the template, what changes texts, and a message
    "a token of the end of another": (["<|x|>", "<|x|><|y|>", "<|y|>"], None, "<|x|><|y|>"),
    "tokens that overlap": (["<ab", "ab>"], None, "<ab>"),
    "a character": (["\u2603"], None, "a \u2603 b"),
    "full width": ([], normalizers.NFKC(), "\uff1c|im_end|\uff1e"),
    "capitals": (["[sep]"], normalizers.Lowercase(), "[SEP]"),
    "accents": (
        ["[SEP]"],
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        "[SE\u0301P]",
    ),
    "replaced": ([], normalizers.Replace("@", "|im_end|"), "<@>"),
    "taken out": (["[SEP]"], normalizers.BertNormalizer(), "[\x00sep] 0 \ue000"),
    "private use": ([], None, "\ue000\U000f0000 \ue001\U000f0001<|im_end|>"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_no_text_of_a_message_becomes_a_special_token(tmp_path, kind):
    special, normalizer, message = FORGED[kind]
    inner = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    names = ["<|im_start|>", "<|im_end|>", *special]
    inner.add_special_tokens([tokenizers.AddedToken(name, normalized=True) for name in names])
    inner.normalizer = normalizer
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    words = Tokenizer.load(tmp_path)
    ids = ChatTemplate(tmp_path, words).encode(message).tolist()
    start, end = map(words.id_of, names[:2])
    assert [each for each in ids if each > 255] == [start, end, start]
    said = words.decode(words.encode(message))
    assert words.decode(ids, special=False).split() == ["user", *said.split(), "assistant"]


def test_a_template_may_cut_a_special_token_of_a_message(words, tmp_path):
    cut = TEMPLATE.replace("message.content", "message.content[:21]")
    (tmp_path / "words/chat_template.jinja").write_text(cut)
    ids = ChatTemplate(tmp_path / "words", words).encode("12345678901234567890<|im_end|>")
    assert words.decode(ids, special=False).split() == [
        "user",
        "12345678901234567890<",
        "assistant",
    ]


def test_a_special_token_that_is_a_word_of_the_vocabulary_is_refused_in_a_message(tmp_path):
    inner = tokenizers.Tokenizer(
        models.WordLevel({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}[SEP]")
    template = ChatTemplate(tmp_path, Tokenizer.load(tmp_path))
    assert template.encode("a b").tolist() == [2, 0, 1]
    with pytest.raises(RefusedError, match="a message has the text of a special token"):
        template.encode("a [SEP] b")


def test_a_tokenizer_that_changes_the_ends_of_a_text_with_special_tokens_is_refused(tmp_path):
    inner = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    inner.add_special_tokens([tokenizers.AddedToken("<|im_end|>", normalized=True)])
    inner.normalizer = normalizers.Sequence([normalizers.Strip()])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(ConfigError, match="the tokenizer changes the ends of a text"):
        ChatTemplate(tmp_path, Tokenizer.load(tmp_path))


def test_a_message_with_a_character_that_no_text_has_is_refused(words, tmp_path):
    template = ChatTemplate(tmp_path / "words", words)
    with pytest.raises(RefusedError, match=r"a character from U\+FDD0 to U\+FDEF"):
        template.encode("a\ufdd0|im_end|>")


def spaced(prepend: str) -> tokenizers.Tokenizer:
    """A tokenizer whose words begin with a space, such as Llama's, and whose special tokens take spaces beside them."""
    texts = ["system user assistant\nHello you Hi is in it <|im_end|> a an Hi"]
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    inner.add_special_tokens(
        [
            "<|endoftext|>",
            tokenizers.AddedToken("<|im_start|>", rstrip=True, normalized=False),
            tokenizers.AddedToken("<|im_end|>", lstrip=True, normalized=False),
        ]
    )
    inner.add_tokens(["<tool>"])
    return inner


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_ids_are_those_of_transformers_whatever_stands_around_special_tokens(tmp_path, prepend):
    hf = pytest.importorskip("transformers")
    inner = spaced(prepend)
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("{{ bos_token }}", ""))
    fast = hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    template = ChatTemplate(tmp_path, Tokenizer.load(tmp_path))
    for said in ("Hi", " Hi you ", "is<tool>it", "\n\nHello\n", ""):
        chat = [{"role": "user", "content": said}, {"role": "assistant", "content": f" {said}"}]
        expected = fast.apply_chat_template(
            chat, chat_template=TEMPLATE.replace("{{ bos_token }}", ""), return_dict=False
        )
        _, ids = template.read_chat(chat)
        assert ids().ids.tolist() == expected, said


def test_what_is_no_chat_is_named(words, tmp_path):
    lines = [
        {"messages": CHATS[0]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": [1]}]},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(Inputs([tmp_path / "x.jsonl"], words, skip_bad=True).documents())
    assert [str(each.error).partition(", ")[2] for each in found if isinstance(each, Unread)] == [
        "line 2: 'messages' holds what is no message, with a role and a content",
        "line 3: 'messages' holds a message whose 'content' is no text",
    ]
    with pytest.raises(
        ConfigError, match="'messages' holds chats, which need the chat template of a tokenizer"
    ):
        list(Inputs([write(tmp_path / "y.parquet", CHATS)], Tokenizer.bytes()).documents())
    (tmp_path / "words/chat_template.jinja").write_text(
        "{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(DataError, match=r"y\.parquet, row 0: .*roles must alternate"):
        list(Inputs([tmp_path / "y.parquet"], words).documents())
    refused: list[Document] = list(
        Inputs([tmp_path / "y.parquet"], words, skip_bad=True).documents()
    )
    assert [isinstance(each, Unread) for each in refused] == [True, True]
    (tmp_path / "words/chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        list(Inputs([tmp_path / "y.parquet"], words).documents())


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.stream"])
@pytest.mark.parametrize("column", [None, "messages"])
def test_tokenize_writes_the_ids_that_are_read(words, tmp_path, name, column):
    many = [*CHATS, [{"role": "user", "content": "wörld <|im_start|> " * 50}], *CHATS * 20]
    texts = tmp_path / "a.txt"
    texts.write_text("text <|im_end|>")
    inputs: list[Path] = [write(tmp_path / name, many), *([texts] if column is None else [])]
    result = tokenize(
        Inputs(inputs, column=column),
        tmp_path / "out",
        tokenizer=tmp_path / "words",
        eos=True,
        shard_tokens=999,
    )
    found = list(Inputs([tmp_path / "out"]).documents())
    wanted = list(Inputs(inputs, words, column=column).documents())
    assert [each.doc_id for each in found] == [each.doc_id for each in wanted]
    for document, same in zip(found, wanted, strict=True):
        assert document.read().tolist() == [*same.read().tolist(), words.id_of("<|im_end|>")]
    assert len(result.shards) > 2
    chats = [
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
        for chat in many
    ]
    text_bytes = 0 if column else len(texts.read_bytes())
    assert result.bytes == sum(len(f"<|endoftext|>{chat}".encode()) for chat in chats) + text_bytes


def test_tokenize_resumes_among_chats_that_the_template_refuses(words, tmp_path, run_longnet):
    (tmp_path / "words/chat_template.jinja").write_text(REFUSING)
    write(tmp_path / "x.jsonl", CHATS * 3)
    command = "tokenize x.jsonl --tokenizer words --shard-tokens 30 -o"
    run_longnet(f"{command} out", code=3)
    (tmp_path / "words/chat_template.jinja").write_text(TEMPLATE)
    changed = run_longnet(f"{command} out --resume", code=2)
    assert "chat_template" in changed.stderr
    (tmp_path / "words/chat_template.jinja").write_text(REFUSING)
    for more in ("out --resume", "whole"):
        done = run_longnet(f"{command} {more} --skip-bad", code=6)
        assert done.stderr.count("left out: x.jsonl, line") == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert [each.doc_id for each in Inputs([tmp_path / "out"]).documents()] == ["0", "2", "4"]


MARKED = TEMPLATE.replace(
    "{{ message.content }}<|im_end|>\n",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}\n\n",
)


def random_chats(count: int) -> list[list[dict[str, str]]]:
    """Chats of one to four turns of words, spaces and lines, some of which begin with a system message."""
    pick = random.Random(0)

    def said() -> str:
        parts = ["Hello", " you", "\n", "wörld ", " ", "2 + 2", "🙂", "|im_end|"]
        return "".join(pick.choices(parts, k=pick.randint(1, 12)))

    chats = []
    for _ in range(count):
        roles = ["system"] * pick.randint(0, 1) + ["user", "assistant"] * pick.randint(1, 4)
        chats.append([{"role": role, "content": said()} for role in roles])
    return chats


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("prepend", [None, "first", "always", "never"])
def test_the_answers_are_those_of_transformers(words, tmp_path, prepend, marked):
    """With the template's marks, and by renderings of a template without marks."""
    hf = pytest.importorskip("transformers")
    folder = tmp_path / "words"
    if prepend:
        spaced(prepend).save(str(folder / "tokenizer.json"))
    template = MARKED.replace("{{ bos_token }}", "")
    own = template if marked else TEMPLATE.replace("{{ bos_token }}", "")
    (folder / "chat_template.jinja").write_text(own)
    fast = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    reader = ChatTemplate(folder, Tokenizer.load(folder))
    masks = []
    for chat in random_chats(200):
        expected = fast.apply_chat_template(
            chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        _, encode = reader.read_chat(chat, answers=True)
        part = encode()
        assert part.ids.tolist() == expected["input_ids"]
        assert part.is_answer.astype(int).tolist() == expected["assistant_masks"], chat
        masks += expected["assistant_masks"]
    assert 0 < sum(masks) < len(masks)


def test_a_template_that_does_not_show_its_answers_is_refused(words, tmp_path):
    """It takes out what stands before the last message, as templates of models that think do."""
    forgetful = TEMPLATE.replace("{{ message.content }}", "{{ message.content if loop.last }}")
    (tmp_path / "words/chat_template.jinja").write_text(forgetful)
    chat = [*CHATS[0], {"role": "user", "content": "And now?"}]
    with pytest.raises(RefusedError, match="does not show which text is an answer: it has no"):
        ChatTemplate(tmp_path / "words", words).read_chat(chat, answers=True)
