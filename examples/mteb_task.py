"""Run a retrieval task of mteb on a local file: each `first` text of bench/pairs.jsonl is to find its `second`.

    pip install mteb 'longnet-cli[hf,sentence-transformers]'
    python examples/retrieval.py make bench archives/*
    python examples/mteb_task.py bench ./runs/embedder --task man

The model is a folder that `longnet train` wrote. Prints nDCG at 10 and recall at 1, as mteb counts them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

import longnet_cli.integrations.transformers

assert longnet_cli.integrations.transformers  # which registers what SentenceTransformer opens


class LocalPairs(AbsTaskRetrieval):
    """The pairs of one task of a benchmark."""

    pairs: list[dict[str, str]]
    metadata = TaskMetadata(
        name="LocalPairs",
        description="A first text finds its second one.",
        dataset={"path": "local", "revision": "1"},
        type="Retrieval",
        category="t2t",
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **options: Any) -> None:
        """Make queries, corpus and judgements of the pairs."""
        texts = {
            side: Dataset.from_list([{"id": str(i), "text": pair[side]} for i, pair in enumerate(self.pairs)])
            for side in ("first", "second")
        }
        found = {str(i): {str(i): 1} for i in range(len(self.pairs))}
        split = {"queries": texts["first"], "corpus": texts["second"], "relevant_docs": found, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a retrieval task of mteb on local pairs.")
    parser.add_argument("folder", type=Path, help="made by examples/retrieval.py")
    parser.add_argument("model")
    parser.add_argument("--task", default="man")
    parser.add_argument("--pairs", type=int, help="only so many")
    parser.add_argument("--read", type=int, help="only the first so many tokens of each text")
    args = parser.parse_args()
    rows = map(json.loads, (args.folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines())
    task = LocalPairs()
    task.pairs = [row for row in rows if row["task"] == args.task][: args.pairs]
    model = SentenceTransformer(args.model, trust_remote_code=True)
    model.max_seq_length = args.read or model.max_seq_length
    (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False).task_results
    scores = result.scores["test"][0]
    print(json.dumps({"task": args.task, "ndcg_10": scores["ndcg_at_10"], "recall_1": scores["recall_at_1"]}))


if __name__ == "__main__":
    main()
