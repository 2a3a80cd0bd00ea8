"""Data in and out, in three folders, in the order in which it flows: files, documents, outputs. No torch here."""
