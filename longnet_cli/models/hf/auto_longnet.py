"""A LongNet as a model of Hugging Face transformers, for the folders that `longnet train` and `save_pretrained` write.

    import longnet_cli.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("./my-model")
    model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=20)

The classes hold a LongNet's own layers under its own names, so both libraries read the same file of weights: a
Trainer's checkpoint is a model of `longnet`, and the other way round. Missing weights are an error.

B batch, N new tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)
from transformers.utils import can_return_tuple

from longnet_cli.basics.configuration import only_keys, without_keys
from longnet_cli.basics.model_files import MODEL_TYPE
from longnet_cli.models.hf.longnet_cache import (
    ARGUMENT,
    AlignedRows,
    LongNetCache,
    by_rows,
    columns_of,
)
from longnet_cli.nets.config import LongNetConfig, parse_config
from longnet_cli.nets.longnet import Layer, LongNet
from longnet_cli.nets.weights import (
    TRANSFORMERS_KEYS,
    own_keys,
    refuse_differences,
    save_pretrained,
)
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.reader import default_chunk


class LongNetHFConfig(hf.PretrainedConfig):
    """A LongNet's config.json for transformers: the fields of `LongNetConfig` as attributes, with the same checks.

    Raises ConfigError for an unknown key, or a value that a LongNet cannot have.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (Trainer adds a list)
    attribute_map = {  # noqa: RUF012 (transformers declares it)
        "hidden_size": "dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "ffn_dim",
        "tie_word_embeddings": "tie_embeddings",
    }
    use_cache = None  # `forward` makes a cache if it is asked to, and `generate` always
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it: a folder has no code of its own

    def __init__(self, **settings: Any) -> None:
        settings = {self.attribute_map.get(key, key): value for key, value in settings.items()}
        longnet = parse_config(
            own_keys(settings), str(settings.get("name_or_path") or "config.json")
        )
        super().__init__(**only_keys(settings, TRANSFORMERS_KEYS))
        for name, value in longnet:
            setattr(self, name, value)
        if "use_cache" in settings:
            self.use_cache = settings["use_cache"]

    @property
    def longnet(self) -> LongNetConfig:
        """The same settings as a `LongNetConfig`."""
        return LongNetConfig.model_validate(self, from_attributes=True)

    def to_dict(self) -> dict[str, Any]:
        """Return a LongNet's keys as `LongNet` writes them, and those of transformers, for tools like peft."""
        foreign = without_keys(super().to_dict(), LongNetConfig.model_fields)
        aliases = {alias: getattr(self, alias) for alias in self.attribute_map}
        return json.loads(self.longnet.model_dump_json()) | foreign | aliases

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content of config.json, where each setting stands once."""
        return without_keys(super().to_diff_dict(), self.attribute_map)


_OUTPUT = "output.weight"


class LongNetLayer(GradientCheckpointingLayer, Layer):
    """A layer whose activations transformers can have computed again (`gradient_checkpointing_enable`)."""


class _NetForTransformers(LongNet):
    layer_kind = LongNetLayer


class LongNetPreTrainedModel(hf.PreTrainedModel):
    """A LongNet's layers in a module of transformers; `net` is a LongNet that shares them."""

    config_class = LongNetHFConfig
    base_model_prefix = "longnet"
    _input_embed_layer = "embedding"
    supports_gradient_checkpointing = True
    _no_split_modules = ("LongNetLayer",)

    def __init__(self, config: LongNetHFConfig, net: LongNet | None = None) -> None:
        super().__init__(config)
        net = net or _NetForTransformers(config.longnet)
        self._modules = net._modules  # what a tool puts in a child's place is the net's as well
        self.__dict__["net"] = net  # not a submodule: its layers are already this module's
        for module in self.modules():
            # the LongNet did it; transformers would draw other weights
            module._is_hf_initialized = True
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load a model as transformers does. Raises CheckpointError for missing or unexpected weights."""
        model, report = super().from_pretrained(*args, output_loading_info=True, **options)
        refuse_differences(model.name_or_path, report["missing_keys"], report["unexpected_keys"])
        return (model, report) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the folder that `LongNet.save_pretrained` writes, with one file of weights, in the main process only.

        Other `options` of transformers are ignored. Raises LongNetError if the folder cannot be written.
        """
        if not is_main_process:
            return
        state = dict(self.state_dict() if state_dict is None else state_dict)
        if self.config.tie_embeddings and _OUTPUT in state:
            output = state.pop(_OUTPUT)
            if not torch.equal(output, state["embedding.weight"]):  # a tool has changed one of them
                self.config.tie_embeddings = False
                state[_OUTPUT] = output
        self.net.config = self.config.longnet  # a vocabulary may have been resized
        foreign = only_keys(self.config.to_diff_dict(), TRANSFORMERS_KEYS - {"architectures"})
        save_pretrained(self.net, save_directory, state_dict=state, foreign=foreign)
        if self.can_generate():
            self.generation_config.save_pretrained(save_directory)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.net.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output matrix; a model without logits has None if it is tied to the embedding table."""
        return self.net.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.net.output = value

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the LongNet has drawn all weights."""

    def _hidden(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: Any,
        asked: dict[str, Any],
    ) -> Tensor:
        """Return hidden states (B, N, dim) after the final norm, of ids (B, N) or vectors (B, N, dim) after `cache`.

        Hidden states at padding have no meaning. Raises ValueError for inputs or outputs that a LongNet does not have.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if asked.get(name, getattr(self.config, name)):
                raise ValueError(f"a LongNet gives its last hidden states alone: no {name}")
        kind, given = ("embeddings", inputs_embeds) if input_ids is None else ("tokens", input_ids)
        if given is None:
            raise ValueError("give either input_ids or inputs_embeds")
        new = given.shape[1]

        def hidden_of(rows: AlignedRows) -> Tensor:
            read: dict[str, Any] = {kind: rows.of(given)[:, rows.skip :]}
            if cache is not None:
                part = cache.part(rows, self.net.config.pattern)
                read["far"] = part.provider(read.get("tokens"))
            return self.net(**read, start=rows.start, lengths=rows.lengths)

        def zeros() -> Tensor:
            return self.net.embed(input_ids, inputs_embeds) * 0

        if cache is None:
            columns = _columns(attention_mask, position_ids, new)
            return by_rows(columns, 0, given.shape, hidden_of, zeros)
        before = cache.get_seq_length()
        cache.expect(given.shape[0])
        columns = _columns(attention_mask, position_ids, before + new)
        hidden = by_rows(columns, before, given.shape, hidden_of, zeros)
        cache.advance(new)
        return hidden

    def _cache(self, use_cache: bool | None, cache: Any, older: Any) -> Any:
        """Return the given cache, under its newer or older name, or a new one if `use_cache` or the config asks for it.

        Layers that are computed again in the backward pass would add their keys twice: they get none.
        """
        if cache is None:
            cache = older
        if cache is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            again = torch.is_grad_enabled() and self.training and self.is_gradient_checkpointing
            makes_one = wanted and self.config.causal and not again
            return LongNetCache(self.config) if makes_one else None
        if not self.config.causal:
            raise ValueError("a bidirectional LongNet reads a text at once: it has no cache")
        if not isinstance(cache, LongNetCache):
            raise ValueError(
                "a LongNet remembers in a LongNetCache(model.config): it takes no other cache"
            )
        return cache


class LongNetModel(LongNetPreTrainedModel):
    """A LongNet with hidden states, for `AutoModel`; `embed` returns vectors of texts, for sentence-transformers."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **asked: Any,
    ) -> Any:
        """Return hidden states (B, N, dim) after the final norm."""
        cache = self._cache(use_cache, cache, past_key_values)
        hidden = self._hidden(input_ids, attention_mask, position_ids, inputs_embeds, cache, asked)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{ARGUMENT: cache})

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return vectors (B, dim) of length 1 for texts, given as token ids (B, N), as `longnet encode` makes them.

        A vector is the normalized mean of the hidden states at a text's tokens. A causal net first reads the id that
        starts documents (`config.bos_token_id`), whose hidden state is the vector of an empty text. Without that id,
        its vector is zero. Without gradients, a causal net reads chunk by chunk.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.long()
        # padding goes to the right; a tokenizer returns numbers of float32 for texts without tokens
        order = (1 - mask).argsort(dim=1, stable=True)
        ids = input_ids.long().gather(1, order)
        wanted = mask.gather(1, order).bool()  # (B, N): whose hidden states are in the mean
        lengths = mask.sum(1)
        bos = getattr(self.config, "bos_token_id", None)
        if self.config.causal and bos is not None:
            ids = F.pad(ids, (1, 0), value=bos)
            wanted = torch.cat([lengths[:, None] == 0, wanted], 1)
            lengths = lengths + 1
        if not wanted.any():
            table = self.net.embedding.weight
            return table.new_zeros(len(ids), self.config.hidden_size)
        size = ids.shape[1]
        read: Callable[..., Tensor] = partial(self.net, lengths=lengths.tolist())
        if self.config.causal and not torch.is_grad_enabled():
            size = max(1, default_chunk(self.net.config, ids.device) // len(ids))
            read = CausalStream(self.net)
        total = torch.zeros((), dtype=torch.float64, device=ids.device)
        for part, counted in zip(ids.split(size, 1), wanted.split(size, 1), strict=True):
            hidden = read(part).masked_fill(~counted[..., None], 0)
            total = total + hidden.sum(1, dtype=torch.float64)
        counts = wanted.sum(1, keepdim=True).clamp(min=1)
        return F.normalize((total / counts).float(), dim=-1)


class _LongNetWithLogits(LongNetPreTrainedModel):
    """A LongNet with logits, whose class says whether it is `causal`."""

    causal: bool
    _tied_weights_keys = {_OUTPUT: "embedding.weight"}  # noqa: RUF012 (transformers declares it)

    def __init__(self, config: LongNetHFConfig) -> None:
        asked = type(self).__name__.replace("LongNet", "AutoModel")
        if not config.vocab_size:
            raise ValueError(f"this LongNet has no vocabulary: open it with AutoModel, not {asked}")
        if self.causal != config.causal:
            is_, needed = ("causal", "CausalLM") if config.causal else ("bidirectional", "MaskedLM")
            raise ValueError(
                f"this LongNet is {is_}: open it with AutoModelFor{needed}, not {asked}"
            )
        net = _NetForTransformers(config.longnet)
        # a tied matrix is a module as well, which tools hook, tie and replace
        if net.output is None:
            net.output = nn.Linear(config.dim, config.vocab_size, bias=False, device="meta")
        super().__init__(config, net)
        self.__dict__["longnet"] = LongNetModel(config, self.net)  # `base_model`, no submodule

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **asked: Any,
    ) -> Any:
        """Return logits (B, N, vocab_size), or only for the last `logits_to_keep` tokens if it is not 0.

        With `labels` (B, N), also return a loss: the mean over labels other than -100. A causal net's are shifted here.
        """
        cache = self._cache(use_cache, cache, past_key_values)
        hidden = self._hidden(input_ids, attention_mask, position_ids, inputs_embeds, cache, asked)
        if isinstance(logits_to_keep, int):
            kept = hidden[:, -logits_to_keep:]
        else:
            kept = hidden[:, logits_to_keep]
        logits = self.net.logits(kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **asked,
            )
        if not self.causal:
            return MaskedLMOutput(loss=loss, logits=logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{ARGUMENT: cache})


class LongNetForCausalLM(_LongNetWithLogits, hf.GenerationMixin):
    """A causal LongNet with logits of the next token, and with `generate()`, which uses a `LongNetCache`."""

    causal = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `forward` makes its own cache."""
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any) -> Any:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"a LongNet has a cache of its own: no cache_implementation={generation_config.cache_implementation!r}"
            )
        return super()._prepare_cache_for_generation(generation_config, *args)

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """Raise ValueError: the cache has no pages."""
        raise ValueError(
            "a LongNet does not generate by continuous batching (generate_batch): call generate() with a batch"
        )


class LongNetForMaskedLM(_LongNetWithLogits):
    """A bidirectional LongNet with logits of masked tokens."""

    causal = False


def _columns(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    columns: int,
) -> Tensor | None:
    """Return columns [first, stop) of each row's tokens (`columns_of`). Raises ValueError for masks of another kind."""
    if attention_mask is not None and tuple(attention_mask.shape[1:]) != (columns,):
        raise ValueError(
            f"attention_mask must say of all {columns} tokens so far which are padding, (batch, {columns}), not be of "
            f"shape {tuple(attention_mask.shape)}"
        )
    if position_ids is not None:
        restarts = position_ids.diff(dim=-1) != 1
        if attention_mask is not None:
            real = attention_mask[:, -position_ids.shape[-1] :].bool()
            restarts = restarts & real[:, 1:] & real[:, :-1]
        if restarts.any():
            raise ValueError(
                "a LongNet counts positions itself: position_ids that restart (packed texts) are refused"
            )
    return columns_of(attention_mask)


hf.AutoConfig.register(MODEL_TYPE, LongNetHFConfig)
hf.AutoModel.register(LongNetHFConfig, LongNetModel)
hf.AutoModelForCausalLM.register(LongNetHFConfig, LongNetForCausalLM)
hf.AutoModelForMaskedLM.register(LongNetHFConfig, LongNetForMaskedLM)
