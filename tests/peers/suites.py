"""The tests that transformers has for every model, run on ours and on plain Llama: see run.py, which fetches them.

`REFUSED` says which of them must fail, and why: what docs/clients.md refuses, and what a test takes for granted.
"""

from __future__ import annotations

import unittest
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from peers_of_transformers.generation.test_utils import GenerationTesterMixin
from peers_of_transformers.test_configuration_common import ConfigTester
from peers_of_transformers.test_modeling_common import ModelTesterMixin
from peers_of_transformers.test_training_mixin import TrainingTesterMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from longnet_cli.attention import Pattern
from longnet_cli.basics.model_files import MODEL_TYPE
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.models.hf import auto_longnet

# The tests give labels to the classes that these tables name
MODEL_MAPPING_NAMES[MODEL_TYPE] = "LongNetModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = "LongNetForCausalLM"

BATCH, LENGTH, VOCABULARY = 2, 16, 99
LEVELS = {"segment_lengths": [4, 16], "dilation_rates": [1, 2], "look_back": 1, "overlap": "once"}


class Tester(SimpleNamespace):
    """What the tests ask about a model: `settings` of its configuration, and inputs whose first row is padded."""

    batch_size, seq_length, vocab_size, is_training = BATCH, LENGTH, VOCABULARY, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def get_config(self) -> hf.PretrainedConfig:
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[hf.PretrainedConfig, dict[str, Any]]:
        ids, mask = torch.randint(3, VOCABULARY, (BATCH, LENGTH)), torch.ones(BATCH, LENGTH)
        mask[0, :3] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask.long()}


class Common(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """The tests; a subclass says for which classes and settings."""

    model_tester: Any = None  # the mixin declares an abstract property
    config_class: Any = hf.LlamaConfig
    settings: dict[str, Any]

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = Tester(
            config_class=self.config_class,
            settings=self.settings,
            causal_lm_class=self.all_model_classes[-1],
            base_model_class=self.all_model_classes[0],
        )
        own = {name: x for name, x in self.settings.items() if name != "pad_token_id"}
        self.config_tester = ConfigTester(self, self.config_class, **own)


def _config_test(name: str) -> Any:
    return lambda self: getattr(self.config_tester, name)()


for _name in dir(ConfigTester):
    if _name.startswith(("check_", "create_and_test_")):
        setattr(Common, f"test_{_name}", _config_test(_name))

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
LONGNET = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "position": "rope",
    "pad_token_id": 0,
}


class PlainLlama(Common, unittest.TestCase):
    all_model_classes = (hf.LlamaModel, hf.LlamaForCausalLM)
    settings = LLAMA


def dilated(own: Any, pattern: Pattern) -> type:
    """Return a class whose models have the pattern, made from a configuration or from a folder."""

    class Dilated(own):
        def __init__(self, config: Any, *args: Any, **options: Any) -> None:
            super().__init__(config, *args, **options)
            if not self.get_input_embeddings().weight.is_meta:
                use_dilated_attention(self, pattern)

        @classmethod
        def from_pretrained(cls, *args: Any, **options: Any) -> Any:
            loaded = super().from_pretrained(*args, **options)
            use_dilated_attention(loaded[0] if isinstance(loaded, tuple) else loaded, pattern)
            return loaded

    Dilated.__name__ = own.__name__  # by which the tests know what a class is for
    return Dilated


def dilated_classes(pattern: Pattern) -> tuple[type, ...]:
    return tuple(dilated(own, pattern) for own in PlainLlama.all_model_classes)


class LlamaWithLevels(Common, unittest.TestCase):
    all_model_classes = dilated_classes(Pattern(**LEVELS))
    settings = LLAMA


class LlamaWithWindow(Common, unittest.TestCase):
    all_model_classes = dilated_classes(Pattern.window(4, sinks=2))
    settings = LLAMA


class OwnLongNet(Common, unittest.TestCase):
    all_model_classes = (auto_longnet.LongNetModel, auto_longnet.LongNetForCausalLM)
    config_class = auto_longnet.LongNetHFConfig
    settings = LONGNET | LEVELS


_ATTENTIONS = "attention weights are refused"
_OTHER = "eager and sdpa are dense, and no names for dilated attention"
_STATES = "hidden states of each layer, and attention weights, are refused"
_DILATED = {
    "attention_outputs|model_outputs_equivalence|capture_outputs": _ATTENTIONS,
    "retain_grad": _ATTENTIONS,
    "can_set_attention_dynamically|sdpa_can_dispatch|eager_matches_sdpa": _OTHER,
}

# Of each model: tests, by a regular expression, and why they must fail
REFUSED = {
    "LlamaWithLevels": _DILATED,
    "LlamaWithWindow": _DILATED
    | {
        "rope_scaling_from_config_.*dynamic": "sinks need positions that do not change with the length"
    },
    "OwnLongNet": {
        "hidden_states_output|attention_outputs|outputs_equivalence|retain_grad": _STATES,
        "batching_equivalence": _STATES,
        "config_arguments_init|can_be_init_without_params": "a LongNet has no size by default",
        "reload_no_missing": "missing weights are an error, also where a test expects a report",
        "correct_missing_keys": "the model below the output has all weights, also the output's",
    },
}
