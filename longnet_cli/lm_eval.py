"""lm-eval's command with the models of `longnet`: a LongNet, or a model of transformers with a pattern.

    python -m longnet_cli.lm_eval --model longnet --model_args pretrained=./my-model --tasks TASKS

Documents are read as the commands of `longnet` read them. Long ones are read chunk by chunk, so memory does not depend
on the length of a document. Its log-likelihood is the same as in `longnet score`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    needed = f"lm-eval cannot be imported ({error}): pip install 'longnet-cli[lm-eval]'"
    if __name__ == "__main__":
        print(f"longnet: error: {needed}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(needed) from None

from longnet_cli.attention.notation import read_pattern
from longnet_cli.basics.errors import ConfigError, LongNetError
from longnet_cli.data.documents import Document
from longnet_cli.jobs.generating import generate
from longnet_cli.jobs.scoring.scoring import score
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.net import LOGITS_LIMIT, bos_ids
from longnet_cli.running.device import DTYPES, precision, resolve_dtype
from longnet_cli.running.reader import Piece, Reader, Window

_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "seed")  # options that a task may set


@register_model("longnet")
class LongNetLM(TemplateLM):
    """A model for lm-eval. `pretrained` is a folder, with a slash, or a name as in --model.

    `pattern` (a text of `longnet_cli.attention.notation`) replaces the model's own. `dtype` and `chunk` are as in
    `running.reader.Reader`. A batch is what fits a chunk, whatever the `batch_size`. With `max_length`, the model sees
    at most this many tokens: the end of a context, or a document in windows. Without it, the model sees all tokens, and
    a request longer than the model reads is a ConfigError before any work. By default, a context starts with the ids
    that the tokenizer's template puts before a text. With `add_bos_token`, it starts with the ids that the model reads
    before documents.

    Raises ConfigError and CheckpointError as the commands do.
    """

    def __init__(
        self,
        pretrained: str,
        pattern: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        chunk: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        folder = ModelFolder.find(str(pretrained))
        self.origin, tokenizer = folder.origin, folder.tokenizer()
        if tokenizer is None:
            raise ConfigError(f"{folder.path}: there is no tokenizer.json, without which texts cannot be read")
        self.tokenizer = tokenizer
        device = device or "cuda"  # lm-eval's command says cuda on every machine
        self._device = torch.device(device if torch.cuda.is_available() or not device.startswith("cuda") else "cpu")
        self.options: dict[str, Any] = {"dtype": dtype, "chunk": chunk}
        self.max_length, self.max_gen_toks = max_length, max_gen_toks
        self.bos, self.ends = folder.bos(tokenizer), folder.ends(tokenizer)
        self.before = bos_ids(self.bos) if add_bos_token else tokenizer.ids_around[0]
        weights = DTYPES[resolve_dtype(dtype, self._device)]
        self.net = folder.net(pattern=read_pattern(pattern, "pattern"), device=self._device, dtype=weights)

    def get_model_info(self) -> dict[str, str]:
        """Return what lm-eval adds to its results: the model, with the commit of one that is on a hub."""
        return {"pretrained": self.origin}

    @property
    def tokenizer_name(self) -> str:
        """The digest of the tokenizer, for caches of requests."""
        return self.tokenizer.sha256

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without a context. Raises ConfigError if the model reads no id before a document."""
        if not (ids := bos_ids(self.bos)):
            raise ConfigError("the tokenizer has no token that starts a text, and lm-eval needs one before it")
        return ids[-1]

    @property
    def eot_token_id(self) -> int:
        return min(self.ends, default=self.prefix_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text. The start ids come first, unless `add_special_tokens` is False."""
        ids = self.tokenizer.encode(string).tolist()
        return ids if add_special_tokens is False else [*self.before, *ids]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in nats, as `longnet score` sums it."""
        texts = [self._document(i, self.tokenizer.encode(text)) for i, (text,) in enumerate(r.args for r in requests)]
        if not any(map(len, texts)):
            return [0.0] * len(texts)
        found = score(self.net, texts, bos=self.bos, stored=texts, context=self.max_length, **self.options)
        return [-each.score.nll_sum for each in found]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether each of its ids was the likeliest."""
        windows = [self._window(i, context, more) for i, (_, context, more) in enumerate(requests)]
        sums, greedy = [0.0] * len(windows), [True] * len(windows)
        for pieces in Reader(self.net, **self.options).read(windows):
            for piece in pieces:
                nats, likeliest = self._targets(piece)
                sums[piece.window.index] += nats
                greedy[piece.window.index] &= likeliest
        return list(zip(sums, greedy, strict=True))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to a text in `until`, an end id, or `max_gen_toks` tokens."""
        return [self._generate(i, *request.args) for i, request in enumerate(requests)]

    def _generate(self, index: int, context: str, options: dict[str, Any]) -> str:
        if unknown := [name for name in options if name not in _GENERATION]:
            raise ConfigError(f"generation has no {unknown[0]}: it knows {', '.join(_GENERATION)}")
        until = options.get("until") or ()
        most = int(options.get("max_gen_toks", self.max_gen_toks))
        ids = self.tok_encode(context) or [self.prefix_token_id]
        ids = ids[-max(1, self.max_length - most) :] if self.max_length else ids
        steps = generate(
            self.net,
            self._document(index, np.array(ids)),
            bos=None,
            tokenizer=self.tokenizer,
            max_tokens=most,
            temperature=float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            seed=int(options.get("seed", 0)),
            end_ids=self.ends,
            stop=[until] if isinstance(until, str) else [text for text in until if text],
            **self.options,
        )
        return "".join(step.text for step in steps)

    def _document(self, index: int, ids: np.ndarray) -> Document:
        return Document(str(index), ids, None, f"request {index}", limit=self.net.config.vocab_size)

    def _window(self, index: int, context: list[int], more: list[int]) -> _RequestWindow:
        """Return the ids of a request to read: all but the last. From the context's last on, each predicts a target."""
        ids = np.array((context + more)[-(self.max_length + 1) :] if self.max_length else context + more)
        read, wanted = len(ids) - 1, len(ids) - min(len(more), len(ids) - 1) - 1
        instead = "give max_length, to see the last tokens alone"
        sequence = self.net.sequence(self._document(index, ids)).check(instead, read, skips=False)
        return _RequestWindow(sequence, 0, read, wanted, index)

    @torch.inference_mode()
    def _targets(self, piece: Piece[_RequestWindow]) -> tuple[float, bool]:
        """Return the log-likelihood of the ids that a piece predicts, and whether each is the likeliest."""
        total, likeliest = 0.0, True
        if piece.hidden is None or not len(piece):
            return total, likeliest
        targets = torch.from_numpy(piece.window.sequence.read(piece.start + 1, piece.stop + 1)).to(self._device)
        size = max(1, LOGITS_LIMIT // self.net.config.vocab_size)
        for hidden, wanted in zip(piece.hidden.split(size), targets.split(size), strict=True):
            with precision(self.options["dtype"], self._device):
                logits = self.net.logits(hidden)
            total += float(logits.float().log_softmax(-1).gather(1, wanted[:, None]).sum(dtype=torch.float64))
            likeliest &= bool((logits.argmax(-1) == wanted).all())
        return total, likeliest


@dataclass(frozen=True)
class _RequestWindow(Window):
    """The context and the continuation of request `index`."""

    index: int


def main(args: Iterable[str] | None = None) -> None:
    """Run lm-eval's command. An error of `longnet` becomes one line on stderr and its exit code."""
    from lm_eval.__main__ import cli_evaluate

    if args is not None:
        sys.argv[1:] = args
    try:
        cli_evaluate()
    except LongNetError as error:
        print(f"longnet: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
