"""Data in and out, in the order in which it flows. No torch here.

find     names, folders, remote               the files that an input names
open     files, compressed, formats           text, or tables: arrow, jsonlines, hdf5, Parquet; `tables` is one
read     inputs                               documents: columns, token_columns, documents, vectors, kept, left_out
tokens   tokenizer, chat, rendering           text to token ids
train    windows                              windows and pairs of them
write    outputs, shards, manifest            and what an output may replace: overwriting

"""
