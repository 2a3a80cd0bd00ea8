"""The configuration of a LongNet, a model's `config.json`: sizes, the attention pattern, positions and norms.

From it follow the FLOPs of a net. A multiply and an add count as two FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from longnet_cli.attention import Pattern, branches
from longnet_cli.attention.notation import PATTERN_FIELDS, parse_pattern, pattern_fields
from longnet_cli.attention.pattern import HeadOffsets, Padding
from longnet_cli.basics.configuration import StrictModel, validate, without_keys

# many documents have the same length
_attention_flops = lru_cache(maxsize=1 << 16)(branches.attention_flops)


class NetConfig:
    """The facts of a net, and what it costs: the base of pydantic models, for which annotations would be fields.

    `model_dump_json` holds all facts that, with the weights, decide what the net computes.
    """

    if TYPE_CHECKING:
        vocab_size: int
        dim: int
        num_layers: int
        num_heads: int
        ffn_dim: int
        causal: bool

        @property
        def head_dim(self) -> int: ...

        @property
        def kv_heads(self) -> int:
            """The number of heads of keys and values, a divisor of num_heads."""

        @property
        def trained(self) -> int:
            """The number of trained parameters: all of the net's, or LoRA's."""

        @property
        def frozen_bytes(self) -> int:
            """The bytes of the weights that are not trained, in the types that they have in training."""

        @property
        def layer_weights(self) -> int:
            """The number of weights in the matrices of all layers."""

        @property
        def pattern(self) -> Pattern: ...

        @property
        def streams(self) -> bool:
            """True if a sequence can come in chunks; otherwise it takes one forward pass, whatever its length."""

        @property
        def max_tokens(self) -> int | None:
            """The tokens of the longest sequence that the net reads; None for no limit."""

        def num_parameters(self) -> int: ...
        def model_dump_json(self, **options: Any) -> str: ...

    @property
    def frozen(self) -> bool:
        """True if LoRA weights are trained in place of the net's own."""
        return self.trained != self.num_parameters()

    def layer_flops(self) -> int:
        """Return the FLOPs of the matrices of all layers, per token."""
        return 2 * self.layer_weights

    def vocabulary_flops(self) -> int:
        """Return the FLOPs of the logits, per token."""
        return 2 * self.dim * self.vocab_size

    def attention_flops(self, tokens: int) -> int:
        """Return the FLOPs of the attention of all layers, over one document of `tokens` tokens."""
        sizes = self.pattern, self.num_heads, self.head_dim, tokens, self.causal
        return self.num_layers * _attention_flops(*sizes)

    def attention_backward_flops(self, tokens: int) -> float:
        """Return the FLOPs of the attention in a backward pass of all layers, over one document of `tokens` tokens."""
        return branches.BACKWARD_FLOPS * self.attention_flops(tokens)

    def training_flops(self, documents: Sequence[int], predicted: float = 1.0) -> float:
        """Return the FLOPs of a forward and a backward pass over documents of these lengths.

        The share `predicted` of the tokens has logits.
        """
        forward = sum(map(self.attention_flops, documents))
        attention = (1 + branches.BACKWARD_FLOPS) * forward
        matrices = self.layer_flops() + predicted * self.vocabulary_flops()
        passes = 2 if self.frozen else 3  # forward, gradients of activations, gradients of weights
        return passes * matrices * sum(documents) + attention

    def forward_bytes(self, tokens: int) -> int:
        """Return the bytes of one layer's activations at their peak, without gradients, in float32."""
        return 4 * tokens * (10 * self.dim + 2 * self.ffn_dim)


# zeta^(pos / 512) with the paper's smallest zeta, 0.4 / 1.4, spans e^+-80 here; float32 ends at e^88
XPOS_MAX_SEGMENT = 65536

MOST_LAYERS = 10_000  # each is made, and some plans count them one by one
# rows and columns of a layer's matrices: torch cannot count the bytes of far larger ones
_LARGEST = 1 << 24

_OPTIONS = {*PATTERN_FIELDS, "kv_heads", "ffn", "bias", "drop_path"}
_OPTIONS -= {"segment_lengths", "dilation_rates", "head_offsets"}


class _NetSizes(StrictModel):
    """The first fields of a LongNetConfig, in the order of config.json."""

    vocab_size: int = Field(ge=0, examples=["32000"])
    """The number of tokens: at least as many as the tokenizer has, which is the default in a recipe."""
    dim: int = Field(gt=0, le=_LARGEST, examples=["256"])
    """The width of the layers."""
    num_layers: int = Field(gt=0, le=MOST_LAYERS, examples=["4"])
    """The number of layers."""
    num_heads: int = Field(gt=0, examples=["8"])
    """The number of attention heads, a divisor of `dim`."""
    ffn_dim: int = Field(gt=0, le=_LARGEST, examples=["1024"])
    """The width of the feed-forward."""


_PATTERN: dict[str, Any] = {
    name: (kind, getattr(Pattern, name, ...)) for name, kind in get_type_hints(Pattern).items()
}
_SizesAndPattern = create_model("_SizesAndPattern", __base__=_NetSizes, **_PATTERN)


class LongNetConfig(NetConfig, _SizesAndPattern):  # type: ignore[misc, valid-type]
    """The immutable configuration of a LongNet. `vocab_size=0` is a net without embedding (as GigaPath's).

    The fields of `attention.Pattern` are fields here, with the same names, meanings and defaults. In their place you
    may give `pattern`: a `Pattern`, or a text for `parse_pattern`. The defaults are the paper's layers (MAGNETO). Those
    of Llama have norm="rmsnorm", ffn="swiglu", bias=False and, if they are large, fewer `kv_heads`.

    Pattern fields beyond levels and offsets, `kv_heads`, `ffn`, `bias` and `drop_path` are not written at their
    defaults: such a config.json means the same to versions without them.

    Building it directly raises pydantic's ValidationError (a ValueError); `parse_config` raises ConfigError.
    """

    kv_heads: int = Field(
        default_factory=lambda sizes: sizes.get("num_heads", 1), gt=0, examples=["2"]
    )
    """The number of heads of keys and values, a divisor of `num_heads`, which is the default. Fewer make a smaller
    cache: neighbouring query heads share one (grouped-query attention, arXiv 2305.13245)."""
    ffn: Literal["gelu", "swiglu"] = "gelu"
    """The feed-forward. `swiglu` (arXiv 2002.05202) has three matrices of `ffn_dim` in place of two."""
    bias: bool = True
    """Whether the matrices of a layer add a bias."""
    padding: Padding = "exact"
    """`zero_key` also attends to torchscale's zero keys where a segment of a bidirectional net is not full."""
    causal: bool = True
    """Whether a token sees only earlier ones. A bidirectional net (false) sees later ones too."""
    position: Literal["xpos", "rope", "rope_by_level", "none"] = Field(
        default="xpos", examples=['"rope_by_level"']
    )
    """In `rope_by_level`, a step of a dilated level is one position, and several levels have no sinks. `xpos`, the
    default, is the paper's. `rope` allows look-back and sinks."""
    rope_theta: float = Field(default=10000.0, gt=1.0)
    """The base of the rotary frequencies."""
    norm: Literal["subln", "pre", "rmsnorm"] = "subln"
    """`subln` is the paper's (MAGNETO): a second norm inside each block. `pre` has one norm before each; `rmsnorm`,
    too, but it divides by the root mean square alone (arXiv 1910.07467)."""
    final_norm: bool = True
    """Whether a norm follows the last layer."""
    tie_embeddings: bool = True
    """Whether the output layer shares the weights of the embedding."""
    norm_eps: float = Field(default=1e-5, gt=0.0)
    """What each norm adds to the variance or the mean square."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share of the outputs of attention and feed-forward that is left out in training."""

    @classmethod
    def gigapath(cls) -> LongNetConfig:
        """Return the configuration of the LongNet in Prov-GigaPath's slide encoder: 12 layers, dim 768.

        The slide encoder itself embeds patches and adds their positions, before this net. The net's weights load by
        `from_torchscale`. They were trained with exactly this configuration, zero keys included.
        """
        return cls(
            vocab_size=0,
            dim=768,
            num_layers=12,
            num_heads=16,
            ffn_dim=3072,
            segment_lengths=(1024, 5792, 32768, 185363, 1048576),
            dilation_rates=(1, 2, 4, 8, 16),
            head_offsets="grouped",
            padding="zero_key",
            causal=False,
            position="none",
        )

    @model_validator(mode="before")
    @classmethod
    def _take_pattern(cls, data: Any) -> Any:
        """Replace `pattern` by its fields."""
        if not isinstance(data, Mapping) or "pattern" not in data:
            return data
        if fields := [name for name in data if name in PATTERN_FIELDS]:
            raise ValueError(
                f"pattern says the whole pattern: leave out {', '.join(fields)}, or leave out pattern"
            )
        others = dict(data)
        pattern = others.pop("pattern")
        if isinstance(pattern, str):
            pattern = parse_pattern(pattern)
        elif not isinstance(pattern, Pattern):
            raise ValueError(f'pattern needs a text, as "window:1Ki", got {pattern!r}')
        return others | pattern_fields(pattern)

    @field_validator("look_back", mode="wrap")
    @classmethod
    def _one_or_several(
        cls,
        value: Any,
        check: ValidatorFunctionWrapHandler,
        info: ValidationInfo,
    ) -> Any:
        """Refuse other values in one sentence. Return one number if it is the same at all levels."""
        try:
            checked = check(value)
        except ValidationError:
            raise ValueError("must be one number, or one number per level") from None
        levels = len(info.data.get("segment_lengths", ()))
        same = isinstance(checked, tuple) and len(checked) == levels and len({*checked}) == 1
        return checked[0] if same else checked

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            name: value
            for name, value in write(self).items()
            if name not in _OPTIONS or getattr(self, name) != self._default(name)
        }

    def _default(self, name: str) -> Any:
        sizes = {"num_heads": self.num_heads}
        field = type(self).model_fields[name]
        return field.get_default(call_default_factory=True, validated_data=sizes)

    @model_validator(mode="after")
    def _check(self) -> LongNetConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not divisible by num_heads {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by kv_heads {self.kv_heads}"
            )
        if self.position != "none" and self.head_dim % 2:
            raise ValueError(
                f'position="{self.position}" needs an even head size, got {self.head_dim}'
            )
        if self.padding == "zero_key" and self.causal:
            raise ValueError(
                'padding="zero_key" is only for causal=false: a causal net never sees the zero keys'
            )
        pattern = self.pattern  # itself raises ValueError
        if refusal := pattern.refusal(self.causal, self.padding):
            raise ValueError(refusal)
        if self.position == "xpos":
            self._check_xpos()
        if self.position == "rope_by_level" and not (
            self.causal and (len(pattern.levels) == 1 or not self.sinks)
        ):
            raise ValueError(
                'position="rope_by_level" needs causal=true and, with several levels, no sinks: leave them out, or use '
                'position="rope"'
            )
        return self

    def _check_xpos(self) -> None:
        """Raise ValueError where xPos fails: it decays with the distance to earlier keys, explodes with later ones."""
        longest = max(self.segment_lengths)
        if not self.causal:
            raise ValueError('position="xpos" is only for causal=true; use position="rope"')
        if longest > XPOS_MAX_SEGMENT:
            raise ValueError(
                f'position="xpos" overflows float32 in segments longer than {XPOS_MAX_SEGMENT}, got {longest}; '
                'use position="rope"'
            )
        if odd := [w for w in self.segment_lengths if longest % w]:
            raise ValueError(
                f'position="xpos" needs segments that nest, and {odd[0]} does not divide {longest}; use position="rope"'
            )
        if any(self.pattern.look_backs) or self.sinks:
            name = "sinks" if self.sinks else "look_back"
            raise ValueError(
                f'position="xpos" has no {name}: its keys are only seen from their own segment; use position="rope"'
            )

    @property
    def pattern(self) -> Pattern:
        """The attention pattern of every layer."""
        return Pattern(**{name: getattr(self, name) for name in PATTERN_FIELDS})

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def trained(self) -> int:
        return self.num_parameters()

    @property
    def frozen_bytes(self) -> int:
        return 0

    @property
    def kv_dim(self) -> int:
        """The numbers of a token's key, and of its value, in all heads of a layer."""
        return self.kv_heads * self.head_dim

    @property
    def ffn_matrices(self) -> int:
        """The number of matrices in a feed-forward."""
        return 3 if self.ffn == "swiglu" else 2

    @property
    def layer_weights(self) -> int:
        """The number of weights in the matrices of all layers."""
        attention = 2 * self.dim + 2 * self.kv_dim
        return self.num_layers * self.dim * (attention + self.ffn_matrices * self.ffn_dim)

    @property
    def streams(self) -> bool:
        """True: a sequence may come in chunks, one after the other in a causal net, otherwise layer by layer."""
        return True

    @property
    def max_tokens(self) -> None:
        """None, for no limit: positions are computed."""

    def num_parameters(self) -> int:
        """Return the number of trainable parameters; tied embeddings count once."""
        d = self.dim
        f = self.ffn_dim
        biases = 3 * d + 2 * self.kv_dim + (self.ffn_matrices - 1) * f if self.bias else 0
        per_channel = 1 if self.norm == "rmsnorm" else 2  # a norm's scale, and a shift
        norms = per_channel * 2 * d
        if self.norm == "subln":
            norms += per_channel * (d + f)
        embeddings = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        final_norm = per_channel * d if self.final_norm else 0
        return embeddings + self.layer_weights + self.num_layers * (biases + norms) + final_norm

    def forward_bytes(self, tokens: int) -> int:
        gate = self.ffn_dim if self.ffn == "swiglu" else 0
        return super().forward_bytes(tokens) + 4 * tokens * gate


class SlideConfig(LongNetConfig):
    """The configuration of a SlideEncoder: a LongNet, the vectors that it reads, and the grid in which they lie.

    Each vector has `in_features` numbers. A tile at pixel (x, y) lies in the cell (x // tile_size, y // tile_size) of
    a `grid` x `grid` square, which gives its position. `grid=0` reads vectors without coordinates, in their order.
    In training, the attention and the feed-forward of a layer are each left out for a share of the slides, which grows
    from 0 in the first layer to `drop_path` in the last. The defaults are Prov-GigaPath's, but for the two kinds of
    dropout; `SlideConfig.gigapath()` has its sizes, too.
    """

    vocab_size: Literal[0] = 0
    head_offsets: HeadOffsets = "grouped"
    padding: Padding = "zero_key"
    causal: bool = False
    position: Literal["rope", "none"] = "none"
    in_features: int = Field(default=1536, gt=0)
    # cells are float32 numbers in the rows that the net reads
    grid: int = Field(default=1000, ge=0, le=1 << 24)
    tile_size: int = Field(default=256, gt=0)
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _check_slide(self) -> SlideConfig:
        if self.causal:
            raise ValueError("a slide encoder sees all tiles at once: causal must be false")
        if self.grid and self.dim % 4:
            raise ValueError(
                f"positions in two dimensions need a dim that 4 divides, not {self.dim}; grid=0 has none"
            )
        return self

    def num_parameters(self) -> int:
        """Return the number of trainable parameters, including the projection, CLS and the last norm."""
        return super().num_parameters() + (self.in_features + 1) * self.dim + 3 * self.dim


class TransformersConfig(NetConfig, BaseModel):
    """The facts of a Hugging Face model, which a recipe stores; `source` is the model's own configuration, as JSON."""

    model_config = ConfigDict(frozen=True)

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    kv_heads: int  # heads of keys and values, a divisor of num_heads
    head_dim: int
    ffn_dim: int
    causal: bool
    # the memory of a causal sequence between its chunks
    memory: Literal["segments", "cache", "none"]
    # the size of a table of positions; for a dense net as trained, its training length
    max_tokens: int | None
    as_trained: bool  # no pattern is given: dense, on sequences of at most its training length
    pattern: Pattern
    parameters: int
    trained: int  # number of trained parameters: all of the model's, or LoRA's
    frozen_bytes: int = 0
    layer_weights: int  # parameters in the matrices of all layers
    source: str

    @property
    def streams(self) -> bool:
        return self.memory != "none"

    def num_parameters(self) -> int:
        """Return the number of parameters, with tied embeddings counted once."""
        return self.parameters


def parse_config(
    data: Mapping[str, Any],
    where: str,
    pattern: Pattern | None = None,
) -> LongNetConfig:
    """Return the configuration of parsed JSON or TOML. Raises ConfigError of one line that starts with `where`.

    Data with `in_features` give a SlideConfig. `pattern` replaces the pattern in `data`.
    """
    if pattern is not None:
        data = without_keys(data, {*PATTERN_FIELDS, "pattern"}) | {"pattern": pattern}
    return validate(SlideConfig if "in_features" in data else LongNetConfig, data, where)
