"""The documents of columns of text and of chats."""

from collections.abc import Iterator

from longnet_cli.data.columns import Columns, is_chat
from longnet_cli.data.grouping import Label, group_rows, read_batches
from longnet_cli.data.tables import Table, Text
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError


def table_texts(table: Table, columns: Columns, tokenizer: Tokenizer | None, skip_bad: bool) -> Iterator[Text]:
    """Yield the documents of a column of text, or of chats as the tokenizer's template writes them.

    Raises ConfigError for chats without a tokenizer that has a template, DataError for rows that cannot be read; with
    `skip_bad`, such a row is a Text with that `error`.
    """
    if is_chat(columns.type):
        yield from _chats(table, columns, tokenizer, skip_bad)
        return

    def rows() -> Iterator[tuple[Label, str]]:
        for batch in read_batches(table, columns, skip_bad):
            for index, value in enumerate(batch.column):
                yield batch.label(index), value.as_py()

    for group in group_rows(table, rows()):
        text = "" if group.error else "".join(group.values)
        yield Text(group.doc_id, text, table.place(group.row), group.kept, group.error)


def _chats(table: Table, columns: Columns, tokenizer: Tokenizer | None, skip_bad: bool) -> Iterator[Text]:
    if tokenizer is None or tokenizer.folder is None:
        raise ConfigError(
            f"{table.where}: {columns.documents!r} holds chats, which need the chat template of a tokenizer: give a "
            "folder with a tokenizer.json and its template (--tokenizer, or --model)"
        )
    from longnet_cli.data.chat import ChatTemplate  # imported late: it loads Jinja, which other data do not need

    template = ChatTemplate(tokenizer.folder, tokenizer)

    def rows() -> Iterator[tuple[Label, list[dict[str, str]]]]:
        for batch in read_batches(table, columns, skip_bad):
            for index, value in enumerate(batch.column):
                messages = [dict(message) for message in value.as_py() or ()]
                yield batch.label(index), [{k: v for k, v in each.items() if isinstance(v, str)} for each in messages]

    for group in group_rows(table, rows()):
        place, error = table.place(group.row), group.error
        if error is None:
            try:
                text, ids = template.read_chat([message for messages in group.values for message in messages])
                yield Text(group.doc_id, text, place, group.kept, ids=ids)
                continue
            except ConfigError as refused:  # the template refuses these messages
                error = DataError(f"{place}: {refused}")
        if not skip_bad:
            raise error
        yield Text(group.doc_id, "", place, group.kept, error)
