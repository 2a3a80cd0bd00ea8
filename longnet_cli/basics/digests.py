"""The digests that files of ours keep, SHA-256 in hex, by what they are of.

    of a file    `file_sha256`: in the manifests of checkpoints and states, in the card of a converted checkpoint
    of a model   `model_digest` (nets/weights.py), configuration and weights: in outputs, manifests and states;
                 `tensor_digest`, weights alone: in model.safetensors, and in a checkpoint for those not trained
    of a job     `json_sha256`, what decides its results: a tokenizer, a chat template, a configuration, a manifest;
                 what it reads, by sizes and some bytes, in data/documents/input_documents.py and
                 jobs/training/windows.py

Those of files and models stay what they are from release to release: other programs may have kept them. Those of a job
may change: a folder with an older one is refused in one line.
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(data: Any) -> str:
    """Return the SHA-256, in hex, of JSON data with sorted keys and no spaces. Equal data have equal digests."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
