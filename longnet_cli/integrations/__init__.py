"""Import paths that stand in users' files: for transformers (the code is in `models.hf`), for Prov-GigaPath."""
