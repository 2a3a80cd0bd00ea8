"""All keys of a recipe, as a recipe that can be copied: what `longnet train --recipe` prints."""

import json
import textwrap
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from longnet_cli.attention.notation import PATTERN_FIELDS
from longnet_cli.nets.config import LongNetConfig

from .recipe import LoraRecipe, PretrainedRecipe, Recipe

WIDTH = 78  # with "# ", a comment fits into 80 columns
HEADER = (
    "A recipe for `longnet train`. The sizes, the pattern, the position and the stages are an example. Each other key "
    "has its default."
)
PATTERN = FieldInfo(
    description="What each token attends to (docs/patterns.md). The fields of a pattern, as segment_lengths and "
    "dilation_rates, may stand here in place of it.",
    examples=['"256/1,1Ki/4,look_back=1,overlap=once,queries=all"'],
)


def recipe_keys() -> str:
    """Return TOML with every key of a recipe, under a comment that says what it means.

    A key that has no default, and may be left out, is a comment. So is the table `lora`, which is only for Hugging
    Face models.
    """
    fields = Recipe.model_fields
    lines = [*_comment(HEADER), ""]
    lines += _key("init", fields["init"])
    for name, field in fields.items():
        if isinstance(field.annotation, type(BaseModel)):  # the metaclass of models
            lines += ["", *_comment(field.description), f"[{name}]", *_keys(field.annotation)]
    lora = PretrainedRecipe.model_fields["lora"]
    keys = "\n".join(["[lora]", *_keys(LoraRecipe)])
    as_comments = textwrap.indent(keys, "# ", lambda line: not line.startswith("#"))
    lines += ["", *_comment(lora.description), as_comments]
    return "\n".join(lines) + "\n"


def _keys(table: type[BaseModel]) -> Iterator[str]:
    for name, field in table.model_fields.items():
        if table is LongNetConfig and name in PATTERN_FIELDS:
            continue
        yield from _key(name, field)
        if name == "ffn_dim":
            yield from _key("pattern", PATTERN)


def _key(name: str, field: FieldInfo) -> Iterator[str]:
    """Yield the comment of a key, and its line."""
    yield from _comment(field.description)
    value = field.examples[0] if field.examples else json.dumps(field.default)
    follows = name in ("vocab_size", "kv_heads")  # from the tokenizer, and from num_heads
    optional = field.default is None or follows
    yield f"# {name} = {value}" if optional else f"{name} = {value}"


def _comment(text: str | None) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text or "", WIDTH)]
