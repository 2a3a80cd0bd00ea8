"""Files that are read: what an input names, how each kind of file is opened, and which of its columns hold documents.

find     input_files, folder_files, remote    the files that an input names; file_kinds, manifest, machine_shares
open     opening, opened_inputs               a text or a table: arrow, jsonlines, hdf5; local_files
choose   column_choice                        the columns of a table that hold documents and their names
"""
