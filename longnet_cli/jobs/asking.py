"""The `ask` job: the passages that a question's words find, and an answer by a model that reads them in a short prompt.

    question --PassageIndex.find--> passages --prompt of the best that fit--> tokens --generate--> answer

The model does not read the texts that are asked: a search takes a second where reading takes minutes, and a short
prompt is answered better than a long one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import pyarrow as pa

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.columns import ID_COLUMNS
from longnet_cli.data.documents import Document
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.passages import Passage, PassageIndex
from longnet_cli.data.tables import Text
from longnet_cli.jobs.batch_functions import tables
from longnet_cli.jobs.generating import FinishReason, generate, load_model
from longnet_cli.models.folder import Loaded

SYSTEM = "Answer the question from the passages."
PLAIN_STOP = (
    "\n\n",
    "\nQuestion:",
)  # after an answer without a chat template, which a text would follow


class Answer(NamedTuple):
    """An answer, and the passages that the model read for it, in the order of the texts.

    `n_prompt` and `n_tokens` count tokens of the prompt and of the answer. If no passage has a word of the question,
    nothing is read, and `answer` and `finish_reason` are None.
    """

    question: str
    answer: str | None
    sources: list[Passage]
    model: str
    n_prompt: int
    n_tokens: int
    finish_reason: FinishReason | None

    def row(self) -> dict[str, Any]:
        """Return the object that `--format json` prints."""
        return self._asdict() | {"sources": [source._asdict() for source in self.sources]}


def answer(
    loaded: Loaded,
    question: str,
    found: Sequence[Passage],
    on_text: Callable[[str], None] = lambda text: None,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    **how: Any,
) -> Answer:
    """Answer a question from the passages that were found: the best that leave room for `max_tokens`.

    The prompt is in the model's chat template, if it is loaded. `on_text` gets the answer as it comes. `how` are more
    arguments of `generate`, and it raises as that does; also ConfigError for a model without a tokenizer.
    """
    if not found:
        return Answer(question, None, [], loaded.origin, 0, 0, None)
    asked, sources = prompt(loaded, question, found, max_tokens)
    how |= {"bos": None, "stop": stop} if loaded.chat else {"stop": (*stop, *PLAIN_STOP)}
    said, tokens, reason = "", 0, None
    for step in generate(loaded, asked, max_tokens=max_tokens, **how):
        text, reason = step.text if said else step.text.lstrip(), step.finish_reason
        said, tokens = said + text, tokens + 1
        on_text(text)
    return Answer(question, said.rstrip(), sources, loaded.origin, len(asked), tokens, reason)


def prompt(
    loaded: Loaded, question: str, found: Sequence[Passage], max_tokens: int
) -> tuple[Document, list[Passage]]:
    """Return the prompt, and the passages in it. If they leave no room for `max_tokens`, the worst are left out."""
    words, most, passages = loaded.tokenizer, loaded.net.config.max_tokens, list(found)
    if words is None:
        raise ConfigError(f"{loaded.origin}: there is no tokenizer, which reads a question")
    while True:
        text = "\n\n".join([*(passage.text for passage in passages), f"Question: {question}"])
        ids = (
            loaded.chat.encode(text, SYSTEM)
            if loaded.chat
            else words.encode(f"{SYSTEM}\n\n{text}\nAnswer:")
        )
        if (
            not passages[1:] or most is None or len(ids) + max_tokens < most
        ):  # one may stand before them
            return Document("question", ids, None, "the question with its best passage"), passages
        passages.remove(min(passages, key=lambda passage: passage.score))


def ask(
    texts: Any,
    question: str,
    *,
    model: str,
    passages: int = 3,
    device: str = "auto",
    dtype: str = "auto",
    **how: Any,
) -> Answer:
    """Answer a question from texts: a list of them, a table or frame with a column `text`, or `Inputs` of files.

    The model reads the best `passages` at most. Names of documents are in a column `doc_id` or `id`, otherwise they are
    row numbers. A model is loaded once. `how` are more arguments of `answer`. Raises what `Inputs`, `ModelFolder.load`
    and `generate` raise.
    """
    with closing(PassageIndex()) as index:
        if isinstance(texts, Inputs):
            index.update(texts)
        else:
            table = tables(texts)
            if not isinstance(table, pa.Table) or "text" not in table.column_names:
                raise ConfigError(
                    "a list of texts, or a table with a column 'text', is needed to ask"
                )
            names = next(
                (table[name].to_pylist() for name in ID_COLUMNS if name in table.column_names),
                range(len(table)),
            )
            for name, text in zip(names, table["text"].to_pylist(), strict=True):
                index.add(Text(str(name), text or "", "table"))
        found = index.find(question, passages)
    return answer(load_model(model, device, dtype), question, found, dtype=dtype, **how)
