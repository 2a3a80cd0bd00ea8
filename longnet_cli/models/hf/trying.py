"""A model of transformers is tried on a few tokens, before its first number.

It is the model that was loaded, with all its settings: an architecture's name says little about its attention. It is
compared with transformers' own eager attention, on one token more than the smallest window or chunk in its
configuration. What differs is refused, in one line that names the architecture and the difference. The answer is kept
by all settings and some of the weights (`basics.verdict_cache`), so a model is tried once: attention of new weights is
so even that it hides what trained ones show.

B batch, N tokens.
"""

from __future__ import annotations

import inspect
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from longnet_cli.basics.configuration import without_keys
from longnet_cli.basics.digests import json_sha256
from longnet_cli.basics.errors import InputWarning, LongNetError, is_out_of_memory, one_line
from longnet_cli.basics.verdict_cache import remembered
from longnet_cli.nets.weights import tensor_digest

Run = Callable[[Tensor], Tensor]  # ids (B, N) -> hidden states (B, N, dim)

# tokens of a trial: without a window or chunk in the configuration, and with a long one
FEW = 64
MOST = 512
# the largest difference of a token's nats, relative to their mean; in 16 bits, also 3 times that of eager and sdpa
TOLERANCE = 1e-3
TOLERANCE_16 = 2e-2
_WINDOWS = re.compile(r"(window|chunk|block)(_size|_length)?|local_attention")
_LONG = 2.0  # seconds of a trial that are worth a line
SOME = 16  # first numbers of each weight that tell models apart: few to read, and training changes them


def body(model: PreTrainedModel) -> Any:
    """Return the part of a model that makes hidden states."""
    inner = model.base_model
    if inner is not model:
        return inner
    return next((x for x in model.children() if isinstance(x, PreTrainedModel)), model)


def layers_of(model: PreTrainedModel, number: int) -> nn.ModuleList:
    """Return the layers, first to last; an empty list if they are not in one list."""
    lists = (x for x in body(model).modules() if isinstance(x, nn.ModuleList))
    return next((x for x in lists if len(x) == number), nn.ModuleList())


def layer_kinds(config: PretrainedConfig) -> set[str]:
    """Return the kinds of a model's layers, such as full_attention and sliding_attention."""
    if kinds := getattr(config, "layer_types", None):
        return {*kinds}
    return {"sliding_attention" if getattr(config, "sliding_window", 0) else "full_attention"}


def first_position(model: PreTrainedModel) -> int:
    """Return the position of a first token: RoBERTa's positions start after the padding's, all others at 0."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            return table.padding_idx + 1
    return 0


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return what a configuration says of the model, and not of its files."""
    settings = json.loads(config.to_json_string(use_diff=False))
    return without_keys(settings, ("transformers_version", "_name_or_path"))


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return the hidden states (B, N, dim) of ids (B, N), or of `inputs_embeds`, in one forward without a cache."""
    return body(model)(input_ids=input_ids, **without_cache(model), **options).last_hidden_state


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return the option that keeps a model from making a cache; none for a model that makes none."""
    accepted = inspect.signature(body(model).forward).parameters
    return {"use_cache": False} if "use_cache" in accepted else {}


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into eval mode, without gradients, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Put a model into eval mode, without gradients and with the attention of this name, for a while."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(implementation)
        with evaluating(model):
            yield
    finally:
        model.set_attn_implementation(before)


def why_not(model: PreTrainedModel, form: str, run: Run, expected: Run | None = None) -> str | None:
    """Return why `run`, the model in a `form`, does not give the numbers of `expected`; None if it does.

    `form` is "as it comes", "with a pattern", "in chunks" or "in chunks, with a pattern"; `expected` None is the model
    with transformers' eager attention. Raises a LongNetError that `run` raises.
    """
    settings = settings_of(model.config)
    settings.pop("dilated_attention", None)
    weight = next(model.parameters())
    if weight.is_meta:  # it has no numbers yet
        return None
    some = {name: x.detach().flatten()[:SOME] for name, x in model.named_parameters()}
    asked = {
        "trial": form,
        "architecture": type(model).__name__,
        "config": json_sha256(settings),
        "dtype": str(weight.dtype),
        "device": weight.device.type,
        "weights": tensor_digest(some),
    }
    return remembered(
        asked, partial(_try, model, form, run, expected or partial(_own, model, "eager"))
    )


def _try(model: PreTrainedModel, form: str, run: Run, expected: Run) -> str | None:
    begun = time.monotonic()
    architecture = type(model).__name__
    weight = next(model.parameters())
    count = _tokens(model)

    def nats(run: Run) -> Tensor:
        return _nats(model, run(ids[:, :-1]), ids[0, 1:])

    try:
        ids = _some_ids(model, count + 1)
        with evaluating(model):
            right = nats(expected)
            actual = nats(run)
            allowed = TOLERANCE
            if weight.dtype.itemsize < 4:
                allowed = TOLERANCE_16
                with suppress(ValueError):  # a model without sdpa
                    eager, sdpa = (nats(partial(_own, model, name)) for name in ("eager", "sdpa"))
                    allowed = max(allowed, 3 * _difference(sdpa, eager))
    except Exception as error:  # a model's code fails as it likes
        if isinstance(error, LongNetError) or is_out_of_memory(error):
            raise  # this says nothing of the model, and is not kept
        reason = one_line(error)[:160]
        return f"{architecture} cannot be run {form} ({type(error).__name__}: {reason})"
    if (seconds := time.monotonic() - begun) >= _LONG:
        line = f"{architecture} was tried {form}, on {count} tokens in {seconds:.0f} s; the answer is kept"
        warnings.warn(line, InputWarning, stacklevel=2)
    difference = _difference(actual, right)
    if difference <= allowed:
        return None
    return (
        f"{architecture} {form} differs from its own attention by {difference:.2g} of its nats per token "
        f"({count} tokens)"
    )


def _own(model: PreTrainedModel, implementation: str, ids: Tensor) -> Tensor:
    with attending(model, implementation):
        return hidden_states(model, ids)


def _nats(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return nats (N,), as the output layer alone gives them, or the hidden states (1, N, dim) without such a layer."""
    output: Any = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or output.in_features != hidden.shape[-1]:
        return hidden.float()
    return F.cross_entropy(output(hidden[0]).float(), targets, reduction="none")


def _difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().mean()).item()


def _some_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Return random ids (1, count) of a model, none of them special, such as padding or the place of an image."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    size = min(len(table.weight) for table in tables if table is not None)
    settings = model.config.get_text_config().to_dict()
    of_tokens = [value for key, value in settings.items() if "token" in key]
    special = {value for value in of_tokens if type(value) is int}
    plain = torch.tensor(sorted({*range(size)} - special))
    random = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(plain), (1, count), generator=random)
    device = next(model.parameters()).device
    return plain[chosen].to(device)


def _tokens(model: PreTrainedModel) -> int:
    """Return one token more than the smallest window or chunk in a model's configuration, at least 8, at most MOST."""
    config = model.config.get_text_config().to_dict()
    sizes = [
        x
        for key, x in config.items()
        if isinstance(x, int) and x > 1 and _WINDOWS.search(key) and "layer" not in key
    ]
    longest = config.get("max_position_embeddings")
    longest = longest - first_position(model) if isinstance(longest, int) else MOST
    return min(max(8, min(sizes) + 1) if sizes else FEW, MOST, longest)
