"""Compare three measures of what long context brings to a document, and the ranks that they give.

    python examples/gain_forms.py longnet-tiny longnet_cli examples --short 64 --long 1Ki > forms.jsonl

For each token, with the model's distributions p after the long context and q after the short one: `gain`, the
difference of the losses, log p(token) - log q(token), which is the column of `longnet score -o`; `weighted`, the same
times p(token); and `kl`, the mean of log p - log q over all tokens, by p, whatever the token is. A line has the means
of a document, in nats; stderr gets the rank correlations, and what the best quarters by two measures have in common.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys

import numpy as np
import torch
from torch import Tensor

from longnet_cli import Inputs, ModelFolder, Net
from longnet_cli.basics.sizes import parse_size

FORMS = ("gain", "weighted", "kl")


@torch.inference_mode()
def logprobs(net: Net, inputs: Tensor, context: int) -> Tensor:
    """Return the log-probabilities (n, vocab_size) after each of (n,) inputs, in windows of `context` of them."""
    rows, rest = (
        inputs[: len(inputs) // context * context].view(-1, context),
        inputs[len(inputs) // context * context :],
    )
    hidden = [net(window[None])[0] for window in rows] if len(rows) == 1 else [*net(rows)] if len(rows) else []
    hidden += [net(rest[None])[0]] if len(rest) else []
    return net.logits(torch.cat(hidden)).log_softmax(-1)


def measures(net: Net, sequence: Tensor, short: int, long: int) -> dict[str, float]:
    """Return the means of FORMS over the tokens (n,) of a sequence, from the second on."""
    inputs, ids, sums = sequence[:-1], sequence[1:], dict.fromkeys(FORMS, 0.0)
    for begin in range(0, len(ids), long):
        part = slice(begin, begin + long)
        p, q = (logprobs(net, inputs[part], context) for context in (long, short))
        gain, likely = ((x.gather(1, ids[part, None])[:, 0]) for x in (p - q, p))
        sums["gain"] += float(gain.sum())
        sums["weighted"] += float((gain * likely.exp()).sum())
        sums["kl"] += float((p.exp() * (p - q)).sum())
    return {name: value / len(ids) for name, value in sums.items()}


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--short", type=parse_size, default=64)
    parser.add_argument("--long", type=parse_size, default=1024)
    options = parser.parse_args()
    loaded = ModelFolder.find(options.model).load(device=torch.device("cpu"))
    start = torch.tensor([] if loaded.bos is None else np.atleast_1d(loaded.bos), dtype=torch.int64)
    rows = []
    for document in Inputs(options.inputs, loaded.tokenizer).documents():
        if len(document) > options.short:
            ids = torch.from_numpy(document.read(0, len(document)).astype(np.int64))
            rows.append(measures(loaded.net, torch.cat((start, ids)), options.short, options.long))
            print(json.dumps({"doc_id": document.doc_id, "n_tokens": len(ids), **rows[-1]}), flush=True)
    columns = {name: np.array([row[name] for row in rows]) for name in FORMS}
    for one, other in itertools.combinations(FORMS, 2):
        correlation = np.corrcoef(ranks(columns[one]), ranks(columns[other]))[0, 1]
        best = [{*np.argsort(-columns[name])[: len(rows) // 4].tolist()} for name in (one, other)]
        common = len(best[0] & best[1]) / max(1, len(best[0]))
        print(
            f"{one}, {other}: rank correlation {correlation:.3f}, best quarter {common:.0%} the same", file=sys.stderr
        )


if __name__ == "__main__":
    main()
