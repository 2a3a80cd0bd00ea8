"""The documents of columns of text and of chats."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from longnet_cli.data.columns import Columns, is_chat
from longnet_cli.data.documents import Unread
from longnet_cli.data.grouping import Label, group_rows, read_batches
from longnet_cli.data.tables import Table, Text
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError, RefusedError


def table_texts(table: Table, columns: Columns, tokenizer: Tokenizer | None, skip_bad: bool) -> Iterator[Text | Unread]:
    """Yield the documents of a column of text, or of chats as the tokenizer's template writes them.

    Raises ConfigError for chats without a tokenizer that has a template, DataError for rows that cannot be read; with
    `skip_bad`, such a row is Unread.
    """
    join = _chat_reader(table, columns, tokenizer) if is_chat(columns.type) else None

    def rows() -> Iterator[tuple[Label, Any]]:
        for batch in read_batches(table, columns, skip_bad):
            for index, value in enumerate(batch.column):
                yield batch.label(index), value.as_py()

    for group in group_rows(table, rows()):
        place, error, text, ids = table.place(group.row), group.error, "", None
        if error is None:
            try:
                text, ids = join(group.values) if join else ("".join(group.values), None)
            except RefusedError as refused:
                error = DataError(f"{place}: {refused}")
                if not skip_bad:
                    raise error from None
        yield Unread(error) if error else Text(group.doc_id, text, place, group.kept, ids=ids)


def _chat_reader(
    table: Table, columns: Columns, tokenizer: Tokenizer | None
) -> Callable[[Iterable[Any]], tuple[str, Callable[[], np.ndarray]]]:
    """Return a function from the rows of a chat to its text and a function that returns its ids."""
    if tokenizer is None or tokenizer.folder is None:
        raise ConfigError(
            f"{table.where}: {columns.documents!r} holds chats, which need the chat template of a tokenizer: give a "
            "folder with a tokenizer.json and its template (--tokenizer, or --model)"
        )
    from longnet_cli.data.chat import ChatTemplate  # imported late: it loads Jinja, which other data do not need

    template = ChatTemplate(tokenizer.folder, tokenizer)

    def read(rows: Iterable[Any]) -> tuple[str, Callable[[], np.ndarray]]:
        messages = [dict(message) for row in rows for message in row]
        return template.read_chat([{k: v for k, v in each.items() if isinstance(v, str)} for each in messages])

    return read
