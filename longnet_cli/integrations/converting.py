"""A model's file of another kind, as an ordinary folder. A new kind is one more case in `convert`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from longnet_cli.errors import CheckpointError, refuse_web_address
from longnet_cli.presets import is_gguf
from longnet_cli.runtime.device import DTYPES


def convert(source: str | Path, output: str | Path, dtype: str = "auto") -> str:
    """Write the model in the file `source` to the new folder `output`, and say what was done in a few words.

    `dtype` is fp32, bf16, fp16 or auto: the file's own, bf16 where its weights are quantized. Raises CheckpointError
    for a file that is of no kind that is known, or damaged, ConfigError for a folder that is in use and for libraries
    that are missing.
    """
    refuse_web_address(str(source))
    path = Path(source)
    if is_gguf(path):
        from longnet_cli.integrations.gguf import convert_gguf

        return convert_gguf(path, Path(output), DTYPES.get(dtype))
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    raise CheckpointError(f"{path}: not a GGUF file, by its first bytes: no other kind is converted")


@contextmanager
def unpacked(model: Path, dtype: str) -> Iterator[Path]:
    """The folder of a model: `model` itself, or a temporary one for a file that is converted.

    What is mapped from a temporary folder stays readable when it is gone.
    """
    if model.is_dir():
        yield model
        return
    with TemporaryDirectory(prefix="longnet-") as place:
        folder = Path(place) / model.stem
        convert(model, folder, dtype)
        yield folder
