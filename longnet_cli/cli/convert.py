"""`longnet convert`: a model of another kind, or with weights of another type, as an ordinary folder."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from longnet_cli.cli.options import OUTPUT, QuietOption, option
from longnet_cli.cli.output import printable


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Read this GGUF file (the format of llama.cpp), or this LongNet, by name or folder.",
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
            "the file's own, bf16 where it is quantized",
        ),
    ] = "auto",
    quiet: QuietOption = False,
) -> None:
    """Turn a GGUF file into a Hugging Face model folder, or change the number type of a LongNet.

    A file is recognized by its content. Quantized weights become plain numbers. GGUF needs the extra `gguf`.
    """
    from longnet_cli.integrations.converting import convert as run

    what = run(source, output, dtype)
    if not quiet and sys.stderr:
        print(printable(f"{source}: {what} -> {output}"), file=sys.stderr)
