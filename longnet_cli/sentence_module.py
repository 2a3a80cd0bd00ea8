"""A Hugging Face model that was trained by contrast, in sentence-transformers, which reads texts as `encode` does.

    model = SentenceTransformer("./runs/embedder", trust_remote_code=True)
    model.encode_query(["train by contrast"])

sentence-transformers' own modules would pool the token that starts a document, or leave it out.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents import Document
from longnet_cli.jobs.encoding import EncodeOptions, encode
from longnet_cli.models.folder import ModelFolder


class TextVectors(InputModule):
    """The model in a folder, and its tokenizer. It is not trained here; a document may be longer than memory.

    Texts are cut to `max_seq_length` tokens, if it is not None.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.max_seq_length: int | None = None
        self.folder = ModelFolder(Path(folder))
        self.net, words, embedder = self.folder.net(), self.folder.tokenizer(), self.folder.embedder
        if words is None:
            raise ConfigError(f"{folder} has no tokenizer")
        self.words = words
        self.options = EncodeOptions(bos=self.folder.bos(self.words), pool=embedder.pool if embedder else "mean")

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Return the ids (B, N) of texts, each after the prompt, padded on the right, and their `lengths` (B,)."""
        before = self.words.encode(prompt or "")
        ids = [
            torch.from_numpy(np.concatenate((before, self.words.encode(text)))[: self.max_seq_length])
            for text in inputs
        ]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": padded, "lengths": torch.tensor([len(each) for each in ids])}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Add `sentence_embedding` (B, dim): vectors of length 1, without a gradient; zeros for an empty text."""
        ids: Tensor = features["input_ids"].cpu()
        lengths = features["lengths"].tolist()
        documents = [Document(str(i), ids[i, :n].numpy(), None, "text") for i, n in enumerate(lengths)]
        found = torch.zeros(len(ids), self.net.config.dim)
        if any(lengths):
            for batch in encode(self.net, documents, self.options):
                vectors = batch["embedding"].flatten().to_numpy().reshape(batch.num_rows, -1)
                found[[int(name) for name in batch["doc_id"].to_pylist()]] = torch.from_numpy(vectors.copy())
        return features | {"sentence_embedding": found.to(next(self.net.parameters()).device)}

    def get_embedding_dimension(self) -> int:
        return self.net.config.dim

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Copy the model's files."""
        for path in self.folder.path.iterdir():
            if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
                shutil.copyfile(path, Path(output_path) / path.name)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **options: Any) -> TextVectors:
        return cls(model_name_or_path)
