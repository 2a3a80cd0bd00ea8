"""A writer for the folder of a Hugging Face model. Files get their names when all of them are complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import transformers as hf
from torch import Tensor

from longnet_cli.atomic import whole_folder
from longnet_cli.configuration import digest, parse, read_text
from longnet_cli.errors import CheckpointError, LongNetError
from longnet_cli.integrations.transformers_auto import from_file
from longnet_cli.model.foreign import MODULES, prompts_file
from longnet_cli.model.net import Embedder
from longnet_cli.shipped import BESIDE_TOKENIZER, POOL_KEY, PROMPTS

ADAPTER = "adapter"  # a subfolder: beside the model's files, transformers would take the model for an adapter
_VECTORS = "longnet_cli.sentence_module.TextVectors"
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"


def write_folder(
    model: hf.PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor],
    tokenizer_json: str,
    source: Path | None,
    *,
    dense: bool = False,
    embedder: Embedder | None = None,
) -> None:
    """Write config.json, model.safetensors with the weights `state`, and the tokenizer, to `folder`.

    `source` is the folder that the model came from. If its tokenizer is the same, the files beside it are copied too.
    `dense` leaves the pattern out of config.json. `embedder` says how to make vectors. Raises CheckpointError if the
    folder cannot be written.
    """
    try:
        with whole_folder(folder, last=_CONFIG) as made:
            model.save_pretrained(made, state_dict=dict(state), max_shard_size=1 << 62)
            settings = json.loads((made / _CONFIG).read_text(encoding="utf-8"))
            if dense:
                settings = from_file(settings)
                settings.pop("dilated_attention", None)
            if embedder:
                settings[POOL_KEY] = embedder.pool
                module = {"idx": 0, "name": "0", "path": "", "type": _VECTORS}
                for name, data in ((PROMPTS, prompts_file(embedder)), (MODULES, [module])):
                    (made / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            (made / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            (made / _TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
            if source and _same_tokenizer(source / _TOKENIZER, tokenizer_json):
                for name in (*BESIDE_TOKENIZER, _TOKENIZER):
                    if (source / name).is_file():
                        shutil.copyfile(source / name, made / name)
    except LongNetError as error:
        cause = getattr(error.__cause__, "strerror", None) or error.__cause__ or error
        raise CheckpointError(f"{folder}: cannot write the model: {cause}") from None


def _same_tokenizer(path: Path, text: str) -> bool:
    try:
        return digest(parse(read_text(path))) == digest(json.loads(text))
    except (OSError, ValueError):
        return False
