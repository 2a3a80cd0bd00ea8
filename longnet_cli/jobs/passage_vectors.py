"""Passages by meaning: the vectors that `longnet encode --span passage` made of the texts, joined with their words.

    question --embed--> its vector --cosine--> passages, the nearest first \
    question --PassageIndex.rank-------------> passages, the best first     +--reciprocal ranks--> the best of both
"""

import math
from bisect import bisect
from collections import defaultdict
from itertools import chain

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents.passages import Passage, PassageIndex, check_number
from longnet_cli.data.files.column_choice import Wanted
from longnet_cli.data.files.input_files import InputFiles
from longnet_cli.data.files.opened_inputs import Table
from longnet_cli.data.files.opening import open_input

from .batch_functions import embed
from .job_options import NO_PREFIX

COLUMNS = ["embedding", "doc_id", "char_start", "char_end"]
RANKED = 100  # passages of each list that are joined
SHARED = 0.75  # the part of the longer of two texts, above which they count as the same
DAMPING = 60  # of reciprocal ranks: the first place counts 1/61, the hundredth 1/160


class PassageVectors:
    """The vectors of an index's passages, in a file or a folder `name`.

    Raises ConfigError for a file without vectors, places or a model, and for one of other texts than the index has.
    """

    def __init__(self, name: str, index: PassageIndex) -> None:
        table, self._facts = _read(name)
        if "longnet.model" not in self._facts:
            raise ConfigError(f"{name}: its metadata name no model, which a question needs too")
        self._index = index
        self._numbers = np.array(_numbers(name, index, table), int)
        column = table["embedding"].combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        # those of a net that was made to predict tokens, not for vectors, share a large common part
        of_tokens = (
            "longnet.modules" not in self._facts and "longnet.tokenizer_sha256" in self._facts
        )
        self._mean = vectors.mean(0, dtype=np.float32) if of_tokens else np.float32(0)
        self._vectors = vectors.astype(np.float32) - self._mean
        self._vectors /= np.linalg.norm(self._vectors, axis=1, keepdims=True) + 1e-12

    def find(self, question: str, most: int) -> list[Passage]:
        """Return the best passages by words and vectors, `most` at most, in the order of the texts.

        A passage's score is the sum of 1 / (DAMPING + its place) over both lists.
        """
        check_number(most)
        scores = defaultdict[int, float](float)
        by_words = enumerate(self._index.rank(question, RANKED), 1)
        by_meaning = enumerate(self._nearest(question), 1)
        for place, number in chain(by_words, by_meaning):
            scores[number] += 1 / (DAMPING + place)
        best = sorted(scores.items(), key=lambda scored: -scored[1])[:most]
        return self._index.passages(dict(best))

    def _nearest(self, question: str) -> list[int]:
        facts = self._facts
        windows = "longnet.context" in facts  # which a model reads by its own attention
        vector = embed(
            [question],
            model=facts["longnet.model"],
            pool=facts["longnet.pooling"],
            prefix=facts.get("longnet.query_prompt") or NO_PREFIX,
            pattern=None if windows else facts.get("longnet.pattern"),
            normalize=facts.get("longnet.normalized") != "false",
            dims=self._vectors.shape[1],
        )
        cosines = self._vectors @ (vector[0] - self._mean)
        nearest = np.argsort(-cosines, kind="stable")[:RANKED]
        return self._numbers[nearest].tolist()


def _read(name: str) -> tuple[pa.Table, dict[str, str]]:
    """Return the vectors and places of a file or a folder, and the metadata of its last file."""
    batches = list[pa.RecordBatch]()
    for source in InputFiles([name]):
        opened = open_input(source, Wanted())
        if not isinstance(opened, Table) or not {*COLUMNS} <= {*opened.schema.names}:
            raise ConfigError(
                f"{source.where}: no vectors of passages, which longnet encode --span passage writes"
            )
        facts = opened.metadata
        batches += [batch.select(COLUMNS) for batch in opened.read(COLUMNS)]
    return pa.Table.from_batches(batches), facts


def _numbers(name: str, index: PassageIndex, table: pa.Table) -> list[int]:
    """Return the number of the passage of each vector: the one that has its middle, if both have the same text.

    Raises ConfigError where they share no more than `SHARED` of the longer one, and for a text without a vector.
    """
    passages = defaultdict[str, list[tuple[int, int, int]]](lambda: [(0, 0, 0)])
    for number, doc_id, start, end in index.places():
        passages[doc_id].append((start, end, number))
    numbers = []
    doc_ids, *ends = table.select(COLUMNS[1:]).columns
    firsts, lasts = (column.fill_null(0).to_pylist() for column in ends)  # null: no places
    for doc_id, first, last in zip(doc_ids.to_pylist(), firsts, lasts, strict=True):
        before = bisect(passages[doc_id], ((first + last) // 2, math.inf))
        start, end, number = passages[doc_id][before - 1]
        shared = min(end, last) - max(start, first)
        if shared <= SHARED * max(end - start, last - first):
            raise ConfigError(
                f"{name}: the vector of {doc_id}, characters {first} to {last}, is of no passage of these texts: "
                "encode them as they are, with --span passage"
            )
        numbers.append(number)
    if missing := passages.keys() - {*table["doc_id"].to_pylist()}:
        raise ConfigError(f"{name}: it has no vector of {min(missing)}: encode the same texts")
    return numbers
