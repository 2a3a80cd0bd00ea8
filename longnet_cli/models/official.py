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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from longnet_cli.basics.atomic import whole_folder, write_file
from longnet_cli.basics.configuration import validate
from longnet_cli.basics.digests import file_sha256
from longnet_cli.basics.errors import CheckpointError, ConfigError, one_line
from longnet_cli.basics.model_files import CONFIG
from longnet_cli.models.official_slide import HEADS, RATES, official_name, slide_name
from longnet_cli.nets.config import LongNetConfig, SlideConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.slide import VectorNet
from longnet_cli.nets.weights import TYPE_NAMES, NetT, check_finite, empty_net, list_names

_PREFIX = re.compile(r"(module|model|slide_encoder|encoder|decoder)\.")
DERIVED_BUFFERS = re.compile(
    r"(.*\.)?(xpos\.scale|version)"
)  # buffers that the configuration determines


def from_torchscale(state_dict: Mapping[str, Tensor], config: LongNetConfig) -> LongNet:
    """Return a float32 LongNet with the weights of torchscale's LongNetDecoder or LongNetEncoder.

    All keys may share prefixes, such as `model.decoder.`. For a net without embedding, `state_dict` may also
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
    state = {name: tensor for name, tensor in state.items() if not DERIVED_BUFFERS.fullmatch(name)}
    if config.vocab_size and config.tie_embeddings:
        output, table = (
            state.pop("output_projection.weight", None),
            state.get("embed_tokens.weight"),
        )
        if output is not None and table is not None and not torch.equal(output, table):
            raise CheckpointError(
                f"{where}: output_projection.weight is not embed_tokens.weight; set tie_embeddings=false"
            )
    net = empty_net(build, config, state, where, "the others need", name_of)
    # our own copy: training the net must not change the caller's dict
    weights = {
        ours: state[name_of(ours)].detach().to(torch.float32, copy=True)
        for ours in net.state_dict()
    }
    net.load_state_dict(
        {name: tensor.contiguous() for name, tensor in weights.items()}, assign=True
    )
    return net.eval()


def slide_net(config: LongNetConfig, state: Mapping[str, Tensor], where: str) -> VectorNet:
    """Build the float32 net of a slide encoder with weights that have their official names. Raises CheckpointError."""
    if "cls_token" in state:
        state = {**state, "cls_token": state["cls_token"].flatten()}
    return renamed_net(VectorNet, config, state, slide_name, where)


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip prefixes that all keys share, such as `model.decoder.` of a decoder inside a fairseq model."""
    while (match := _PREFIX.match(next(iter(state), ""))) and all(
        key.startswith(match[0]) for key in state
    ):
        state = {key.removeprefix(match[0]): tensor for key, tensor in state.items()}
    return state


_INSIDE = ("model", "module", "state_dict")  # keys of the state dict in training checkpoints

CARD = """# {what}

Converted by `longnet convert` from `{name}`, SHA-256 `{sha256}`.
The file does not say heads, pattern and padding: what was not given is the official model's.
With padding "zero_key", keys of zeros join the softmax wherever a sequence does not fill a segment.

{settings}
"""


@dataclass(frozen=True)
class Given:
    """Values from the user that a checkpoint does not hold; None takes the official model's value."""

    heads: int | None = None
    segment_lengths: Sequence[int] | None = None
    dilation_rates: Sequence[int] | None = None
    padding: Literal["exact", "zero_key"] | None = None


def is_checkpoint(path: Path) -> bool:
    """Return whether the first bytes of a file look like `torch.save` or safetensors."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return False
    return head.startswith((b"PK\x03\x04", b"\x80")) or head[8:] == b"{"


def convert_official(path: Path, output: Path, dtype: torch.dtype | None, given: Given) -> str:
    """Write the net in the checkpoint `path` to the new folder `output`. Return a few words about the net.

    `dtype` is the type of the weights; None keeps the file's own. Raises CheckpointError for a file that is not a plain
    state dict, and for tensors that fit no known net: the message names missing, unexpected and misshapen ones. Raises
    ConfigError for missing values that must be `given`, and for a folder that is in use.
    """
    state = read_state_dict(path)
    contents = _Contents(path, state, given)
    net = contents.build()
    kinds = Counter(tensor.dtype for tensor in state.values() if tensor.dtype in TYPE_NAMES)
    net = net.to(dtype or kinds.most_common(1)[0][0])
    check_finite(net.state_dict(), str(path))
    with whole_folder(output, CONFIG, new=True) as place:
        net.save_pretrained(place)
        write_file(place / "README.md", contents.card().encode())
    return f"{contents.what} of {net.config.num_parameters():,} parameters"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the prefixes that all names share. Run no code in the file.

    Raises CheckpointError for a file that is not a plain state dict.
    """
    with path.open("rb") as file:
        pickled = file.read(9)[8:] != b"{"
    try:
        content: Any
        if pickled:  # a Namespace, such as a run's options, is plain data
            _check_pickle(path)
            with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
                warnings.simplefilter(
                    "ignore"
                )  # about pickle protocols; an unknown one raises below
                content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = load_file(path)
    except (pickle.UnpicklingError, SafetensorError) as error:
        asks = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it asks for {asks[1]}, and nothing is run" if asks else "damaged, or of another kind"
        )
        raise CheckpointError(
            f"{path}: not a plain state dict ({reason}): save its state_dict(), or safetensors"
        ) from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({one_line(error)[:80]})"
        ) from None
    for name in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path}: not a plain state dict: it holds {type(content).__name__}, not tensors by name"
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: not a plain state dict: {name} is of type {type(tensor).__name__}"
            )
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} of shape {tuple(tensor.shape)} has not all of its numbers in the file"
            )
    return without_prefix(dict(content))


def _check_pickle(path: Path) -> None:
    """Raise ValueError or UnpicklingError for a file of `torch.save` that declares more data than it has."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # the older format: four pickles, then the numbers
            file.seek(0)
            pickles: list[Any] = [file] * 4
        else:
            archive = zipfile.ZipFile(file)
            records = archive.infolist()
            size = sum(record.file_size for record in records)
            if size > path.stat().st_size or any(record.compress_type for record in records):
                raise ValueError(
                    "its records are compressed, or lie in each other, as torch.save never does"
                )
            pickles = [
                archive.open(record) for record in records if record.filename.endswith("data.pkl")
            ]
        for stream in pickles:
            with suppress(ValueError):  # damage, which torch reports
                for operation, argument, _ in pickletools.genops(stream):
                    # torch allows this one, of any size
                    if operation.name == "GLOBAL" and (asked := str(argument)).endswith(
                        " bytearray"
                    ):
                        raise pickle.UnpicklingError(
                            f"GLOBAL {asked.replace(' ', '.')} was asked for"
                        )


class _Contents:
    """The contents of a state dict: the kind of net, and its sizes."""

    def __init__(self, path: Path, state: Mapping[str, Tensor], given: Given) -> None:
        self.path, self.state, self.given = path, state, given
        self.slide = "patch_embed.proj.weight" in state or "cls_token" in state
        self.prefix = "encoder." if self.slide else ""
        self.scales = [t for name, t in state.items() if name.endswith("xpos.scale")]
        self.decoder = f"{self.prefix}output_projection.weight" in state or bool(self.scales)
        kind = "decoder" if self.decoder else "encoder"
        self.what = (
            "a slide encoder as Prov-GigaPath's"
            if self.slide
            else f"a LongNet {kind} of torchscale"
        )
        self.config = self._config()

    def build(self) -> LongNet:
        """Return the net with its weights, in float32."""
        where = f"{self.path}: {self.what}"
        if self.slide:
            return slide_net(self.config, self.state, where)
        return renamed_net(LongNet, self.config, self.state, official_name, where)

    def card(self) -> str:
        """Return the text of the folder's README.md."""
        names = ("num_layers", "dim", "num_heads", "segment_lengths", "dilation_rates", "padding")
        settings = [f"- {name}: {getattr(self.config, name)}" for name in names]
        what, sha256 = self.what[0].upper() + self.what[1:], file_sha256(self.path)
        return CARD.format(
            what=what, name=self.path.name, sha256=sha256, settings="\n".join(settings)
        )

    def _config(self) -> LongNetConfig:
        """Return the configuration, from names and shapes, the given values and the official model's defaults."""
        dim, ffn = self._size("self_attn.q_proj.weight"), self._size("ffn.fc1.weight")
        layers = {
            int(match[1])
            for name in self.state
            if (match := re.match(rf"{self.prefix}layers\.(\d+)\.", name))
        }
        data: dict[str, Any] = {
            "vocab_size": 0,
            "dim": dim,
            "ffn_dim": ffn,
            "num_layers": len(layers),
            "norm": "subln" if any(".inner_attn_ln." in name for name in self.state) else "pre",
            "final_norm": f"{self.prefix}layer_norm.weight" in self.state,
            "head_offsets": "grouped",
            "causal": self.decoder,
            "position": "xpos" if self.scales else "none",
            "padding": self.given.padding or ("exact" if self.decoder else "zero_key"),
        }
        if data["norm"] == "pre" and not data["final_norm"] and not self.prefix:
            raise CheckpointError(
                f"{self.path}: a net without norms inside and at its end, as with deepnorm, is not read"
            )
        # of torchscale's nets, only xPos's scales tell a default
        heads: int = dim // (2 * len(self.scales[0])) if self.scales else 0
        lengths, rates = tuple[int, ...](), tuple[int, ...]()
        if self.slide:
            patches = self.state.get("patch_embed.proj.weight")
            data["in_features"] = 1536 if patches is None else patches.shape[-1]
            heads, lengths, rates = HEADS, SlideConfig.gigapath().segment_lengths, RATES
        else:
            if (table := self.state.get("embed_tokens.weight")) is not None and table.ndim:
                output = self.state.get("output_projection.weight")
                data |= {
                    "vocab_size": len(table),
                    "tie_embeddings": output is None or torch.equal(output, table),
                }
        data["num_heads"] = self.given.heads or heads
        data["segment_lengths"] = tuple(self.given.segment_lengths or lengths)
        data["dilation_rates"] = tuple(self.given.dilation_rates or rates)
        if missing := [
            name for name in ("num_heads", "segment_lengths", "dilation_rates") if not data[name]
        ]:
            options = ", ".join(
                f"--{name.removeprefix('num_').replace('_', '-')}" for name in missing
            )
            raise ConfigError(
                f"{self.path}: {self.what}, and no file says the pattern of one: give {options}"
            )
        return validate(SlideConfig if self.slide else LongNetConfig, data, str(self.path))

    def _size(self, name: str) -> int:
        """Return the number of rows that the matrices of this name have in most layers."""
        pattern = re.compile(rf"{self.prefix}layers\.\d+\.{re.escape(name)}")
        sizes = Counter(
            t.shape[0] for n, t in self.state.items() if pattern.fullmatch(n) and t.ndim == 2
        )
        if not sizes:
            raise CheckpointError(
                f"{self.path}: not a slide encoder of Prov-GigaPath or a LongNet of torchscale: it has no "
                f"{self.prefix}layers.0.{name}, but {list_names('the', [*self.state])}"
            )
        return sizes.most_common(1)[0][0]
