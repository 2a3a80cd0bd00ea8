"""Proves that a wrong configuration is refused in one line that says what to do, and a right one counts its weights."""

import json

import pytest
from pydantic import BaseModel, ConfigDict

from longnet_cli.attention import Pattern
from longnet_cli.basics.configuration import validate
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import LongNetConfig, parse_config

PAPER = {
    "vocab_size": 100277,
    "dim": 768,
    "num_layers": 12,
    "num_heads": 12,
    "ffn_dim": 3072,
    "segment_lengths": [2048, 4096, 8192, 16384, 32768],
    "dilation_rates": [1, 2, 4, 6, 12],
}
WITHOUT_LEVELS = {"segment_lengths": None, "dilation_rates": None}


def message(**changes: object) -> str:
    """The refusal of the paper's configuration with some keys changed; None removes one."""
    data = {key: value for key, value in (PAPER | changes).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "config.json")
    text = str(caught.value)
    assert text.startswith("config.json: ")
    assert "\n" not in text
    return text


def test_paper_configuration():
    config = parse_config(PAPER, "config.json")
    assert config.pattern == Pattern.paper()
    assert config.head_dim == 64
    # torchscale's base decoder body and its tied cl100k embedding (research/longnet.md 2)
    assert config.num_parameters() == 85_148_160 + 100_277 * 768
    assert parse_config(config.model_dump(mode="json"), "again") == config


def test_chosen_blocks_are_written_where_they_differ_from_the_defaults():
    data = {key: value for key, value in PAPER.items() if key not in WITHOUT_LEVELS} | {
        "position": "rope"
    }
    written = parse_config(data | {"pattern": "window:1Ki,chosen=16"}, "x").model_dump(mode="json")
    assert {key: written[key] for key in written if key.startswith("chosen")} == {"chosen": 16}
    config = parse_config(data | {"pattern": "window:1Ki,chosen=16x64,chosen_every=4"}, "x")
    written = config.model_dump(mode="json")
    assert (written["chosen"], written["chosen_block"], written["chosen_every"]) == (16, 64, 4)
    assert parse_config(written, "again") == config
    plain = parse_config(data | {"pattern": "window:1Ki"}, "x").model_dump(mode="json")
    assert not any(key.startswith("chosen") for key in plain)
    with pytest.raises(ConfigError, match="x: unknown key 'chosen_layers'"):
        parse_config(data | {"pattern": "window:1Ki,chosen=16", "chosen_layers": [1]}, "x")


def test_unknown_key_names_the_nearest():
    assert (
        message(num_layer=12) == "config.json: unknown key 'num_layer': did you mean 'num_layers'?"
    )
    # the misspelt key is also a missing one, which is not worth a second complaint
    assert message(num_layers=None, num_layer=12).count("num_layers") == 1
    assert message(zebra=1) == "config.json: unknown key 'zebra'"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"dim": None}, "missing key 'dim'"),
        ({"dim": "big"}, "dim: "),
        ({"dim": 770}, "dim 770 is not divisible by num_heads 12"),
        ({"kv_heads": 5}, "num_heads 12 is not divisible by kv_heads 5"),
        ({"ffn": "geglu"}, "ffn: "),
        (
            {"pattern": "window:1Ki,chosen=4x32", **WITHOUT_LEVELS},
            'position="xpos" has no look_back',
        ),
        (
            {
                "pattern": "window:1Ki,chosen=4x32",
                "causal": False,
                "position": "rope",
                **WITHOUT_LEVELS,
            },
            "is for",
        ),
        ({"num_heads": 256}, "even head size, got 3"),
        ({"num_layers": 0}, "num_layers: "),
        ({"position": "alibi"}, "position: "),
        ({"padding": "zero_key"}, "causal=false"),
        ({"causal": False}, 'use position="rope"'),
        ({"segment_lengths": [2048, 131072], "dilation_rates": [1, 4]}, 'use position="rope"'),
        (
            {"look_back": 1},
            'position="xpos" has no look_back: its keys are only seen from their own segment; use',
        ),
        (
            {"sinks": 4},
            'position="xpos" has no sinks: its keys are only seen from their own segment; use position="r',
        ),
        ({"look_back": [1, "x"]}, "look_back: must be one number, or one number per level"),
        (
            {"sinks": 4, "causal": False, "position": "rope", "padding": "zero_key"},
            'padding="zero_key" goes with no',
        ),
    ],
)
def test_refusals(changes, part):
    assert part in message(**changes)


def test_options_of_a_pattern_are_written_where_they_differ_from_the_papers():
    """A model without them has the config.json, and the digest of it, that it always had."""
    plain = parse_config(PAPER, "config.json")
    options = {"look_back", "overlap", "queries", "sinks", "kv_heads", "ffn", "bias"}
    assert not options & plain.model_dump().keys()
    assert plain.kv_heads == plain.num_heads
    assert parse_config(PAPER | {"kv_heads": 12}, "same") == plain
    assert "kv_heads" not in parse_config(PAPER | {"kv_heads": 12}, "same").model_dump()
    body = {"kv_heads": 4, "ffn": "swiglu", "bias": False}
    assert parse_config(PAPER | body, "other").model_dump().items() >= body.items()
    assert LongNetConfig(**PAPER | vars(plain.pattern)) == plain
    options = {"look_back": 1, "overlap": "once", "queries": "all", "sinks": 4}
    found = parse_config(
        PAPER | options | {"position": "rope", "dilation_rates": [1, 2, 4, 8, 16]}, "config.json"
    )
    assert found.pattern == Pattern(
        found.segment_lengths, found.dilation_rates, "modulo", 1, "once", "all", 4
    )
    assert found.model_dump(mode="json").items() >= options.items()
    assert parse_config(json.loads(found.model_dump_json()), "again") == found
    assert LongNetConfig(**found.model_dump() | vars(found.pattern)) == found


class Optimizer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lr: float
    betas: tuple[float, float] = (0.9, 0.98)


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid")
    optimizer: Optimizer | None = None
    stages: list[Optimizer] = []


def test_nested_models_have_dotted_names():
    assert validate(Recipe, {"optimizer": {"lr": 1e-3}}, "r").optimizer == Optimizer(lr=1e-3)
    for data, text in [
        (
            {"optimizer": {"lr": 1, "beta": 2}},
            "r: unknown key 'optimizer.beta': did you mean 'optimizer.betas'?",
        ),
        (
            {"stages": [{"lr": 1, "betaz": 2}]},
            "r: unknown key 'stages.0.betaz': did you mean 'stages.0.betas'?",
        ),
        ({"optimiser": {}}, "r: unknown key 'optimiser': did you mean 'optimizer'?"),
        ({"optimizer": {}}, "r: missing key 'optimizer.lr'"),
        ({"optimizer": {"lr": "fast"}}, "r: optimizer.lr: "),
        ([1], "r: expected keys and values, got [1]"),
    ]:
        with pytest.raises(ConfigError) as caught:
            validate(Recipe, data, "r")
        assert str(caught.value).startswith(text)
        assert "\n" not in str(caught.value)
