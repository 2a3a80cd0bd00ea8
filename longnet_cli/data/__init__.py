"""Data in and out, in the order in which it flows. No torch here.

find     names, folders, remote               the files that an input names, or of a share: machine_shares
open     files, kinds, formats                a text or a table: arrow, jsonlines, hdf5; both, tables
read     inputs                               documents: columns, token_columns, documents, vectors
tokens   tokenizer, text_pieces               ids of a text; of messages: chat
write    outputs, shards, manifest            rows to a file, a folder or a pipe
"""
