"""Data in and out, in the order in which it flows. No torch here.

find     names, folders, remote               the files that an input names
open     files, compressed, formats           a text or a table: arrow, jsonlines, hdf5, Parquet; any of these, tables
read     inputs                               documents: columns, token_columns, documents, vectors; kept
tokens   tokenizer, chat, rendering           ids of a text or of messages
train    windows                              windows of many documents, pairs of spans
write    outputs, shards, manifest            rows to a file, a folder or a pipe; overwriting says what they may replace
"""
