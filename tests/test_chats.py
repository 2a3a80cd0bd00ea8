"""Chats are documents: the tokens of what the tokenizer's template makes of their messages.

pytest tests/test_chats.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import tokenizers

from longnet_cli.data.documents import Document, Unread
from longnet_cli.data.sources import read_documents
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError

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


def write(path: Path, chats: list[list[dict]]) -> Path:
    rows = [{"id": index, "messages": chat, "n": index} for index, chat in enumerate(chats)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with ipc.new_stream(path, (table := pa.Table.from_pylist(rows)).schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.stream"])
def test_a_chat_is_what_transformers_makes_of_it(words: Tokenizer, tmp_path: Path, name: str) -> None:
    hf = pytest.importorskip("transformers")
    fast = hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "words/tokenizer.json"), bos_token="<|endoftext|>")
    path = write(tmp_path / name, CHATS)
    found = list(read_documents([path], words, keep=("n",)))
    for document, chat in zip(found, CHATS, strict=True):
        text = fast.apply_chat_template(chat, chat_template=TEMPLATE, tokenize=False)
        assert "<|endoftext|>" + words.decode(document.read()) == text  # the start is the reader's, as of any document
    start, end = words.id_of("<|im_start|>"), words.id_of("<|im_end|>")
    assert [token for token in found[0].read().tolist() if token > 255] == [start, end] * 2  # one is a message's words
    assert [(document.doc_id, document.kept["n"].as_py()) for document in found] == [("0", 0), ("1", 1)]
    assert found[1].n_bytes == len("system\nwörld\n".encode())
    assert list(read_documents([path], words, column="messages"))[1].read().tolist() == found[1].read().tolist()


def test_what_is_no_chat_is_named(words: Tokenizer, tmp_path: Path) -> None:
    lines = [{"messages": CHATS[0]}, {"messages": [{"content": "x"}]}, {"messages": [{"role": "user", "content": [1]}]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(read_documents([tmp_path / "x.jsonl"], words, skip_bad=True))
    assert [str(each.error).partition(", ")[2] for each in found if isinstance(each, Unread)] == [
        "line 2: 'messages' holds what is no message, with a role and a content",
        "line 3: 'messages' holds a message whose 'content' is no text",
    ]
    with pytest.raises(ConfigError, match="'messages' holds chats, which need the chat template of a tokenizer"):
        list(read_documents([write(tmp_path / "y.parquet", CHATS)], Tokenizer.bytes()))
    (tmp_path / "words/chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"y\.parquet, row 0: .*roles must alternate"):
        list(read_documents([tmp_path / "y.parquet"], words))
    refused: list[Document] = list(read_documents([tmp_path / "y.parquet"], words, skip_bad=True))
    assert [isinstance(each, Unread) for each in refused] == [True, True]
    (tmp_path / "words/chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        list(read_documents([tmp_path / "y.parquet"], words))
