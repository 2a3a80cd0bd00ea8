"""The training loop: windows of tokens in, a model directory and metrics.jsonl out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from longnet_cli.data.sinks import write_file
from longnet_cli.data.sources import read_documents
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.data.windows import TokenStream, TokenWindows
from longnet_cli.errors import ConfigError, LongNetError
from longnet_cli.model import LongNet
from longnet_cli.runtime.device import check_kernel
from longnet_cli.runtime.launch import Ranks, stop_together

from .gradients import backward
from .metrics import Metrics, MetricsLog
from .optimizer import build_optimizers, learning_rate
from .recipe import Recipe

OnStep = Callable[[int, Metrics | None], None]  # (tokens of the step, a line of metrics every log_every steps)


@dataclass(frozen=True)
class TrainResult:
    """What a run did; `loss` is the last reported mean, nats a token."""

    steps: int
    tokens: int
    loss: float
    output: Path


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    device: torch.device | str = "cpu",
    initial: str | None = None,
    ranks: Ranks | None = None,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train a causal language model and leave it in the directory `output`, with metrics.jsonl and recipe.json.

    Several `ranks` share each sequence, `train.chunk` tokens each, and groups of them the sequences of a step. All hold
    all weights and make the same steps; the first one writes.

    The directory is written every `save_every` steps, at the end, and when the run is interrupted (KeyboardInterrupt
    or SystemExit, which are raised again). `initial` names a model whose weights to start from. Prints nothing.

    Raises ConfigError for a model or tokenizer that does not fit, DataError for too little data, LongNetError when the
    loss is no longer finite (the last written weights stay).
    """
    device, output, ranks = torch.device(device), Path(output), ranks or Ranks()
    check_kernel(device, recipe.train.dtype, recipe.model.head_dim)
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    stages = list(zip(recipe.train.stages, _windows(recipe, tokenizer, ranks), strict=True))
    torch.manual_seed(recipe.train.seed)
    model = _model(recipe, initial).to(device).train()
    optimizers = build_optimizers(model, recipe.optimizer)
    torch.manual_seed(recipe.train.seed + ranks.rank)  # all drew the same weights, and each drops out its own
    log = MetricsLog(output / "metrics.jsonl" if ranks.first else None)

    def save() -> None:
        if ranks.first:
            model.save_pretrained(output, tokenizer.to_json())

    if ranks.first:
        output.mkdir(parents=True, exist_ok=True)
        write_file(output / "recipe.json", (recipe.model_dump_json(indent=2) + "\n").encode())
    step, loss = 0, math.nan
    try:
        with stop_together(ranks) as stop_if_asked:
            for stage, windows in stages:
                for batch_ids, _ in islice(windows, stage.steps):
                    lr = learning_rate(step, recipe.train.steps, recipe.optimizer.lr, recipe.schedule)
                    batch = torch.from_numpy(batch_ids).to(device)
                    found = _step(model, optimizers, batch, _eos(tokenizer), lr, recipe, ranks)
                    if not all(map(math.isfinite, found)):
                        raise LongNetError(
                            f"the loss is not finite at step {step + 1} (loss {found[0]}, gradient norm {found[1]}): "
                            "lower optimizer.lr or lengthen schedule.warmup_steps; the last weights saved in "
                            f"{output} are kept"
                        )
                    tokens = batch[:, 1:].numel() * ranks.dp
                    log.add(tokens, *found)
                    step += 1
                    line = None
                    if step % recipe.train.log_every == 0 or step == recipe.train.steps:
                        line = log.write(step, lr, stage.seq_len)
                        loss = line.loss
                    if on_step:
                        on_step(tokens, line)
                    if step % recipe.train.save_every == 0:
                        save()
                    stop_if_asked()
    except (KeyboardInterrupt, SystemExit):
        save()
        raise
    save()
    return TrainResult(step, log.tokens, loss, output)


def _step(
    model: LongNet,
    optimizers: list[torch.optim.Optimizer],
    batch: Tensor,
    eos_id: int,
    lr: float,
    recipe: Recipe,
    ranks: Ranks,
) -> tuple[float, float]:
    """One optimizer step on (rows, seq_len + 1) tokens; the mean loss in nats a token, and the gradient's norm."""
    targets = batch[:, 1:].numel() * ranks.dp  # of all ranks together
    total = backward(
        model,
        batch[:, :-1],
        batch[:, 1:],
        chunk=recipe.train.chunk,
        scale=1 / targets,
        dtype=recipe.train.dtype,
        eos_id=None if recipe.train.across_documents else eos_id,
        group=ranks.group,
    )
    ranks.sum(total, *(p.grad for p in model.parameters() if p.grad is not None))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total.item() / targets, norm.item()


def _windows(recipe: Recipe, tokenizer: Tokenizer, ranks: Ranks) -> list[TokenWindows]:
    """The training data, cut into the windows of each stage."""
    data, train, eos_id = recipe.data, recipe.train, _eos(tokenizer)
    sources = []
    for source in data.sources:
        documents = read_documents(source.inputs, tokenizer, column=data.column, vocab_size=recipe.model.vocab_size)
        sources.append(TokenStream(list(documents), eos_id))
    weights = [source.weight for source in data.sources]
    return [
        TokenWindows(
            sources,
            stage.seq_len,
            max(1, train.batch_tokens // stage.seq_len // ranks.dp),
            train.seed + index,
            weights=weights,
            rank=ranks.dp_rank,
            world=ranks.dp,
        )
        for index, stage in enumerate(train.stages)
    ]


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ConfigError("the tokenizer has no end-of-text token, which training puts between documents")
    return tokenizer.eos_id


def _model(recipe: Recipe, initial: str | None) -> LongNet:
    if not recipe.model.causal:
        raise ConfigError("`longnet train` trains causal language models: set model.causal = true")
    if initial is None:
        return LongNet(recipe.model)
    model = LongNet.from_pretrained(initial)
    if model.config != recipe.model:
        changed = [
            name
            for name in type(model.config).model_fields
            if getattr(model.config, name) != getattr(recipe.model, name)
        ]
        raise ConfigError(f"{initial} differs from the recipe in model.{', model.'.join(changed)}")
    return model
