"""Data in and out, in the order in which it flows. No torch here.

find     input_files, folder_files, remote    the files that an input names; file_kinds; machine_shares
open     opening, opened_inputs               a text or a table: arrow, jsonlines, hdf5; local_files
read     input_documents, column_documents    the documents of columns, by column_choice: token_documents, vectors
tokens   tokenizer, text_pieces               ids of a text; of messages: chat
write    row_writer, shards, manifest         rows to a file, a folder or a pipe, by output_paths
"""
