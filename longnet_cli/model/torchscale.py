"""The weights of torchscale's LongNet, in and out: its state dicts, whose tensors have other names."""

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

MODULES = {  # of a layer, then of the net: theirs and ours
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
IGNORED = re.compile(r"(.*\.)?(xpos\.scale|version)")  # buffers that the configuration determines


def from_torchscale(state_dict: Mapping[str, Tensor], config: LongNetConfig) -> LongNet:
    """A float32 LongNet with the weights of torchscale's LongNetDecoder or LongNetEncoder.

    Keys may all have a `model.`, `decoder.` or `encoder.` prefix. A net without embedding also takes the encoder out of
    a larger model, such as GigaPath's slide encoder with `LongNetConfig.gigapath()`: only keys that begin with
    `encoder.` count then. The weights were trained with head_offsets="grouped", an encoder's mostly with
    padding="zero_key": `config` has to say so. Raises CheckpointError naming the first key that is missing, has no
    place here or another shape, or an output projection that is not the embedding though `config.tie_embeddings` says
    so.
    """
    state = {k: t for k, t in state_dict.items() if not IGNORED.fullmatch(k)}
    if not config.vocab_size:
        state = {k: t for k, t in state.items() if k.startswith("encoder.")} or state
    state = _without_prefix(state)
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
    """The state dict of torchscale's LongNetDecoder or LongNetEncoder for this net: what `from_torchscale` takes.

    Without prefix, sharing the model's memory. All that a strict load asks for is there: the output projection also
    where it is tied to the embedding, and xPos's buffers. A state dict says nothing of how it is used: torchscale
    computes it with head_offsets="grouped", a bidirectional net with padding="zero_key", and has no position="rope".
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
    """The name of a parameter whose module has another one in `modules`; None where it has none."""
    match = re.fullmatch(r"(layers\.\d+\.|)(.+)\.(weight|bias)", name)
    return f"{match[1]}{modules[match[2]]}.{match[3]}" if match and match[2] in modules else None


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip prefixes that all keys share, as of a decoder inside a fairseq model (`model.decoder.`)."""
    while state:
        match = _PREFIX.match(next(iter(state)))
        if not match or not all(key.startswith(match[0]) for key in state):
            break
        state = {key.removeprefix(match[0]): tensor for key, tensor in state.items()}
    return state
