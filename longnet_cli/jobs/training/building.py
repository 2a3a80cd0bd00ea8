"""The parts of a run, built by its recipe: the data, the model, the optimizers, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents import Document
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.names import Sources
from longnet_cli.data.tokenizer import NO_END, Tokenizer
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.ranks.fsdp import is_sharded
from longnet_cli.running.ranks.ranks import Ranks

from .recipe import OptimizerRecipe, Recipe, ScheduleRecipe, TrainRecipe
from .start import check_vocabulary
from .windows import TokenStream, TokenWindows


class TrainingData(NamedTuple):
    """The documents that a run reads, as ids of its tokenizer."""

    tokenizer: Tokenizer
    eos_id: int  # the first token of each document
    windows: list[TokenWindows]  # of each stage
    held_out: list[Document]


def build_data(
    recipe: Recipe, ranks: Ranks, initial: str | None = None, tokenizer_differs: bool = False
) -> TrainingData:
    """Open the data of a recipe, and cut them into windows. The model `initial` must have their tokenizer.

    Raises ConfigError where there are no data, or where their tokens are not the model's, DataError for too few.
    """
    data, train = recipe.data, recipe.train
    tokenizer = Tokenizer.load(data.tokenizer).with_eos(data.eos)
    eos_id = _before_documents(recipe, tokenizer)
    check_vocabulary(recipe, tokenizer)
    if initial:
        ModelFolder.find(initial).tokenizer(data.tokenizer, differs=tokenizer_differs)

    def documents(sources: Sources) -> list[Document]:
        return list(Inputs(sources, tokenizer, data.column, vocab_size=recipe.model.vocab_size).documents())

    if not data.sources:
        raise ConfigError("no training data: give --data INPUT, or set data.train or [[data.mix]] in the recipe")
    streams = [TokenStream(documents(source.files), eos_id) for source in data.sources]
    weights = [source.weight for source in data.sources]
    windows = [
        TokenWindows(
            streams,
            stage.seq_len,
            train.windows(stage) // ranks.dp,
            train.seed + index,
            weights=weights,
            rank=ranks.dp_rank,
            world=ranks.dp,
        )
        for index, stage in enumerate(train.stages)
    ]
    held_out = documents(data.held_out_files) if data.held_out_files else []
    if data.held_out_files and not any(map(len, held_out)):
        raise DataError(f"data.held_out, {', '.join(map(str, data.held_out_files.names))}: every document is empty")
    return TrainingData(tokenizer, eos_id, windows, held_out)


def _before_documents(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Return the id with which each document starts: end-of-text, or what a Hugging Face model was trained with."""
    if recipe.pretrained is None or recipe.data.eos is not None:
        token_id: int | tuple[int, ...] | None = tokenizer.eos_id
    else:
        token_id = ModelFolder.find(recipe.pretrained.init).bos(tokenizer)
    if token_id is None:
        raise ConfigError(f"{NO_END}; training puts it between documents: name a token or an id (--eos, data.eos)")
    if not isinstance(token_id, int):
        raise ConfigError(f"{recipe.init} starts a document with {len(token_id)} tokens, and training puts one there")
    return token_id


def build_model(recipe: Recipe, initial: str | None, on_note: Callable[[str], None]) -> Net:
    """Return the net, with the weights of the model `initial`, or with random ones.

    `on_note` gets lines for the user. Raises ConfigError where `initial` is another net than the recipe's.
    """
    torch.manual_seed(recipe.train.seed)
    if pretrained := recipe.pretrained:
        return ModelFolder.find(pretrained.init).trainable(pretrained.model, pretrained.adapter, on_note)
    if initial is None:
        return LongNet(recipe.model)
    folder = ModelFolder.find(initial)
    model = folder.native().from_pretrained(folder.path, pattern=recipe.model.pattern)
    if model.config != recipe.model:
        fields = type(recipe.model).model_fields
        changed = [name for name in fields if getattr(model.config, name) != getattr(recipe.model, name)]
        raise ConfigError(f"{initial} differs from the recipe in model.{', model.'.join(changed)}")
    return model


def change_layers(model: Net, train: TrainRecipe) -> None:
    """Compile the layers, and let them compute their activations again, as the recipe says."""
    for layer in model.blocks:
        if train.compile:
            layer.forward = torch.compile(layer.forward)
        if train.activation_checkpointing:
            layer.forward = partial(activation_checkpoint, layer.forward, use_reentrant=False)


def build_optimizers(model: Net, recipe: OptimizerRecipe) -> list[torch.optim.Optimizer]:
    """Return fused AdamW and, if the recipe asks for it, Muon for the matrices of the layers. Only matrices decay.

    If weights are to be sharded over ranks (`running.ranks.fsdp`), shard them first. Raises ConfigError for Muon on
    sharded weights.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    of_layers = {id(p) for block in model.blocks for p in block.parameters()}
    tables = [p for p in trained if p.dim() >= 2 and id(p) not in of_layers]
    matrices = [p for p in trained if p.dim() >= 2 and id(p) in of_layers]
    vectors = [p for p in trained if p.dim() < 2]
    muon = recipe.name == "muon"
    groups = [
        {"params": tables if muon else tables + matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if muon and is_sharded(model):
        raise ConfigError('optimizer.name = "muon" works on whole matrices: give --shard none, or take "adamw"')
    adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
    if not muon:
        return [adamw]
    # Muon's updates are scaled to the size of AdamW's, so one learning rate serves both
    return [
        _Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        adamw,
    ]


class _Muon(torch.optim.Muon):
    """Muon as torch has it, but in fp32 on a CPU: torch's is in bf16, for which most CPUs have no instructions."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with _Fp32ForBf16() if self.param_groups[0]["params"][0].is_cpu else nullcontext():
            return super().step(closure)


class _Fp32ForBf16(TorchFunctionMode):
    """Makes `x.bfloat16()` a copy in fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def learning_rate(step: int, total: int, peak: float, schedule: ScheduleRecipe) -> float:
    """Return the learning rate of a step, 0 .. total - 1."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    done = (step - schedule.warmup_steps) / max(1, total - 1 - schedule.warmup_steps)
    share = (1 + math.cos(math.pi * done)) / 2 if schedule.decay == "cosine" else (1 - done) ** schedule.power
    return peak * (schedule.final + (1 - schedule.final) * share)
