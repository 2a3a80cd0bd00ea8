"""Every shipped recipe makes the model that it says: built on the meta device, counted, and held against the paper."""

from __future__ import annotations

import pytest
import torch

from longnet_cli.basics.errors import ConfigError
from longnet_cli.hub.model_names import preset_dir
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.recipe import Recipe, load_recipe
from longnet_cli.nets.longnet import LongNet

GPT3_VOCABULARY = 50257
# name: (the paper's size, its layers, hidden, heads, learning rate, tokens a batch, steps: its Tables 3 and 4)
PAPER = {
    "longnet-125m": (125e6, 12, 768, 12, 6e-4, 0.5e6, 300e3),
    "longnet-350m": (350e6, 24, 1024, 16, 6e-4, 0.5e6, 40e9 / 0.5e6),
    "longnet-760m": (760e6, 24, 1536, 16, 6e-4, 0.5e6, 40e9 / 0.5e6),
    "longnet-2.7b": (2.7e9, 32, 2560, 32, 2e-4, 4e6, 300e9 / 4e6),
}
NAMES = sorted(path.stem for path in preset_dir().glob("*.toml"))


def shipped(name: str) -> Recipe:
    own = {} if "vocab_size" in (preset_dir() / f"{name}.toml").read_text() else {"model.vocab_size": 4096}
    return load_recipe(name, own)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_and_counted(name: str) -> None:
    config = shipped(name).model
    with torch.device("meta"):
        model = LongNet(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters()
    # heads take turns at a rate's offsets: with fewer of them, some positions would take part in no such level
    assert max(config.dilation_rates) <= config.num_heads


@pytest.mark.parametrize("name", PAPER)
def test_it_is_the_papers(name: str) -> None:
    """Sizes in the paper are those of GPT-3's models, which have its vocabulary: with that, ours are within 3 %.

    Our own count has cl100k_base, the vocabulary that the paper says it used, so the size lies between those of the
    layers alone and of all.
    """
    size, num_layers, dim, num_heads, lr, batch, steps = PAPER[name]
    recipe = shipped(name)
    config = recipe.model
    assert (config.num_layers, config.dim, config.num_heads, config.ffn_dim) == (num_layers, dim, num_heads, 4 * dim)
    layers = config.num_parameters() - config.vocab_size * dim
    assert layers < size < config.num_parameters()
    assert layers + GPT3_VOCABULARY * dim == pytest.approx(size, rel=0.03)
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (lr, (0.9, 0.98), 0.01, 2.0)
    assert (schedule.warmup_steps, schedule.decay, config.dropout) == (750, "polynomial", 0)
    assert recipe.train.batch_tokens == pytest.approx(batch, rel=0.05)  # a power of two
    assert recipe.train.steps == pytest.approx(steps, rel=0.05)
    assert all(recipe.train.batch_tokens % stage.seq_len == 0 for stage in recipe.train.stages)


def test_a_level_costs_the_same_as_the_next_in_longnet_1m() -> None:
    config = shipped("longnet-1m").model
    assert [w / r**2 for w, r in config.pattern.levels] == [4096] * 3
    assert max(config.segment_lengths) == 2**20


def test_without_data_it_says_what_to_give(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no training data: give --data INPUT"):
        train(shipped("longnet-125m"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
