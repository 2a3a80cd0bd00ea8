"""Checkpoints of the official implementations as LongNet folders, and torchscale's state dicts as nets.

Supported are Prov-GigaPath's slide encoder, and torchscale's LongNet encoders and decoders.
The names and shapes of the weights tell the kind of net and its sizes. Other settings (heads, segment lengths) are
given by the user, or taken from the official model.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from longnet_cli.attention.pattern import Padding
from longnet_cli.basics.atomic import whole_folder, write_file
from longnet_cli.basics.configuration import validate
from longnet_cli.basics.digests import file_sha256
from longnet_cli.basics.errors import CheckpointError, ConfigError, one_line
from longnet_cli.basics.model_files import CONFIG, first_bytes
from longnet_cli.models.official_slide import HEADS, RATES, official_name, slide_name
from longnet_cli.nets.config import LongNetConfig, SlideConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.slide import VectorNet
from longnet_cli.nets.weights import NetT, check_finite, empty_net, list_names

_PREFIXES = re.compile(r"((module|model|slide_encoder|encoder|decoder)\.)*")
DERIVED_BUFFERS = re.compile(r"(.*\.)?(xpos\.scale|version)")  # the configuration determines them


def from_torchscale(state_dict: Mapping[str, Tensor], config: LongNetConfig) -> LongNet:
    """Return a float32 LongNet with the weights of torchscale's LongNetDecoder or LongNetEncoder.

    All keys may share prefixes, such as `model.decoder.`. For a net without embedding, `state_dict` may also
    be a larger model with an encoder inside, such as GigaPath's slide encoder with `LongNetConfig.gigapath()`: then
    only keys that start with `encoder.` count. The weights were trained with head_offsets="grouped", and encoders
    mostly with padding="zero_key": `config` must say so. Raises CheckpointError that names the key, for keys that are
    missing, unknown or of another shape, and for an output projection that is not the embedding although
    `config.tie_embeddings` is true.
    """
    state = dict(state_dict)
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
    state = {name: tensor for name, tensor in state.items() if not DERIVED_BUFFERS.fullmatch(name)}
    if config.vocab_size and config.tie_embeddings:
        output = state.pop("output_projection.weight", None)
        table = state.get("embed_tokens.weight")
        if output is not None and table is not None and not torch.equal(output, table):
            raise CheckpointError(
                f"{where}: output_projection.weight is not embed_tokens.weight; set tie_embeddings=false"
            )
    net = empty_net(build, config, state, where, name_of)
    # our own copy: training the net must not change the caller's dict
    weights = {}
    for name in net.state_dict():
        weights[name] = state[name_of(name)].detach().to(torch.float32, copy=True).contiguous()
    net.load_state_dict(weights, assign=True)
    return net.eval()


def slide_net(config: LongNetConfig, state: Mapping[str, Tensor], where: str) -> VectorNet:
    """Build the float32 net of a slide encoder with weights that have their official names. Raises CheckpointError."""
    if "cls_token" in state:
        state = {**state, "cls_token": state["cls_token"].flatten()}
    return renamed_net(VectorNet, config, state, slide_name, where)


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip prefixes that all keys share, such as `model.decoder.` of a decoder inside a fairseq model."""
    match = _PREFIXES.match(commonprefix([*state]))  # noqa: RUF071 (of names)
    assert match  # an empty one at least
    length = match.end()
    return {name[length:]: tensor for name, tensor in state.items()}


_INSIDE = ("model", "module", "state_dict")  # keys of the state dict in training checkpoints
# settings that no checkpoint says, and the options that give them
_OPTIONS = {
    "num_heads": "--heads",
    "segment_lengths": "--segment-lengths",
    "dilation_rates": "--dilation-rates",
}

CARD = """# {title}

Converted by `longnet convert` from `{0.path.name}`, SHA-256 `{sha256}`.
The file does not say heads, pattern and padding: what was not given is the official model's.
With padding "zero_key", keys of zeros join the softmax wherever a sequence does not fill a segment.

- num_layers: {0.config.num_layers}
- dim: {0.config.dim}
- num_heads: {0.config.num_heads}
- segment_lengths: {0.config.segment_lengths}
- dilation_rates: {0.config.dilation_rates}
- padding: {0.config.padding}
"""


@dataclass(frozen=True)
class Given:
    """Values from the user that a checkpoint does not hold; None takes the official model's value."""

    heads: int | None = None
    segment_lengths: Sequence[int] | None = None
    dilation_rates: Sequence[int] | None = None
    padding: Padding | None = None


def is_checkpoint(path: Path) -> bool:
    """Return whether the first bytes of a file look like `torch.save` or safetensors."""
    head = first_bytes(path, 9)
    return head.startswith((b"PK\x03\x04", b"\x80")) or head[8:] == b"{"


def convert_official(path: Path, output: Path, dtype: torch.dtype | None, given: Given) -> str:
    """Write the net in the checkpoint `path` to the new folder `output`. Return a few words about the net.

    `dtype` is the type of the weights; None keeps the file's own. Raises CheckpointError for a file that is not a plain
    state dict, and for tensors that fit no known net: the message names missing, unexpected and misshapen ones. Raises
    ConfigError for missing values that must be `given`, and for a folder that is in use.
    """
    state = read_state_dict(path)
    kind = _SlideContents if "patch_embed.proj.weight" in state else _Contents
    contents = kind(path, state, given)
    net = contents.build()
    net = net.to(dtype or mode(tensor.dtype for tensor in state.values()))
    check_finite(net.state_dict(), str(path))
    with whole_folder(output, CONFIG, new=True) as place:
        net.save_pretrained(place)
        title = contents.what[0].upper() + contents.what[1:]
        card = CARD.format(contents, title=title, sha256=file_sha256(path))
        write_file(place / "README.md", card.encode())
    return f"{contents.what} of {net.config.num_parameters():,} parameters"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the prefixes that all names share. Run no code in the file.

    Raises CheckpointError for a file that is not a plain state dict.
    """
    try:
        content = _read_content(path)
    except (pickle.UnpicklingError, SafetensorError) as error:
        why = "damaged, or of another kind"
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"it asks for {asked[1]}, and nothing is run"
        raise _not_plain(path, f" ({why}): save its state_dict(), or safetensors") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({one_line(error)[:80]})"
        ) from None
    tensors = content if isinstance(content, Mapping) else {}
    for name in _INSIDE:
        if isinstance(tensors.get(name), Mapping):
            tensors = tensors[name]
    if not tensors:
        raise _not_plain(path, f": it holds {type(content).__name__}, not tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise _not_plain(path, f": {name} is of type {type(tensor).__name__}")
        lacks_numbers = (
            tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.nbytes > tensor.untyped_storage().nbytes()
        )
        if lacks_numbers:
            raise CheckpointError(
                f"{path}: {name} of shape {tuple(tensor.shape)} has not all of its numbers in the file"
            )
    return without_prefix(dict(tensors))


def _not_plain(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a plain state dict{why}")


def _read_content(path: Path) -> Any:
    """Return what a file of safetensors or of `torch.save` holds. A Namespace, as a run's options, is plain data."""
    with suppress(SafetensorError):
        return load_file(path)
    _check_pickle(path)
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # about pickle protocols; an unknown one is an error
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_pickle(path: Path) -> None:
    """Raise ValueError or UnpicklingError for a file of `torch.save` that declares more data than it has."""
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            records = archive.infolist()
            size = sum(record.file_size for record in records)
            if size > path.stat().st_size or any(record.compress_type for record in records):
                raise ValueError(
                    "its records are compressed, or lie in each other, as torch.save never does"
                )
            pickles = [archive.open(x) for x in records if x.filename.endswith("data.pkl")]
        else:  # the older format: four pickles, then the numbers
            file.seek(0)
            pickles = [file] * 4
        for stream in pickles:
            with suppress(ValueError):  # damage, which torch reports
                for operation, argument, _ in pickletools.genops(stream):
                    # torch allows a bytearray, of any size
                    asked = str(argument).replace(" ", ".")
                    if operation.name == "GLOBAL" and asked.endswith(".bytearray"):
                        raise pickle.UnpicklingError(f"GLOBAL {asked} was asked for")


class _Contents:
    """The contents of a state dict of torchscale: the kind of net, and its sizes."""

    prefix = ""  # of the names
    config_class: type[LongNetConfig] = LongNetConfig

    def __init__(self, path: Path, state: Mapping[str, Tensor], given: Given) -> None:
        self.path = path
        self.state = state
        self.given = given
        self.scales = [tensor for name, tensor in state.items() if name.endswith("xpos.scale")]
        self.decoder = bool(self.scales) or f"{self.prefix}output_projection.weight" in state
        self.config = self._config()

    @property
    def what(self) -> str:
        """The kind of net, in words."""
        return f"a LongNet {'decoder' if self.decoder else 'encoder'} of torchscale"

    def build(self) -> LongNet:
        """Return the net with its weights, in float32."""
        where = f"{self.path}: {self.what}"
        return renamed_net(LongNet, self.config, self.state, official_name, where)

    def _config(self) -> LongNetConfig:
        """Return the configuration, from names and shapes, the given values and the official model's defaults."""
        dim = self._size("self_attn.q_proj.weight")
        ffn_dim = self._size("ffn.fc1.weight")
        has_inner_norms = any(".inner_attn_ln." in name for name in self.state)
        has_final_norm = f"{self.prefix}layer_norm.weight" in self.state
        self._check_norms(has_inner_norms or has_final_norm)
        settings: dict[str, Any] = {
            "vocab_size": 0,
            "dim": dim,
            "ffn_dim": ffn_dim,
            "num_layers": sum(name.endswith(".self_attn.q_proj.weight") for name in self.state),
            "norm": "subln" if has_inner_norms else "pre",
            "final_norm": has_final_norm,
            "head_offsets": "grouped",
            "causal": self.decoder,
            "position": "xpos" if self.scales else "none",
            "padding": "exact" if self.decoder else "zero_key",
        }
        settings |= self._settings_of_kind(dim)
        of_user = {
            "num_heads": self.given.heads,
            "segment_lengths": self.given.segment_lengths,
            "dilation_rates": self.given.dilation_rates,
            "padding": self.given.padding,
        }
        settings |= {name: value for name, value in of_user.items() if value}
        if missing := [option for name, option in _OPTIONS.items() if name not in settings]:
            raise ConfigError(
                f"{self.path}: {self.what}, and no file says the pattern of one: give {', '.join(missing)}"
            )
        return validate(self.config_class, settings, str(self.path))

    def _check_norms(self, has_norms: bool) -> None:
        """Raise CheckpointError for a net that has no norm inside its layers, and none at its end."""
        if not has_norms:
            raise CheckpointError(
                f"{self.path}: a net without norms inside and at its end, as with deepnorm, is not read"
            )

    def _settings_of_kind(self, dim: int) -> dict[str, Any]:
        """Return what the weights of a net of torchscale tell: its vocabulary, and its heads by the scales of xPos."""
        settings: dict[str, Any] = {}
        if self.scales:
            settings["num_heads"] = dim // (2 * len(self.scales[0]))
        table = self.state.get("embed_tokens.weight")
        if table is not None and table.ndim:
            output = self.state.get("output_projection.weight")
            settings["vocab_size"] = len(table)
            settings["tie_embeddings"] = output is None or torch.equal(output, table)
        return settings

    def _size(self, name: str) -> int:
        """Return the number of rows of the matrix of this name in the first layer."""
        matrix = self.state.get(f"{self.prefix}layers.0.{name}")
        if matrix is None or matrix.ndim != 2:
            raise CheckpointError(
                f"{self.path}: not a slide encoder of Prov-GigaPath or a LongNet of torchscale: it has no "
                f"{self.prefix}layers.0.{name}, but {list_names('the', [*self.state])}"
            )
        return len(matrix)


class _SlideContents(_Contents):
    """The contents of a state dict of a slide encoder."""

    prefix = "encoder."
    config_class = SlideConfig
    what = "a slide encoder as Prov-GigaPath's"

    def build(self) -> LongNet:
        return slide_net(self.config, self.state, f"{self.path}: {self.what}")

    def _check_norms(self, has_norms: bool) -> None:
        """Accept a net with any norms: it has one after its layers, too."""

    def _settings_of_kind(self, dim: int) -> dict[str, Any]:
        """Return the official model's settings, and the width of its features."""
        return {
            "in_features": self.state["patch_embed.proj.weight"].shape[-1],
            "num_heads": HEADS,
            "segment_lengths": SlideConfig.gigapath().segment_lengths,
            "dilation_rates": RATES,
        }
