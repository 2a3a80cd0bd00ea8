"""Print the best loss of a model without context, in nats per token, to compare with a trained loss.

    python examples/unigram.py runs/stdlib/tokens @runs/stdlib/held_out.txt

The first argument is a folder of shards with its tokenizer, the others are held-out inputs. Prints the cross-entropy of
the held-out tokens under their frequencies in the shards (each counted once more, so that none is 0). Then prints the
loss of the best guess without context under the masked objective, where a fifth of the tokens to predict are not
hidden: half of these are unchanged, half are replaced by any token.
"""

from __future__ import annotations

import sys

import numpy as np

from longnet_cli import Inputs, Tokenizer
from longnet_cli.jobs.training.evaluation import MASKED, RANDOM


def frequencies(inputs: list[str], tokenizer: Tokenizer, more: float = 0.0) -> np.ndarray:
    """Return the share of each token id, (vocab_size,), after adding `more` to each count."""
    counts = np.full(tokenizer.vocab_size, more)
    for document in Inputs(inputs, tokenizer).documents():
        counts += np.bincount(document.read(0, len(document)), minlength=len(counts))
    return counts / counts.sum()


def without_context(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """Return (cross-entropy, masked loss) of tokens distributed as q, guessed by p; both are (vocab_size,)."""
    hidden = -(q * np.log(p)).sum()
    stays = 1 - MASKED - RANDOM
    kept = stays * p / (stays * p + RANDOM / len(p))  # the chance that a visible token is the one to predict
    same = -(q * np.log(kept + (1 - kept) * p)).sum()
    # a token v is seen in its place, all with the same chance: the guess is p, less the part given to v itself
    other = hidden - np.log1p(-kept).mean()
    other += ((np.log1p(-kept) + np.log(p) - np.log(kept + (1 - kept) * p)) * q).sum() / len(p)
    return float(hidden), float(MASKED * hidden + stays * same + RANDOM * other)


def main(tokens: str, *held_out: str) -> None:
    tokenizer = Tokenizer.load(tokens)
    p, q = frequencies([tokens], tokenizer, more=1.0), frequencies(list(held_out), tokenizer)
    unigram, masked = without_context(p, q)
    print(f"unigram cross-entropy {unigram:.4f} nats, masked objective without context {masked:.4f} nats")


if __name__ == "__main__":
    main(*sys.argv[1:])
