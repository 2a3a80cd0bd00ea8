"""Passages of texts, and an index that finds those with a question's words.

    texts --text_pieces.cut--> passages --PassageIndex--> SQLite's full-text search --find--> the best passages by BM25

The index is in memory, or a file that knows its inputs by digests of their contents.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents import Unread
from longnet_cli.data.inputs import DocumentPass, Inputs
from longnet_cli.data.manifest import OnSkip
from longnet_cli.data.tables import Table, Text
from longnet_cli.data.text_pieces import cut

# Writing in which no space ends a word: Thai, Lao, Burmese, Khmer, kana, Chinese characters, hangul
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+"
)


class Passage(NamedTuple):
    """The characters [char_start, char_end) of a document, `text`. `score` is BM25's: higher is better."""

    doc_id: str
    char_start: int
    char_end: int
    score: float
    text: str


# Words are compared by their stems and without accents. Where no space ends a word, any three characters are one.
TABLES = {"words": "porter unicode61 categories 'L* N* Co M*'", "letters": "trigram"}
COLUMNS = "file UNINDEXED, number UNINDEXED, doc_id UNINDEXED, char_start UNINDEXED, char_end UNINDEXED, text"
MARK = 0x6C6E7001  # in the file's header: "lnp" and the version of the tables and of the cut


class PassageIndex:
    """An index of passages in memory, or in the file `path`, which is made if it is not there.

    Raises ConfigError for a file that is no such index, and for a Python whose SQLite has no full-text search.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path, self._numbers = (
            path or ":memory:",
            count(),
        )  # in the order in which passages are added
        self._places = dict[str, int]()  # of each file among the inputs
        if self._run("PRAGMA application_id") == [(MARK,)]:
            return
        if self._run("SELECT 1 FROM sqlite_master"):
            raise ConfigError(
                f"{path}: a database, but no index of this version: name another file"
            )
        tables = (
            f'{name} USING fts5({COLUMNS}, tokenize="{words}")' for name, words in TABLES.items()
        )
        made = (f"CREATE VIRTUAL TABLE {table}" for table in tables)
        for query in (
            "BEGIN",
            "CREATE TABLE files (file, digest)",
            *made,
            f"PRAGMA application_id = {MARK}",
            "COMMIT",
        ):
            self._run(query)

    @cached_property
    def _base(self) -> sqlite3.Connection:
        base = sqlite3.connect(self._path, isolation_level=None)
        base.create_function("place", 1, self._places.get)
        return base

    def _run(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._base.execute(query, values).fetchall()
        except sqlite3.Error as error:
            lacks = (
                "; ask needs FTS5 and trigram, which this Python's SQLite lacks"
                if "no such" in str(error)
                else ""
            )
            raise ConfigError(
                f"{self._path}: {error} (SQLite {sqlite3.sqlite_version}{lacks})"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def update(
        self,
        inputs: Inputs,
        on_bytes: Callable[[int], None] = lambda size: None,
        on_skip: OnSkip | None = None,
    ) -> None:
        """Let the index hold the passages of the inputs' texts, and no others. A file that it knows is not read again.

        `on_bytes` gets the size of each new passage, `on_skip` what cannot be read, if the inputs have `skip_bad`.
        Raises as `Inputs` does; the index is then as it was.
        """
        known = dict(self._run("SELECT file, digest FROM files"))

        def read(opened: Text | Table, types: Any) -> Iterable[Any]:
            file, digest = documents.opened[-1]
            stamp = f"{digest} {inputs.wanted}"
            if digest and known.get(file) == stamp:
                return ()
            self._forget({file} & known.keys())
            self._run("INSERT INTO files VALUES (?, ?)", (file, stamp))
            return inputs.items(opened, form="text")

        documents = DocumentPass(inputs, read, digests=True)
        self._run("BEGIN")  # what is not committed is undone when the file is closed
        for text in documents:
            if isinstance(text, Unread) and on_skip:
                on_skip(text, text.error)
            else:
                self.add(text, documents.opened[-1][0], on_bytes)
        self._places.update({file: place for place, (file, _) in enumerate(documents.opened)})
        self._forget(known.keys() - self._places.keys())
        self._run("COMMIT")

    def add(
        self, text: Text, file: str = "", on_bytes: Callable[[int], None] = lambda size: None
    ) -> None:
        """Add the passages of a text, which is in a `file` of the inputs. `on_bytes` gets the size of each."""
        end = 0
        for piece in cut(text.parts, "passage"):
            end, passage = end + len(piece), piece.strip()
            start = end - len(piece.lstrip())
            table = "letters" if UNSPACED.search(passage) else "words"
            row = (file, next(self._numbers), text.doc_id, start, start + len(passage), passage)
            self._run(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?)", row)
            on_bytes(len(piece.encode()))

    def _forget(self, files: Iterable[str]) -> None:
        for file in files:
            for table in (*TABLES, "files"):
                self._run(f"DELETE FROM {table} WHERE file = ?", [file])

    def find(self, question: str, most: int) -> list[Passage]:
        """Return the best passages that have a word of the question, `most` at most, in the order of the texts."""
        if most < 1:
            raise ConfigError(f"the passages must be 1 or more, not {most}")
        words = "".join(
            sign if unicodedata.category(sign)[0] in "LNM" else " " for sign in question
        ).split()
        runs = [
            run[at : at + 3] for run in UNSPACED.findall(question) for at in range(len(run) - 2)
        ]
        found = list[tuple[Any, ...]]()
        for table, asked in (("words", words), ("letters", words + runs)):
            match = " OR ".join(f'"{word}"' for word in dict.fromkeys(asked))
            query = f"SELECT doc_id, char_start, char_end, -rank, text, place(file), number FROM {table}"
            query += f" WHERE {table} MATCH ? ORDER BY rank, place(file), number LIMIT ?"
            found += self._run(query, (match, most)) if match else ()
        best = sorted(found, key=lambda row: (-row[3], row[5:]))[:most]
        return [Passage(*row[:5]) for row in sorted(best, key=lambda row: row[5:])]
