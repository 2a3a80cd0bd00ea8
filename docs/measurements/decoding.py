"""Measure the CPU time per new token of a Hugging Face model: dilated, and by transformers' own `generate`.

    OMP_NUM_THREADS=1 python docs/measurements/decoding.py runs/real/smollm2 dense window:1Ki,sinks=4 finding

At each context and batch, they take turns in one process, a few tokens each, so that other load on the machine slows
all. "transformers" is `model.generate` with a DynamicCache and sdpa, "LongNetCache" is the same with ours and dilated
attention, and "longnet" is what `longnet generate` does, for a batch of one. No context is read: caches start with
random keys. It writes one line of JSON per measurement, `pattern, context, batch, decoder, ms` (the median) and
`ratio`, to the median of transformers.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers as hf

from longnet_cli import CausalStream, Document, ModelFolder, Net, generate, parse_pattern
from longnet_cli.attention import Pattern
from longnet_cli.basics.sizes import parse_size
from longnet_cli.integrations.transformers import LongNetCache
from longnet_cli.models.hf.longnet_cache import AlignedRows

TURN = 4  # tokens that a decoder makes before it is the next one's turn


def random_rows(config: Any, batch: int, tokens: int) -> Iterator[list[torch.Tensor]]:
    """Yield q, k and v (batch, tokens, heads, head_dim) for each layer; `config` is the model's."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for _ in range(config.num_hidden_layers):
        yield [torch.randn(batch, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]


def by_transformers(model: hf.PreTrainedModel, batch: int, context: int, pattern: Pattern | None) -> Iterator[float]:
    """Yield the seconds of each next token of `model.generate`, with a LongNetCache if there is a pattern."""
    cache = LongNetCache(model.config) if pattern else hf.DynamicCache(config=model.config)
    for index, (q, k, v) in enumerate(random_rows(model.config, batch, context - 1)):
        if pattern:
            memory = cache.layers[index]
            memory.expect(batch)
            memory.cache(AlignedRows(None, 0, 0, 0, None), pattern, q.shape[2], k).append(k, v, q=q)
            memory.step(context - 1)
        elif context > 1:
            cache.update(k.transpose(1, 2), v.transpose(1, 2), index)
    ids, times = torch.ones(batch, context, dtype=torch.int64), []

    def note(*_: Any, **__: Any) -> torch.Tensor:
        times.append(time.process_time())
        return torch.zeros(batch, dtype=torch.bool)

    while True:
        times.clear()
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, eos_token_id=None,
            max_new_tokens=TURN + 1, stopping_criteria=[note],
        )  # fmt: skip
        yield from (after - before for before, after in pairwise(times))


def by_longnet(net: Net, context: int) -> Iterator[float]:
    """Yield the seconds of each next token of the job behind `longnet generate`."""
    stream, config = CausalStream(net), net.model.config
    for q, k, v in random_rows(config, 1, context - 1):
        stream.caches.append(stream._new_cache(k))
        stream.caches[-1].append(k, v, q=q)
    stream.position = context - 1
    prompt = Document("prompt", np.ones(1, np.int64), None, "prompt")
    before = None
    for _ in generate(net, prompt, bos=None, tokenizer=None, max_tokens=1 << 20, stream=stream):
        after = time.process_time()
        if before is not None:
            yield after - before
        before = time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model folder of transformers")
    parser.add_argument("pattern", nargs="+")
    parser.add_argument("--context", nargs="+", type=parse_size, default=[1, 1000, 10_000])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=60, help="of each decoder (%(default)s)")
    args = parser.parse_args()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # newer versions of transformers rename past_key_values
    own = hf.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for written in args.pattern:
        pattern = parse_pattern(written)
        net = ModelFolder.find(str(args.model)).net(pattern=pattern)
        for context in args.context:
            for batch in args.batch:
                decoders = {
                    "transformers": by_transformers(own, batch, context, None),
                    "LongNetCache": by_transformers(net.model, batch, context, pattern),
                } | ({"longnet": by_longnet(net, context)} if batch == 1 else {})
                seconds: dict[str, list[float]] = {name: [] for name in decoders}
                for turn in range(1 + -(-args.tokens // TURN)):
                    for name, decoder in decoders.items():
                        found = [next(decoder) for _ in range(TURN)]
                        seconds[name] += found if turn else []  # the first turn warms up
                of = {name: median(found) for name, found in seconds.items()}
                for name, found in of.items():
                    row = {"pattern": written, "context": context, "batch": batch, "decoder": name}
                    row |= {"ms": round(found * 1e3, 1), "ratio": round(found / of["transformers"], 3)}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
