"""Import and export of torchscale's LongNet weights: its state dicts have other names for the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from longnet_cli.errors import CheckpointError, ConfigError
from longnet_cli.model.config import LongNetConfig
from longnet_cli.model.longnet import LongNet
from longnet_cli.model.positions import XPOS_GAMMA
from longnet_cli.model.weights import NetT, list_names

_MODULES = {  # our name -> torchscale's, of a layer, then of the net
    "attention_norm": "self_attn_layer_norm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.inner_norm": "self_attn.inner_attn_ln",
    "attention.out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn.fc1": "ffn.fc1",
    "ffn.inner_norm": "ffn.ffn_layernorm",
    "ffn.fc2": "ffn.fc2",
    "embedding": "embed_tokens",
    "final_norm": "layer_norm",
    "output": "output_projection",
}
_PREFIX = re.compile(r"(model|decoder|encoder)\.")
DERIVED_BUFFERS = re.compile(r"(.*\.)?(xpos\.scale|version)")  # buffers that the configuration determines


def from_torchscale(state_dict: Mapping[str, Tensor], config: LongNetConfig) -> LongNet:
    """Return a float32 LongNet with the weights of torchscale's LongNetDecoder or LongNetEncoder.

    All keys may share a `model.`, `decoder.` or `encoder.` prefix. For a net without embedding, `state_dict` may also
    be a larger model with an encoder inside, such as GigaPath's slide encoder with `LongNetConfig.gigapath()`: then
    only keys that start with `encoder.` count. The weights were trained with head_offsets="grouped", and encoders
    mostly with padding="zero_key": `config` must say so. Raises CheckpointError that names the key, for keys that are
    missing, unknown or of another shape, and for an output projection that is not the embedding although
    `config.tie_embeddings` is true.
    """
    state = {k: t for k, t in state_dict.items() if not DERIVED_BUFFERS.fullmatch(k)}
    if not config.vocab_size:
        state = {k: t for k, t in state.items() if k.startswith("encoder.")} or state
    return renamed_net(LongNet, config, without_prefix(state), official_name, "torchscale weights")


def renamed_net(
    build: Callable[[LongNetConfig], NetT],
    config: LongNetConfig,
    state: Mapping[str, Tensor],
    name_of: Callable[[str], str],
    where: str,
) -> NetT:
    """Build a float32 net with the weights in `state`, where `name_of` gives the name of each of our tensors.

    Raises CheckpointError, which names the keys, as `from_torchscale` does.
    """
    with torch.device("meta"):
        net = build(config)
    state = dict(state)
    if config.vocab_size and config.tie_embeddings:
        output, table = state.pop("output_projection.weight", None), state.get("embed_tokens.weight")
        if output is not None and table is not None and not torch.equal(output, table):
            raise CheckpointError(
                f"{where}: output_projection.weight is not embed_tokens.weight; set tie_embeddings=false"
            )
    names = {name_of(ours): ours for ours in net.state_dict()}
    shapes = {theirs: tuple(net.state_dict()[ours].shape) for theirs, ours in names.items()}
    problems = []
    if missing := [name for name in names if name not in state]:
        problems.append(list_names("missing", missing))
    if surplus := [name for name in state if name not in names]:
        problems.append(list_names("unexpected", surplus))
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the others need {needed}"
        for name, needed in shapes.items()
        if name in state and tuple(state[name].shape) != needed
    ]
    if problems:
        shown = problems[:4] + [f"{len(problems) - 4} more shapes differ"] * (len(problems) > 4)
        raise CheckpointError(f"{where}: {'; '.join(shown)}")
    # our own copy: training the net must not change the caller's dict
    weights = {ours: state[theirs].detach().to(torch.float32, copy=True) for theirs, ours in names.items()}
    net.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, assign=True)
    return net.eval()


def to_torchscale(model: LongNet) -> dict[str, Tensor]:
    """Return this net as a state dict of torchscale's LongNetDecoder or LongNetEncoder, for `from_torchscale` as well.

    Keys have no prefix, and tensors share the model's memory. The dict has all keys for a strict load, including xPos's
    buffers and the output projection, even if that is tied to the embedding. It does not hold the configuration:
    torchscale always uses head_offsets="grouped", in bidirectional nets padding="zero_key", and has no position="rope".
    """
    config = model.config
    state = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    if config.vocab_size and config.tie_embeddings:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    if config.position == "xpos":
        size = config.head_dim
        scale = (torch.arange(0, size, 2) + XPOS_GAMMA * size) / ((1 + XPOS_GAMMA) * size)
        state |= {f"layers.{i}.self_attn.xpos.scale": scale.clone() for i in range(config.num_layers)}
    return state


def official_name(ours: str) -> str:
    """Return torchscale's name of one of our tensors. Raises ConfigError for one that it does not have."""
    if ours.endswith(".level_bias"):
        raise ConfigError('torchscale has no learned biases: level_bias = "learned" is for a LongNet alone')
    ((layer, module, kind),) = re.findall(r"^(layers\.\d+\.|)(.+)\.(weight|bias)$", ours)
    return f"{layer}{_MODULES[module]}.{kind}"


def without_prefix(state: dict[str, Tensor], prefix: re.Pattern[str] = _PREFIX) -> dict[str, Tensor]:
    """Strip prefixes that all keys share, such as `model.decoder.` of a decoder inside a fairseq model."""
    while (match := prefix.match(next(iter(state), ""))) and all(key.startswith(match[0]) for key in state):
        state = {key.removeprefix(match[0]): tensor for key, tensor in state.items()}
    return state
