"""`longnet convert`: a model of another format, or with weights of another type, turned into an ordinary folder."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Literal

from longnet_cli.basics.events import Events

from . import options as shared
from .options import OUTPUT, HelpPanel, argument
from .output import tell
from .progress import progress
from .starting import ask_hub

OFFICIAL = HelpPanel("Official checkpoints")


@dataclass(frozen=True)
class ConvertCommand:
    """The options of `convert`."""

    source: str = argument(
        "MODEL",
        "Read this GGUF file (the format of llama.cpp), this checkpoint of an official LongNet "
        "(slide_encoder.pth, safetensors), or this LongNet, by name or folder. ORG/NAME:FILE.gguf and "
        "ORG/NAME are on the Hugging Face hub.",
    )
    output: str = OUTPUT.option(
        "--output -o DIR",
        "Write the model and its tokenizer to this new folder.",
        default=MISSING,
    )
    dtype: str = OUTPUT.option(
        "--dtype auto|fp32|bf16|fp16",
        "Write weights of this type; fp32 holds exactly what the file says. (default: the file's own, bf16 if "
        "quantized; required for a LongNet)",
        default="auto",
    )
    heads: int | None = OFFICIAL.size("--heads N", "Set the heads. (default: the official model's)")
    segment_lengths: Sequence[int] | None = OFFICIAL.option(
        "--segment-lengths SIZE,...", "List the segment lengths. (default: the official model's)"
    )
    dilation_rates: Sequence[int] | None = OFFICIAL.option(
        "--dilation-rates SIZE,...",
        "Set one rate per segment length. (default: the official model's)",
    )
    padding: Literal["zero_key", "exact"] | None = OFFICIAL.option(
        "--padding zero_key|exact",
        "Fill ragged segments of an encoder with keys of zeros, as in its training, or not (exact). (default: "
        "zero_key)",
    )
    update: bool = shared.update_flag()
    quiet: bool = shared.quiet_flag()


def convert(options: ConvertCommand) -> None:
    """Turn a GGUF file into a Hugging Face folder, an official checkpoint into a LongNet, or change a LongNet's type.

    Example: longnet convert longnet-tiny -o tiny-bf16 --dtype bf16

    A checkpoint is Prov-GigaPath's slide encoder, or a LongNet of torchscale.
    A file is recognized by its content. Quantized weights become plain numbers. GGUF needs the extra `gguf`.
    """
    from longnet_cli.jobs.converting import convert as run

    source = options.source
    output = options.output
    if options.update:
        ask_hub(source, None)
    with progress("converting", total=100, unit="parts", every=5) as advance:
        what = run(
            source,
            output,
            options.dtype,
            Events(progress=advance),
            heads=options.heads,
            segment_lengths=options.segment_lengths,
            dilation_rates=options.dilation_rates,
            padding=options.padding,
        )
    tell(f"{source}: {what} -> {output}")
