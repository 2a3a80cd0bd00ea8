"""The `ask` job: the passages that a question's words find, and an answer by a model that reads them in a short prompt.

    question --PassageIndex.find--> passages --prompt of the best that fit--> tokens --generate--> answer

The model does not read the texts that are asked: a search takes a second where reading takes minutes, and a short
prompt is answered better than a long one. Without a model, the passages are all there is, and torch is not loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.passages import Passage, PassageIndex, open_index
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.files.column_choice import ID_COLUMNS
from longnet_cli.data.files.opened_inputs import Text

if TYPE_CHECKING:
    from longnet_cli.models.folder import Loaded

    from .generating import FinishReason

SYSTEM = "Answer the question from the passages."
BRIEFLY = "Answer in one short sentence."  # after the question: small models then end
ASKED_AGAIN = "\nQuestion:"  # what a model goes on with that does not end
PLAIN_STOP = "\n\n"  # after an answer without a chat template, which a text would follow
SENTENCE_END = ".!?\n"
REPEATED_WORDS = 5  # of a sentence that ends an answer where it comes back


class Answer(NamedTuple):
    """An answer, and the passages that the model read for it, in the order of the texts; without a model, best first.

    `n_prompt` and `n_tokens` count tokens of the prompt and of the answer. Without a model, and if no passage has a
    word of the question, nothing is read, and `answer` and `finish_reason` are None.
    """

    question: str
    answer: str | None
    sources: list[Passage]
    model: str | None
    n_prompt: int = 0
    n_tokens: int = 0
    finish_reason: FinishReason | None = None

    def row(self) -> dict[str, Any]:
        """Return the object that `--format json` prints."""
        return self._asdict() | {"sources": [source._asdict() for source in self.sources]}


def found_alone(question: str, passages: Sequence[Passage]) -> Answer:
    """Return what there is without a model: the passages, the best first."""
    best_first = sorted(passages, key=lambda passage: -passage.score)
    return Answer(question, None, best_first, None)


def answer(
    loaded: Loaded,
    question: str,
    passages: Sequence[Passage],
    on_text: Callable[[str], None] = lambda text: None,
    *,
    system: str | None = None,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> Answer:
    """Answer a question from the passages that were found: the best that leave room for `max_tokens`.

    The prompt is that of `prompt`. The answer ends where `generate` ends it, at a line that begins with "Question:",
    and before a sentence of five words or more that it has already. `on_text` gets it as it comes. `options` are more
    arguments of `generate`, and it raises as that does; also ConfigError for a model without a tokenizer.
    """
    from .generating import StopTexts, generate, stop_texts

    if not passages:
        return Answer(question, None, [], loaded.origin)
    asked, sources = prompt(loaded, question, passages, max_tokens, system)
    stops = [*stop_texts(stop), ASKED_AGAIN]
    if loaded.chat:
        options["bos"] = None
    else:
        stops.append(PLAIN_STOP)
    answered = ""
    tokens = 0
    reason: FinishReason | None = None
    repeated = StopTexts(sentences := list[str]())
    for step in generate(loaded, asked, max_tokens=max_tokens, stop=stops, **options):
        text = ""
        reason = step.finish_reason
        for sign in step.text:
            text += repeated.add(sign)
            if repeated.reached:
                break
            if sign in SENTENCE_END:
                sentences[:] = long_sentences(answered + text)
        if repeated.reached:
            reason = "stop"
        elif reason:
            text += repeated.end()
        if not answered:
            text = text.lstrip()
        answered += text
        tokens += 1
        on_text(text)
        if reason:
            break
    return Answer(question, answered.rstrip(), sources, loaded.origin, len(asked), tokens, reason)


def long_sentences(text: str) -> list[str]:
    """Return the sentences and lines of a text that have REPEATED_WORDS or more."""
    sentences = re.split(rf"(?<=[{SENTENCE_END}])\s+|\n", text)
    return [sentence for sentence in sentences if len(sentence.split()) >= REPEATED_WORDS]


def prompt(
    loaded: Loaded,
    question: str,
    passages: Sequence[Passage],
    max_tokens: int,
    system: str | None = None,
) -> tuple[Document, list[Passage]]:
    """Return the prompt, and the passages in it. If they leave no room for `max_tokens`, the worst are left out.

    It is in the model's chat template, if that is loaded. `system` replaces SYSTEM before the passages, and BRIEFLY
    after the question.
    """
    tokenizer = loaded.tokenizer
    most = loaded.net.config.max_tokens
    if tokenizer is None:
        raise ConfigError(f"{loaded.origin}: there is no tokenizer, which reads a question")
    asked = f"Question: {question}"
    if system is None:
        system = SYSTEM
        asked += f"\n{BRIEFLY}"
    best = list(passages)
    while True:
        text = "\n\n".join([*(passage.text for passage in best), asked])
        if loaded.chat:
            ids = loaded.chat.encode(text, system)
        else:
            ids = tokenizer.encode(f"{system}\n\n{text}\nAnswer:")
        # one token may stand before them
        if len(best) < 2 or most is None or len(ids) + max_tokens < most:
            return Document("question", ids, None, "the question with its best passage"), best
        best.remove(min(best, key=lambda passage: passage.score))


def ask(
    texts: Any,
    question: str,
    *,
    model: str | None = None,
    passages: int = 3,
    vectors: str | None = None,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chunk: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Answer:
    """Answer a question from texts: a list of them, a table or frame with a column `text`, or `Inputs` of files.

    The `sources` are the best `passages` at most. Without a model, the best one is first. A `model`, which is loaded
    once, reads them in the order of the texts, in which they then are, and answers. Names of documents are in a column
    `doc_id` or `id`, otherwise they are row numbers.
    `vectors` is a file that `encode --span passage` made of the same texts. The other arguments are those of `longnet
    ask`, and of no use without a model.

    Raises ConfigError for texts of another kind, and for a question that is not UTF-8; and what `Inputs`,
    `ModelFolder.load` and `generate` raise.
    """
    with open_index(None) as index:
        _fill(index, texts)
        best = finder(index, vectors)(question, passages)
    if model is None:
        return found_alone(question, best)
    from .generating import load_model

    return answer(
        load_model(model, device, dtype),
        question,
        best,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        chunk=chunk,
        dtype=dtype,
    )


def finder(index: PassageIndex, vectors: str | None) -> Callable[[str, int], list[Passage]]:
    """Return what finds passages for a question: by words and, with a file of their `vectors`, by meaning too."""
    if not vectors:
        return index.find
    from .passage_vectors import PassageVectors

    return PassageVectors(vectors, index).find


def _fill(index: PassageIndex, texts: Any) -> None:
    if isinstance(texts, Inputs):
        index.update(texts)
        return
    from .batch_functions import as_table

    table = as_table(texts)
    if "text" not in table.column_names:
        raise ConfigError("a list of texts, or a table with a column 'text', is needed to ask")
    columns = (table[name].to_pylist() for name in ID_COLUMNS if name in table.column_names)
    names = next(columns, range(len(table)))
    for name, text in zip(names, table["text"].to_pylist(), strict=True):
        index.add(Text(str(name), text or "", "table"))
