"""The job `convert`: it writes a model of another kind, or with weights of another type, as an ordinary folder."""

from pathlib import Path
from typing import Any

from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.errors import CheckpointError, ConfigError, refuse_web_address
from longnet_cli.basics.events import Events
from longnet_cli.basics.model_files import BESIDE_TOKENIZER, CONFIG, TOKENIZER, copy_files
from longnet_cli.hub.model_names import find_model, list_models, name_origin
from longnet_cli.models.folder import ModelFolder, is_gguf
from longnet_cli.models.official import Given, convert_official, is_checkpoint
from longnet_cli.nets.weights import check_finite
from longnet_cli.running.device import DTYPES


def convert(
    source: str | Path,
    output: str | Path,
    dtype: str = "auto",
    events: Events = Events(),  # noqa: B008
    **values: Any,
) -> str:
    """Write the model `source` to the new folder `output`. Return a few words about what was done.

    `source` is a GGUF file, a checkpoint of the official implementation, or the name or folder of a LongNet, whose
    weights are converted to another type. A GGUF file or a LongNet on a hub is named as in --model, and config.json
    then has its commit (`_name_or_path`). `values` are those that a checkpoint lacks, as in `official.Given`.
    `dtype` is fp32, bf16, fp16 or auto. auto keeps the file's own type, or takes bf16 if the weights are quantized.
    `events.progress` gets the percents of a GGUF file that are unpacked.
    Raises CheckpointError for a damaged file or a file of an unknown kind, ConfigError for a folder that is in use, for
    missing libraries, for `values` for any other kind of model, and for a LongNet without a `dtype`.
    """
    refuse_web_address(str(source))
    path = Path(source)
    origin = str(source)
    if "/" in origin and not path.exists():
        path, origin = find_model(origin)
    if is_checkpoint(path):
        return convert_official(path, Path(output), DTYPES.get(dtype), Given(**values))
    options = [f"--{name}" for name, value in values.items() if value is not None]
    if options:
        names = ", ".join(options).replace("_", "-")
        raise ConfigError(
            f"{source}: {names}: only for a checkpoint of the official implementation"
        )
    if path.is_dir() or str(source) in list_models():
        return _with_weights_of(ModelFolder.find(origin), Path(output), dtype)
    if is_gguf(path):
        from longnet_cli.models.gguf import convert_gguf

        return convert_gguf(path, Path(output), DTYPES.get(dtype), origin, events.progress)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    raise CheckpointError(
        f"{path}: by its first bytes neither a GGUF file nor a checkpoint (PyTorch, safetensors)"
    )


def _with_weights_of(model: ModelFolder, output: Path, dtype: str) -> str:
    """Write a copy of a LongNet with weights of type `dtype`. Return a few words about it."""
    folder = model.path
    if model.of_transformers:
        raise ConfigError(
            f"{folder}: already a Hugging Face model folder, which transformers loads. If it has a pattern, "
            "import longnet_cli.integrations.transformers first; its use_own_attention(model) takes the pattern away"
        )
    if dtype not in DTYPES:
        raise ConfigError(
            f"{folder}: give the type to convert the weights to: --dtype bf16 halves the size"
        )
    net = model.native().from_pretrained(folder, dtype=DTYPES[dtype])
    tokenizer = folder / TOKENIZER
    with whole_folder(output, CONFIG, new=True) as place:
        check_finite(net.state_dict(), f"{folder} as {dtype}")
        texts = (tokenizer.read_text(encoding="utf-8"), model.eos) if tokenizer.is_file() else ()
        net.save_pretrained(place, *texts)
        name_origin(place, model.origin)
        copy_files(folder, place, BESIDE_TOKENIZER)
    return f"a LongNet of {net.config.num_parameters():,} parameters, as {str(DTYPES[dtype]).removeprefix('torch.')}"
