"""LongNet: dilated attention over token streams of any length. Importing this package does not import torch.

A program imports names from here, from `longnet_cli.attention` (the same, and more of attention), for models of
transformers from `longnet_cli.integrations.transformers`, and in place of Prov-GigaPath's package from
`longnet_cli.integrations.gigapath`. Other modules may move.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longnet_cli.attention import (
        DilatedAttention,
        FarKeys,
        KVCache,
        Pattern,
        dilated_attention,
        far_keys,
    )
    from longnet_cli.attention.notation import format_pattern, parse_pattern
    from longnet_cli.basics.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        LongNetError,
        MemoryLimitError,
        NotFiniteError,
    )
    from longnet_cli.basics.events import Events, LeftOut
    from longnet_cli.data.documents.input_documents import Inputs
    from longnet_cli.data.documents.token_documents import Document
    from longnet_cli.data.documents.tokenizer import Tokenizer
    from longnet_cli.jobs.asking import Answer, ask
    from longnet_cli.jobs.batch_functions import embed, encode_batches, score_batches
    from longnet_cli.jobs.benchmark import Measurement, Settings, bench
    from longnet_cli.jobs.encoding import EncodeFacts, encode
    from longnet_cli.jobs.generating import generate
    from longnet_cli.jobs.inspecting import inspect
    from longnet_cli.jobs.job_options import EncodeOptions, ScoreOptions
    from longnet_cli.jobs.row_jobs import ModelFacts
    from longnet_cli.jobs.scoring.measures import Score, Total
    from longnet_cli.jobs.scoring.scoring import score
    from longnet_cli.jobs.tokenizing import tokenize
    from longnet_cli.jobs.training.loop import train
    from longnet_cli.models.folder import ModelFolder
    from longnet_cli.models.official import from_torchscale
    from longnet_cli.nets.config import LongNetConfig, SlideConfig
    from longnet_cli.nets.longnet import LongNet
    from longnet_cli.nets.net import Net
    from longnet_cli.nets.slide import SlideEncoder
    from longnet_cli.running.causal_stream import CausalStream, open_stream
    from longnet_cli.running.chunked_backward import backward_in_chunks

from .basics.version import __version__ as __version__

_MODULES = {
    "attention": "DilatedAttention FarKeys KVCache Pattern dilated_attention far_keys",
    "basics.errors": "CheckpointError ConfigError DataError LongNetError MemoryLimitError NotFiniteError",
    "basics.events": "Events LeftOut",
    "attention.notation": "format_pattern parse_pattern",
    "data.documents.token_documents": "Document",
    "data.documents.input_documents": "Inputs",
    "data.documents.tokenizer": "Tokenizer",
    "jobs.asking": "Answer ask",
    "jobs.benchmark": "Measurement Settings bench",
    "jobs.encoding": "EncodeFacts encode",
    "jobs.batch_functions": "embed encode_batches score_batches",
    "jobs.generating": "generate",
    "jobs.inspecting": "inspect",
    "jobs.job_options": "EncodeOptions ScoreOptions",
    "jobs.row_jobs": "ModelFacts",
    "jobs.scoring.measures": "Score Total",
    "jobs.scoring.scoring": "score",
    "jobs.tokenizing": "tokenize",
    "jobs.training.loop": "train",
    "models.folder": "ModelFolder",
    "models.official": "from_torchscale",
    "nets.config": "LongNetConfig SlideConfig",
    "nets.longnet": "LongNet",
    "nets.net": "Net",
    "nets.slide": "SlideEncoder",
    "running.causal_stream": "CausalStream open_stream",
    "running.chunked_backward": "backward_in_chunks",
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PLACES[name]}")
    found = globals()[name] = getattr(module, name, None) or import_module(
        f"{module.__name__}.{name}"
    )
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
