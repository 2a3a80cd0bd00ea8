"""A Hugging Face text model as a net for the jobs: `score`, `train` and the others run it like a LongNet.

    net = ModelFolder.find("./my-llama").net(pattern=Pattern.pretrained())
    hidden = net(tokens, lengths=[1000, 700])

A causal decoder whose layers all take far keys streams as a LongNet does. A `CausalStream` gives it the far keys and
keeps only what later tokens can see; under dense attention, that is everything. A decoder with sliding-window layers,
or whose attention is not chosen by name, streams with a cache: a LongNetCache if it is dilated, otherwise the cache of
transformers, which grows with the document. Other models read a document in one forward pass: a bidirectional model
needs all of it at once.

If neither the folder nor the caller names a pattern, the model is dense, as it was trained, and reads no more tokens
than it was trained on.

Nothing is downloaded, no code of a folder is run, no pickle is read.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import SafetensorError
from torch import Tensor, nn

from longnet_cli.attention import Outside, Pattern
from longnet_cli.basics.configuration import as_list
from longnet_cli.basics.errors import CheckpointError, ConfigError, is_out_of_memory, one_line
from longnet_cli.basics.model_files import refuse_unreadable, weight_files
from longnet_cli.models.hf.attention import (
    ATTENTION_NAME,
    check_taken,
    pattern_of,
    use_dilated_attention,
    use_own_attention,
    write_pattern,
)
from longnet_cli.models.hf.longnet_cache import ARGUMENT, LongNetCache
from longnet_cli.models.hf.pretrained_folder import (
    ADAPTER,
    read_architecture,
    refusing_settings,
    write_folder,
)
from longnet_cli.models.hf.rotary import FLOAT32_POSITIONS, check_ropes, make_phases_exact
from longnet_cli.models.hf.training import State, add_lora, merged
from longnet_cli.models.hf.trying import (
    body,
    first_position,
    hidden_states,
    layer_kinds,
    layers_of,
    settings_of,
    why_not,
    without_cache,
)
from longnet_cli.nets.config import TransformersConfig
from longnet_cli.nets.net import FarProvider, Net, positions_of
from longnet_cli.nets.weights import check_finite, refuse_differences
from longnet_cli.running.causal_stream import LayerCaches, open_stream
from longnet_cli.running.device import trim_memory

_ENCODERS = {"mpnet"}  # which look in both directions, though their modules do not say so
_CACHED_LAYERS = {"full_attention", "sliding_attention"}
_GROWS = "it keeps all keys of a document, so that memory grows with it"
_NOTES = {
    "segments": "",
    "cache": f"{_GROWS}: not all of its layers take far keys",
    "none": "it reads each document in one forward, whatever --chunk",
}


class TransformersNet(Net):
    """A model of transformers behind LongNet's interface, in eval mode and with the attention that it has.

    `as_trained` limits it to sequences of the length that it was trained on. The model is tried here, once
    (`trying`): if its numbers in chunks are not those of one forward pass, it reads no chunks.
    Raises ConfigError for a model that is not a text Transformer, or that gives other numbers than transformers.
    """

    def __init__(self, model: hf.PreTrainedModel, *, as_trained: bool = False) -> None:
        super().__init__()
        self.model = model.eval()
        self.steps = nn.Sequential()  # after the pooling, for vectors: `add_steps`
        self.folder: Path | None = None  # where it was loaded from, with its tokenizer's files
        self._save_adapter: Callable[[Path, State], None] | None = None  # writes LoRA's adapter
        self.dilated = dilated = model.config._attn_implementation == ATTENTION_NAME
        self.config: TransformersConfig = _facts(model, dilated, as_trained)
        self._accepted = frozenset(inspect.signature(body(model).forward).parameters)
        self._update(memory=self._memory())
        if not make_phases_exact(model):
            most = min(self.config.max_tokens or FLOAT32_POSITIONS, FLOAT32_POSITIONS)
            self._update(max_tokens=most)
        wrong = self._try()
        self.note = ": ".join(filter(None, (wrong, _NOTES[self.config.memory])))
        # then the memory "cache" is a LongNetCache, which is bounded
        if dilated and self.config.streams:
            dense = self.config.pattern == Pattern.dense()
            self.note = _GROWS if dense else _too_wide(model, self.config.pattern)
        if as_trained and (limit := self.config.max_tokens):
            dense_up_to = (
                f"no pattern is given: dense attention as it was trained, on up to {limit} tokens"
            )
            self.note = dense_up_to if self.config.streams else f"{dense_up_to}; {self.note}"
            if not _positions(model):
                self.alternatives = _wider(limit)

    def _update(self, **facts: Any) -> None:
        """Replace some facts in the configuration."""
        self.config = self.config.model_copy(update=facts)

    def _memory(self) -> str:
        """Return the kind of memory that a sequence has between its chunks, by the layers and the arguments."""
        if not self.config.causal:
            return "none"
        if self.dilated and "position_ids" in self._accepted and self._far_keys_reach_every_layer():
            return "segments"
        cached = layer_kinds(self.model.config) <= _CACHED_LAYERS
        return "cache" if cached and ARGUMENT in self._accepted else "none"

    def stream(self) -> Callable[..., Tensor] | None:
        """Return a stream that uses a DynamicCache or a LongNetCache if `config.memory` is "cache", otherwise None."""
        if self.config.memory != "cache":
            return None
        config = self.model.config
        cache = LongNetCache(config) if self.dilated else hf.DynamicCache(config=config)
        options = {ARGUMENT: cache, "use_cache": True}

        @torch.no_grad()
        def read(tokens: Tensor) -> Tensor:
            return body(self.model)(input_ids=tokens, **options).last_hidden_state

        return read

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        start: int = 0,
        lengths: Sequence[int] | None = None,
        documents: Sequence[int] | None = None,
        far: FarProvider | None = None,
    ) -> Tensor:
        """Return hidden states (B, N, dim) after the final norm, of ids (B, N) or vectors (B, N, dim) in their place.

        The arguments are as in `LongNet.forward`. `far` and `documents` work only if far keys reach all layers.
        """
        kind, inputs = (
            ("input_ids", tokens) if embeddings is None else ("inputs_embeds", embeddings)
        )
        assert inputs is not None
        # transformers runs no model without tokens: on a rank that has none, one goes along, outside attention
        tokens_given = inputs.shape[1]
        if not tokens_given:
            inputs = inputs.new_zeros(inputs.shape[0], 1, *inputs.shape[2:])
            documents = None
        options: dict[str, Any] = {kind: inputs}
        if lengths is not None and not self.config.causal:
            # a causal net does not see padding on the right
            places = torch.arange(inputs.shape[1], device=inputs.device)
            stops = torch.tensor(lengths, device=inputs.device)
            options["attention_mask"] = (places < stops[:, None]).long()
        if far is not None:
            options |= {"start": start, "far": far, "empty": not tokens_given}
        # with a mask: transformers would make one of positions that restart
        if documents is not None:
            options |= {
                "documents": documents,
                "attention_mask": inputs.new_ones(inputs.shape[:2], dtype=torch.int64),
            }
        if far is not None or documents is not None:
            positions = positions_of(documents or [inputs.shape[1]], start, inputs.device)
            options["position_ids"] = positions[None] + first_position(self.model)
        return hidden_states(self.model, **options)[:, :tokens_given]

    def add_steps(self, steps: Sequence[nn.Module]) -> None:
        """Let `head` end with these modules, in float32, which map pooled states (..., size) to vectors."""
        self.steps = nn.Sequential(*steps).to(next(self.parameters()).device)

    def head(self, pooled: Tensor) -> Tensor:
        return self.steps(pooled)

    def vector_size(self, size: int) -> int:
        try:
            return self.steps(torch.zeros(1, size, device=next(self.parameters()).device)).shape[-1]
        except RuntimeError:
            raise ConfigError(
                f"the pooling gives {size} numbers, which {self.steps[0]} does not take: leave out --pool"
            ) from None

    def logits(self, hidden: Tensor) -> Tensor:
        output = self.model.get_output_embeddings()
        name = type(self.model).__name__
        if output is None:
            raise ConfigError(f"{name} has no output layer: it cannot score tokens")
        if not self._plain_logits:
            raise ConfigError(
                f"{name} does more to its logits than multiply (soft capping, scales): it cannot score"
            )
        return output(hidden)

    @property
    def layer_modules(self) -> Sequence[nn.Module]:
        return [*layers_of(self.model, self.config.num_layers)]

    def check_trainable(self) -> None:
        """Raise ConfigError for a model through which the gradient of a long sequence cannot go.

        Call it before training starts: it runs the model in eval mode, to check the logits of the output layer.
        """
        name = type(self.model).__name__
        if not self.config.causal:
            raise ConfigError(f"{name} looks in both directions: only causal decoders are trained")
        if self.config.memory != "segments" or not self.layer_modules:
            raise ConfigError(f"{name} cannot be trained: not all of its layers take far keys")
        weight = next(self.parameters())
        self.logits(weight.new_zeros(1, self.config.dim))

    def add_lora(self, options: Mapping[str, Any]) -> None:
        """Add LoRA matrices and train only them, in place; `options` are the arguments of `training.add_lora`."""
        self._save_adapter = add_lora(self.model, **options)

    def save(
        self,
        folder: Path,
        tokenizer_json: str,
        state: Mapping[str, Tensor],
        eos: str = "",
    ) -> None:
        """Write a folder that transformers opens, with the pattern in config.json and the tokenizer's files.

        With LoRA, the weights are the merged ones, and the adapter is in a subfolder.
        """
        # tied ones once
        names = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        inner = {name: state[f"model.{name}"] for name in names if f"model.{name}" in state}
        if self._save_adapter:
            self._save_adapter(folder / ADAPTER, inner)
            # the merged weights are as large as the net, and larger
            trim_memory(next(self.parameters()).device)
        weights = merged(self.model, inner)
        write_folder(
            self.model,
            folder,
            weights,
            tokenizer_json,
            self.folder,
            dense=self.config.as_trained,
        )

    @cached_property
    def _plain_logits(self) -> bool:
        """True if the output layer alone makes the model's logits, tried on a few tokens."""
        ids = torch.arange(4, device=next(self.parameters()).device)[None] % self.config.vocab_size
        output = self.model.get_output_embeddings()
        with torch.no_grad():
            hidden = self(ids)
            size = hidden.shape[-1]
            if getattr(output, "in_features", size) != size:  # as Electra's can be
                return False
            logits = self.model(input_ids=ids, **without_cache(self.model)).logits
            return torch.allclose(output(hidden), logits, rtol=1e-5, atol=1e-6)

    def _try(self) -> str | None:
        """Return why this net reads no chunks, and let it read none; None if chunks are right, or there are none.

        Raises ConfigError if its own attention does not give transformers' numbers. (For a pattern,
        `use_dilated_attention` has tried.)
        """
        if not self.dilated and (wrong := why_not(self.model, "as it comes", self)):
            raise ConfigError(wrong)
        if not self.config.streams:
            return None
        form = "in chunks, with a pattern" if self.dilated else "in chunks"
        if wrong := why_not(self.model, form, self._in_chunks, self):
            self._update(memory="none")
        return wrong

    def _in_chunks(self, tokens: Tensor) -> Tensor:
        """Return the hidden states of tokens (B, N), which come in three chunks, the last token alone."""
        stream = open_stream(self)
        half = tokens.shape[1] // 2
        chunks = tokens.split([half, tokens.shape[1] - half - 1, 1], 1)
        return torch.cat([stream(chunk) for chunk in chunks], 1)

    @torch.no_grad()
    def _far_keys_reach_every_layer(self) -> bool:
        """Return whether all layers take far keys, tried on two tokens. Sliding windows and recurrence do not."""
        asked: list[int] = []
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(self.parameters()).device)

        def far(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
            asked.append(layer)
            # A cache for each call: a layer of DiffLlama attends twice.
            return LayerCaches(self.config.pattern).provider(tokens)(layer, q, k, v)

        self(tokens, far=far)
        check_taken(self.model)
        return asked == list(range(self.config.num_layers))


def load_transformers(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    pattern: Pattern | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    embeds: bool = False,
) -> TransformersNet:
    """Load the net of a folder that `save_pretrained` of transformers wrote: weights of type `dtype`, in eval mode.

    `settings` are the keys of its config.json. A model that `embeds` has the class of AutoModel, as in
    sentence-transformers: weights of heads are left out, and those of a pooler, which nothing reads, may be missing.

    Weights that are stored in that type are mapped from their files, not copied, and go from there to a GPU, tensor by
    tensor. Others are converted, tensor by tensor.

    `pattern` None takes the pattern in config.json (`dilated_attention`). If there is none, attention is dense, for no
    more tokens than the model was trained on. Dense attention is the model's own if its layers cannot take far keys;
    otherwise it is ours, with the same numbers. Raises ConfigError for an architecture that this version of
    transformers or dilated attention does not know, and for a folder that needs its own code; CheckpointError for
    missing or damaged weights.
    """
    hf.utils.logging.set_verbosity_error()  # stderr belongs to the command, whose errors are one line
    hf.utils.logging.disable_progress_bar()
    config, architecture = read_architecture(folder, settings, embeds)
    as_trained = _is_as_trained(config, pattern)
    model = _read_weights(folder, config, architecture, dtype, embeds).to(device)
    check_finite(dict(model.named_parameters()), str(folder))
    with refusing_settings(folder):
        if as_trained or pattern == Pattern.dense():
            net = _dense(model, as_trained)
        else:
            net = TransformersNet(use_dilated_attention(model, pattern))
    net.folder = folder
    return net


def _read_weights(
    folder: Path,
    config: Any,
    architecture: Any,
    dtype: torch.dtype,
    embeds: bool,
) -> hf.PreTrainedModel:
    """Return a model with the weights in a folder. Raises CheckpointError for missing or damaged ones."""
    for name in weight_files(folder):
        refuse_unreadable(folder / name)
    with refusing_settings(folder):
        try:
            model, report = architecture.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    _check_weights(folder, model, report, embeds)
    return model


def _check_weights(
    folder: Path,
    model: hf.PreTrainedModel,
    report: Mapping[str, Any],
    embeds: bool,
) -> None:
    """Raise CheckpointError for weights that are missing, unexpected or of another shape, by transformers' report."""
    missing = report["missing_keys"]
    surplus = report["unexpected_keys"]
    if embeds:
        # a pooler makes another output than the hidden states
        poolers = {name for name in missing if name.startswith("pooler.")}
        for name in poolers:  # instead of random numbers, which would be in the model's digest
            model.get_parameter(name).data.zero_()
        missing = missing - poolers
        surplus = ()
    refuse_differences(str(folder), missing, surplus, report["mismatched_keys"])


def read_facts(
    folder: Path,
    settings: Mapping[str, Any],
    pattern: Pattern | None = None,
    lora: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    embeds: bool = False,
) -> TransformersConfig:
    """Read the facts of the model in a folder, as `load_transformers` finds them, but not its weights.

    `trained` counts all parameters or, with `lora` (the arguments of `add_lora`), the parameters of LoRA's matrices
    beside frozen weights of type `dtype`.

    Only loading shows whether the layers take far keys. Here, `memory` says that they do if the model is causal.
    Raises ConfigError and CheckpointError as `load_transformers` does.
    """
    config, architecture = read_architecture(folder, settings, embeds)
    as_trained = _is_as_trained(config, pattern)
    with refusing_settings(folder), torch.device("meta"):
        if pattern is not None:
            write_pattern(config, pattern)
        model = architecture(config)
        facts = _facts(model, not as_trained, as_trained)
        if lora is not None:
            add_lora(model.to(dtype), **lora)
            trained = model.num_parameters(only_trainable=True)
            frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
            facts = facts.model_copy(update={"trained": trained, "frozen_bytes": frozen})
    return facts


def _is_as_trained(config: Any, pattern: Pattern | None) -> bool:
    """Return whether neither the caller nor the folder names a pattern."""
    return pattern is None and not getattr(config, "dilated_attention", None)


def _dense(model: hf.PreTrainedModel, as_trained: bool) -> TransformersNet:
    """Return a net with dense attention: ours if the net then streams, as that beats a cache; else the model's own."""
    try:
        net = TransformersNet(use_dilated_attention(model, Pattern.dense()), as_trained=as_trained)
        if net.config.memory == "segments":
            return net
    except (ConfigError, ValueError):  # its own attention supports more (soft capping)
        pass
    return TransformersNet(use_own_attention(model), as_trained=as_trained)


def _reach(pattern: Pattern) -> int:
    """Return how many tokens back a query sees at most in the first level, with the chosen blocks before it."""
    return (1 + pattern.look_backs[0]) * pattern.segment_lengths[0] + pattern.chosen_keys


def _too_wide(model: hf.PreTrainedModel, pattern: Pattern) -> str:
    """Return a warning if a pattern's first level shows distances that the model has never seen; otherwise nothing."""
    trained = getattr(model.config, "max_position_embeddings", None)
    if not trained or _reach(pattern) <= trained or _positions(model):
        return ""
    return (
        f"it reaches {_reach(pattern)} tokens back, and the model was trained on {trained}: "
        f"{_window_within(trained)} stays within"
    )


def _window_within(trained: int) -> str:
    """Return a pattern, as a text, that shows no distance which is not in `trained` tokens."""
    return f"window:{max(4, trained // 2)},sinks=4"


def _wider(trained: int) -> str:
    """Return the options with which a model that was trained on so many tokens reads more."""
    fits = trained >= _reach(Pattern.pretrained())
    window = "pretrained" if fits else _window_within(trained)
    finding = ""
    if trained >= _reach(Pattern.finding()):
        finding = ", --pattern finding (finds what was read long ago)"
    return f"--pattern {window} (a window and 4 sinks){finding} or --pattern dense (farther than trained)"


def _positions(model: hf.PreTrainedModel) -> int | None:
    """Return the size in tokens of a table of learned positions; None if positions are rotations, or there are none."""
    if getattr(model.config, "rope_parameters", None):
        return None
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit and limit - first_position(model)


def _facts(model: hf.PreTrainedModel, dilated: bool, as_trained: bool) -> TransformersConfig:
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{name} is an encoder-decoder: longnet takes decoders and encoders")
    directions = {
        module.is_causal for module in body(model).modules() if hasattr(module, "is_causal")
    }
    # such a setting makes a decoder look in both directions
    if getattr(config, "is_causal", config.model_type not in _ENCODERS) is False:
        directions = {False}
    dim = _setting(config, "hidden_size")
    num_layers = _setting(config, "num_hidden_layers")
    num_heads = _setting(config, "num_attention_heads")
    if (
        len(directions) != 1
        or None in (dim, num_layers, num_heads)
        or not isinstance(model.get_input_embeddings(), nn.Embedding)
    ):
        raise ConfigError(
            f"{name} is not a text Transformer with one kind of attention, causal or not"
        )
    check_ropes(model)
    causal = directions.pop()
    parameters = model.num_parameters()
    return TransformersConfig(
        vocab_size=model.get_input_embeddings().num_embeddings,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        kv_heads=_setting(config, "num_key_value_heads", num_heads),
        head_dim=_setting(config, "head_dim", dim // num_heads),
        ffn_dim=_setting(config, "intermediate_size", _setting(config, "n_inner", 4 * dim)),
        causal=causal,
        memory="segments" if causal else "none",
        max_tokens=_positions(model)
        or (getattr(config, "max_position_embeddings", None) if as_trained else None),
        as_trained=as_trained,
        pattern=pattern_of(config) if dilated else Pattern.dense(),
        parameters=parameters,
        trained=parameters,
        layer_weights=sum(
            p.numel() for p in layers_of(model, num_layers).parameters() if p.dim() >= 2
        ),
        source=json.dumps(settings_of(config)),
    )


def _setting(config: Any, name: str, default: int | None = None) -> Any:
    """Return a setting of a configuration, the largest one if each layer has its own, or the default for none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # how transformers says that layers differ
        value = [getattr(layer, name) for layer in config.per_layer_config]
    largest = max(as_list(value))
    return largest or default
