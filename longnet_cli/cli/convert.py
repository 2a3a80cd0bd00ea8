"""`longnet convert`: a model of another format, or with weights of another type, turned into an ordinary folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from longnet_cli.cli.options import OUTPUT, QuietOption, UpdateOption, option, size_option, sizes_option
from longnet_cli.cli.output import tell
from longnet_cli.cli.starting import ask_hub

OFFICIAL = "Official checkpoints"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Read this GGUF file (the format of llama.cpp), this checkpoint of an official LongNet "
            "(slide_encoder.pth, safetensors), or this LongNet, by name or folder. ORG/NAME:FILE.gguf and ORG/NAME are "
            "on the Hugging Face hub.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        option(OUTPUT, "--output -o", "DIR", "Write the model and its tokenizer to this new folder."),
    ],
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        option(
            OUTPUT,
            "--dtype",
            "auto|fp32|bf16|fp16",
            "Write weights of this type; fp32 holds exactly what the file says.",
            "the file's own, bf16 if quantized; required for a LongNet",
        ),
    ] = "auto",
    heads: Annotated[
        int | None, size_option(OFFICIAL, "--heads", "Set the heads.", "the official model's", metavar="N")
    ] = None,
    segment_lengths: Annotated[
        Sequence[int] | None,
        sizes_option(OFFICIAL, "--segment-lengths", "List the segment lengths.", "the official model's"),
    ] = None,
    dilation_rates: Annotated[
        Sequence[int] | None,
        sizes_option(OFFICIAL, "--dilation-rates", "Set one rate per segment length.", "the official model's"),
    ] = None,
    padding: Annotated[
        Literal["zero_key", "exact"] | None,
        option(
            OFFICIAL,
            "--padding",
            "zero_key|exact",
            "Fill ragged segments of an encoder with keys of zeros, as in its training, or not (exact).",
            "zero_key",
        ),
    ] = None,
    update: UpdateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a GGUF file into a Hugging Face folder, an official checkpoint into a LongNet, or change a LongNet's type.

    A checkpoint is Prov-GigaPath's slide encoder, a LongNet of torchscale, or the encoder of a LongViT.
    A file is recognized by its content. Quantized weights become plain numbers. GGUF needs the extra `gguf`.
    """
    from longnet_cli.jobs.converting import convert as run

    if update:
        ask_hub(source, None)
    given = {"heads": heads, "segment_lengths": segment_lengths, "dilation_rates": dilation_rates, "padding": padding}
    what = run(source, output, dtype, **given)
    tell(f"{source}: {what} -> {output}", quiet)
