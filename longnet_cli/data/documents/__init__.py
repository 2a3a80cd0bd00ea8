"""Documents: what a row of the output is about, as ids of a tokenizer or as vectors.

read     input_documents, column_documents    the documents of files: token_documents, vectors
tokens   tokenizer, text_pieces               ids of a text; of messages: chat
find     passages                             passages of texts that have a question's words
"""
