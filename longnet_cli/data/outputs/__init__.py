"""Outputs: rows to a file, a folder of shards or a pipe (row_writer, shards); their names (output_paths)."""
