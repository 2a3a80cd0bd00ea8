"""Models of Hugging Face transformers, with dilated attention in place of their own."""
