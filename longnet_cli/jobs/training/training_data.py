"""The documents that a run reads, cut into windows, and the token before each of them."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents.document_index import DocumentIndex, index_documents
from longnet_cli.data.documents.input_documents import Inputs, content_digest
from longnet_cli.data.documents.tokenizer import NO_END, Tokenizer
from longnet_cli.data.files.input_files import InputFiles
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.net import Bos
from longnet_cli.running.ranks.ranks import Ranks

from .recipe import Recipe, naming
from .windows import DIGEST_TOKENS, TokenStream, TokenWindows

MANY = 100_000  # documents, of which it is told how much memory their index takes


class TrainingData(NamedTuple):
    """The documents that a run reads, as ids of its tokenizer."""

    tokenizer: Tokenizer
    eos_id: int  # the first token of each document
    windows: list[TokenWindows]  # of each stage
    held_out: DocumentIndex  # maybe empty

    def held_out_digest(self, context: int | None) -> str | None:
        """Return a digest of what decides the held-out loss of a model; None without held-out documents.

        It is of the lengths of the documents, the first tokens of each, and the `context` in which they are read.
        """
        if not self.held_out:
            return None
        digest = hashlib.sha256(str(context).encode())
        for document in self.held_out:
            digest.update(b"%d" % len(document) + document.read(0, DIGEST_TOKENS).tobytes())
        return digest.hexdigest()[:16]


def build_data(
    recipe: Recipe,
    ranks: Ranks,
    initial: str | None = None,
    tokenizer_differs: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> TrainingData:
    """Open the data of a recipe, and cut them into windows. The model `initial` must have their tokenizer.

    `note` gets a line about the index of a source that has MANY documents.

    Raises ConfigError where there are no data, or where their tokens are not the model's, DataError for too few.
    """
    data = recipe.data
    train = recipe.train
    with naming("data.tokenizer"):
        tokenizer = Tokenizer.load(data.tokenizer)
    with naming("data.eos"):
        tokenizer = tokenizer.with_eos(data.eos)
    eos_id = _before_documents(recipe, tokenizer)
    check_vocabulary(recipe, tokenizer)
    if initial:
        ModelFolder.find(initial).tokenizer(data.tokenizer, differs=tokenizer_differs)

    def documents(sources: InputFiles, *, answers: bool = False) -> DocumentIndex:
        vocab_size = recipe.model.vocab_size
        index = index_documents(
            Inputs(sources, tokenizer, data.column, vocab_size=vocab_size, answers=answers)
        )
        if len(index) >= MANY:
            note(f"{sources.names[0]}{' ...' * (len(sources.names) > 1)}: {index}")
        return index

    if not data.sources:
        raise ConfigError(
            "no training data: give --data INPUT, or set data.train or [[data.mix]] in the recipe"
        )
    if data.held_out_files:
        for source in data.sources:
            _refuse_the_same(data.held_out_files, source.files)
    answers = data.loss == "answers"
    indexes = [documents(source.files, answers=answers) for source in data.sources]
    if answers and not any(index.answer_edges for index in indexes):
        raise DataError('data.loss = "answers": no chat has an answer')
    streams = [TokenStream(index, index.lengths, eos_id, index.answer_edges) for index in indexes]
    mix = [source.weight for source in data.sources]
    shared: dict[str, Any] = {"weights": mix, "rank": ranks.dp_rank, "world": ranks.dp}
    windows = [
        TokenWindows(
            streams,
            stage.seq_len,
            train.windows(stage) // ranks.dp,
            train.seed + index,
            **shared,
        )
        for index, stage in enumerate(train.stages)
    ]
    held_out = DocumentIndex(tokenizer)
    longest = 0
    if data.held_out_files:
        held_out = documents(data.held_out_files)
        longest = int(held_out.lengths.max(initial=0))
        if not longest:
            names = ", ".join(map(str, data.held_out_files.names))
            raise DataError(f"data.held_out, {names}: every document is empty")
    most = recipe.model.max_tokens
    # rather than at the first evaluation
    if most and min(longest, train.held_out_context or longest) > most:
        why = (
            f"data.held_out: a document has {longest:,} tokens, and the model reads {most} at most"
        )
        raise ConfigError(f"{why}: set train.held_out_context={most}")
    return TrainingData(tokenizer, eos_id, windows, held_out)


def _refuse_the_same(held_out: InputFiles, trained: InputFiles) -> None:
    """Raise ConfigError where a file to train on has the contents of a held-out one, whatever their names are."""
    digests = {content_digest(input_file): input_file for input_file in held_out}
    sizes = {input_file.size for input_file in digests.values()}
    digests.pop(None, None)  # of pipes, which are read once
    for input_file in trained:
        if input_file.size not in sizes:
            continue
        if same := digests.get(content_digest(input_file)):
            also = "" if same.where == input_file.where else f" as {input_file.where}"
            raise ConfigError(
                f"data.held_out: {same.where} is trained on{also}, too: leave it out of one of the two"
            )


def check_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the net has no id for a token, or for the mask."""
    masked = recipe.train.objective == "masked"
    needed = tokenizer.vocab_size + masked
    if recipe.model.vocab_size < needed:
        what = "the tokens and the mask need" if masked else "the tokenizer needs"
        raise ConfigError(
            f"model.vocab_size = {recipe.model.vocab_size} is less than {what}, {needed}: set {needed}, or remove it"
        )


def _before_documents(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Return the id with which each document starts: end-of-text, or what a Hugging Face model was trained with."""
    if recipe.pretrained is None or recipe.data.eos is not None:
        token_id: Bos = tokenizer.eos_id
    else:
        token_id = ModelFolder.find(recipe.pretrained.init).bos(tokenizer)
    if token_id is None:
        raise ConfigError(
            f"{NO_END}; training puts it between documents: name a token or an id (--eos, data.eos)"
        )
    if not isinstance(token_id, int):
        raise ConfigError(
            f"{recipe.init} starts a document with {len(token_id)} tokens, and training puts one there"
        )
    return token_id
