"""Import and export of torchscale's LongNet weights: its state dicts have other names for the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from longnet_cli.errors import CheckpointError
from longnet_cli.model.config import LongNetConfig
from longnet_cli.model.longnet import LongNet
from longnet_cli.model.positions import XPOS_GAMMA
from longnet_cli.model.weights import empty_net, list_names

MODULES = {  # torchscale's name -> ours, of a layer, then of the net
    "self_attn_layer_norm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.inner_attn_ln": "attention.inner_norm",
    "self_attn.out_proj": "attention.out",
    "final_layer_norm": "ffn_norm",
    "ffn.fc1": "ffn.fc1",
    "ffn.ffn_layernorm": "ffn.inner_norm",
    "ffn.fc2": "ffn.fc2",
    "embed_tokens": "embedding",
    "layer_norm": "final_norm",
    "output_projection": "output",
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
    state = without_prefix(state)
    places = {theirs: renamed(theirs) for theirs in state}
    if unknown := [theirs for theirs, ours in places.items() if ours is None]:
        raise CheckpointError(f"torchscale weights: {list_names('unexpected', unknown)}")
    tensors = {ours: state[theirs].detach().to(torch.float32) for theirs, ours in places.items() if ours is not None}
    if config.tie_embeddings and config.vocab_size:
        output = tensors.pop("output.weight", None)
        embedding = tensors.get("embedding.weight")
        if output is not None and embedding is not None and not torch.equal(output, embedding):
            raise CheckpointError(
                "torchscale weights: output_projection.weight is not embed_tokens.weight; set tie_embeddings=false"
            )
    model = empty_net(LongNet, config, {name: tuple(t.shape) for name, t in tensors.items()}, "torchscale weights")
    # our own copy: training the net must not change the caller's dict
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def to_torchscale(model: LongNet) -> dict[str, Tensor]:
    """Return this net as a state dict of torchscale's LongNetDecoder or LongNetEncoder, for `from_torchscale` as well.

    Keys have no prefix, and tensors share the model's memory. The dict has all keys for a strict load, including xPos's
    buffers and the output projection, even if that is tied to the embedding. It does not hold the configuration:
    torchscale always uses head_offsets="grouped", in bidirectional nets padding="zero_key", and has no position="rope".
    """
    config = model.config
    modules = {ours: theirs for theirs, ours in MODULES.items()}
    state = {str(renamed(name, modules)): tensor for name, tensor in model.state_dict().items()}
    if config.vocab_size and config.tie_embeddings:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    if config.position == "xpos":
        size = config.head_dim
        scale = (torch.arange(0, size, 2) + XPOS_GAMMA * size) / ((1 + XPOS_GAMMA) * size)
        state |= {f"layers.{i}.self_attn.xpos.scale": scale.clone() for i in range(config.num_layers)}
    return state


def renamed(name: str, modules: Mapping[str, str] = MODULES) -> str | None:
    """Return the name of a parameter after `modules` renames its module, or None if `modules` lacks that."""
    match = re.fullmatch(r"(layers\.\d+\.|)(.+)\.(weight|bias)", name)
    return f"{match[1]}{modules[match[2]]}.{match[3]}" if match and match[2] in modules else None


def without_prefix(state: dict[str, Tensor], prefix: re.Pattern[str] = _PREFIX) -> dict[str, Tensor]:
    """Strip prefixes that all keys share, such as `model.decoder.` of a decoder inside a fairseq model."""
    while (match := prefix.match(next(iter(state), ""))) and all(key.startswith(match[0]) for key in state):
        state = {key.removeprefix(match[0]): tensor for key, tensor in state.items()}
    return state
