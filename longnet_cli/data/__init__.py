"""Data in and out: sources and sinks (Arrow, Parquet, text), the tokenizer, training windows. No torch here."""
