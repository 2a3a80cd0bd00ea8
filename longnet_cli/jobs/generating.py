"""The `generate` job: a prompt of any length goes in chunk by chunk, then tokens come out one by one.

    prompt --chunks--> stream --last hidden--> logits --Sampler--> id --TextStream, StopTexts--> text
                          ^                                         |
                          +-----------------------------------------+

Scoring reads long documents with the same stream; here, a new token is a chunk of one. Time and memory per token depend
only on how many keys the pattern lets a token see.

Text comes as its tokens come: never half a character, and nothing from a stop text on.

    id --TextStream--> whole characters --StopTexts--> text to show, and whether a stop text came
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from longnet_cli.basics.errors import ConfigError, DataError, NotFiniteError
from longnet_cli.basics.events import Events
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import TextStream, Tokenizer
from longnet_cli.models.folder import Loaded, ModelFolder
from longnet_cli.nets.net import Bos, InputSequence, Net, bos_ids
from longnet_cli.running.causal_stream import CausalStream, open_stream
from longnet_cli.running.device import precision, runs_ahead, select_device
from longnet_cli.running.reader import Reader, chunk_of, default_chunk

from .job_options import check_sampling
from .reading_plan import ReadingPlan, Task

NEW_TOKENS = 5  # of which the time between two is measured
ZERO = Document("zero", np.zeros(1, np.int64), None, "a prompt of one token")


class StopTexts:
    """A filter that passes text on until the first of `texts` appears in it, in one part or across several."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._held = ""  # text that may be the start of a stop text
        self.reached = False

    def add(self, text: str) -> str:
        """Return the text that certainly belongs to no stop text."""
        pending = self._held + text
        ends = [pending.index(stop) for stop in self._texts if stop in pending]
        self.reached = bool(ends)
        end = min(ends, default=len(pending))
        self._held = ""
        if not ends:
            end -= max((_common(pending, stop) for stop in self._texts), default=0)
            self._held = pending[end:]
        return pending[:end]

    def end(self) -> str:
        """Return the text that was held back."""
        held = self._held
        self._held = ""
        return held


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """Return the stop texts as a list. A text alone is one of them, and no sequence of letters."""
    return [stop] if isinstance(stop, str) else [*stop]


def _common(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is also a proper start of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


FinishReason = Literal["eos", "stop", "length"]


class Step(NamedTuple):
    """One new token: its id, its log-probability under the model in nats, and the text that it completes.

    `finish_reason` says why the token is the last: an end-of-text id, a stop text, or the number of tokens. For any
    other token it is None.
    """

    id: int
    logprob: float
    text: str
    finish_reason: FinishReason | None


@cache
def load_model(name: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Return the model that --model would name, with the chat template that it may have: loaded once per process."""
    return ModelFolder.find(name, gguf=True).load(
        device=select_device(device),
        dtype=dtype,
        chat=None,
    )


def generate(
    model: str | Loaded | Net,
    prompt: Document | str | Sequence[Mapping[str, str]],
    *,
    chat: bool = False,
    bos: Bos | Literal["own"] = "own",
    tokenizer: Tokenizer | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    number: int = 0,
    end_ids: Collection[int] | None = None,
    stop: str | Sequence[str] = (),
    chunk: int | None = None,
    dtype: str = "auto",
    stream: CausalStream | None = None,
    events: Events = Events(),  # noqa: B008
) -> Iterator[Step]:
    """Yield up to `max_tokens` tokens that continue `bos` and `prompt`, each as soon as it is known.

    The `model` is named, and loaded once, or it is what `ModelFolder.load` returns. Then `tokenizer` and `end_ids` are
    its own unless they are given, and so is `bos` where no chat and no `stream` has begun. A net alone needs `bos`.

    The `prompt` may be a text, for the `tokenizer`. With `chat`, it is a user's message in the model's chat template;
    so are several messages, each with a `role` and a `content`.

    At `temperature` 0, each token is the likeliest one, the first if several are equal. Otherwise it is drawn from the
    softmax of the logits over the temperature, cut to the fewest tokens whose probabilities sum to `top_p`. The random
    numbers are those of `seed` and of the `number` of the prompt among several. Generation ends at one of `end_ids`,
    whose text is not shown, and at `stop`, a text or several, no part of which is shown. `tokenizer` decodes texts, in
    whole characters; without it, they are empty.

    `stream` reads the prompt after all that it has read before. When the iterator ends, it has read the new tokens,
    too, and is ready for the next prompt. With it, the prompt may be empty, and `max_tokens` 0.

    `chunk` and `dtype` are as in `running.reader.Reader`. `events.progress` gets the number of prompt tokens that each
    forward pass has read. Raises ConfigError for a model that cannot generate, invalid options, a chat without a
    template, and a prompt longer than the model reads; DataError if there is nothing to continue; NotFiniteError for a
    logit that is NaN.
    """
    loaded = _loaded(model, dtype, bos)
    net = loaded.net
    tokenizer = tokenizer or loaded.tokenizer
    chats = chat or not isinstance(prompt, str | Document)
    read = 0  # tokens before the prompt
    unread = 1  # the last new token
    if stream:
        read = stream.position
        unread = 0
    _check(net, max_tokens, least=unread)
    check_sampling(temperature, top_p)
    stops = stop_texts(stop)
    if "" in stops or (stops and not tokenizer):
        raise ConfigError("a stop text needs characters, and a tokenizer")
    if chats or not isinstance(prompt, Document):
        prompt = _prompt(loaded.chat if chats else tokenizer, prompt, chats)
    if bos == "own":
        bos = None if chats or read else loaded.bos
    sequence = _sequence(net, prompt, bos, read)
    if sequence.limit is not None:
        max_tokens = min(max_tokens, sequence.limit - read - len(sequence) + unread)
    generator = _Generator(
        net,
        Sampler(temperature, top_p, seed, number),
        loaded.ends if end_ids is None else end_ids,
        TextStream(tokenizer) if tokenizer else None,
        StopTexts(stops),
        chunk_of(chunk, default_chunk(net.config, next(net.parameters()).device)),
        dtype,
        stream or open_stream(net),
        events.progress,
    )
    return generator.run(sequence, max_tokens, reads_all=not unread)


def _loaded(model: str | Loaded | Net, dtype: str, bos: Bos | Literal["own"]) -> Loaded:
    """Return the model with what belongs to it. A net alone has nothing, and needs `bos`: raises ConfigError."""
    loaded = load_model(model, dtype=dtype) if isinstance(model, str) else model
    if isinstance(loaded, Loaded):
        return loaded
    if bos == "own":
        raise ConfigError(
            "a net alone does not say what it reads before a text: give bos, or a model by its name"
        )
    return Loaded(loaded, None, None, frozenset(), None, "")


def _prompt(tokenizer: Any, prompt: object, chats: bool) -> Document:
    """Return a prompt in the ids of a tokenizer, which may be a chat template. Raises ConfigError without it."""
    if tokenizer is None:
        raise ConfigError(f"a prompt of text needs a tokenizer{', and a chat template' * chats}")
    return Document("prompt", tokenizer.encode(prompt), None, "the prompt")


def _sequence(net: Net, prompt: Document, bos: Bos, read: int) -> InputSequence[Document]:
    """Return a prompt as the net reads it after `read` tokens. Raises DataError for no token, TooLongError for many."""
    sequence = net.sequence(prompt, bos)
    tokens = read + len(sequence)
    if not tokens:
        raise DataError(
            f"{prompt.where}: the prompt is empty, and nothing stands before it: there is nothing to continue"
        )
    return sequence.check("give a shorter prompt", tokens, skips=False)


def plan_generation(
    model: Net,
    prompts: Iterable[Document],
    bos: Bos,
    max_tokens: int,
    chunk: int,
) -> ReadingPlan:
    """Count the reading of prompts, and of the most tokens that continue each. Raises as `generate`."""
    _check(model, max_tokens, least=0)
    plan = ReadingPlan(model.config, chunk, streamed=True)
    before = len(bos_ids(bos))
    begin = time.perf_counter()
    for prompt in prompts:
        model.sequence(prompt, bos).check("give a shorter prompt", skips=False)
        plan.add_document(len(prompt))
        plan.add_example(prompt)
        of_prompt = before + len(prompt)
        tokens = of_prompt + max_tokens
        tokens = min(tokens, model.config.max_tokens or tokens)  # where generation ends
        plan.add([(tokens, 0)])
        plan.new += tokens - of_prompt
    # new tokens are read one by one
    plan.largest = min(plan.largest, plan.longest_document + before)
    plan.seconds = time.perf_counter() - begin
    return plan


def trial_of(loaded: Loaded, bos: Bos) -> Task:
    """Return what reads prompts, and makes a new token after each, to try it."""

    def read(reader: Reader, prompts: Iterable[Document]) -> None:
        for prompt in prompts:
            new = generate(
                loaded,
                prompt,
                bos=bos,
                max_tokens=1,
                chunk=reader.chunk,
                dtype=reader.dtype,
            )
            list(new)

    return Task(read, lambda tokens: [(tokens, 0)])


def seconds_of_new_token(loaded: Loaded, dtype: str) -> float:
    """Return the seconds that a new token takes, the least of NEW_TOKENS after a prompt of one."""
    steps = generate(loaded, ZERO, bos=None, max_tokens=NEW_TOKENS, end_ids=(), dtype=dtype)
    moments = [time.perf_counter() for _ in steps]
    return float(np.diff(moments).min())


class Sampler:
    """A sampler of ids from logits (vocab_size,). Log-probabilities are the model's, before temperature and top_p.

    Random numbers are drawn on the CPU, one per token, so a seed gives the same tokens on any device, up to rounding.
    Those of another prompt, by its `number`, are others.
    """

    def __init__(
        self,
        temperature: float,
        top_p: float,
        seed: int,
        number: int = 0,
    ) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.random = np.random.default_rng((seed, number))

    def __call__(self, logits: Tensor) -> tuple[int, float]:
        """Return an id and its log-probability. Raises NotFiniteError if a logit is NaN, or if all are infinite."""
        logits = logits.float()
        logprobs = logits.log_softmax(-1)
        # Below this, 1 / temperature is infinite in float32, and probabilities would be 0 / 0.
        draws = self.temperature >= torch.finfo(torch.float32).tiny
        drawn = self._draw(logits) if draws else int(logits.argmax(-1))
        logprob = float(logprobs[drawn])
        if logprob != logprob:
            raise NotFiniteError(
                "the model's logits are not finite: its weights are too large, or damaged"
            )
        return drawn, logprob

    def _draw(self, logits: Tensor) -> int:
        """Return a drawn id. Nothing is sorted where all ids may be drawn."""
        scores = (logits - logits.max()) / self.temperature
        probabilities = scores.softmax(-1)
        order: Any = range(len(logits))
        if self.top_p < 1:
            probabilities, order = probabilities.sort(descending=True, stable=True)
        sums = probabilities.cpu().double().cumsum(-1)
        total = sums[torch.searchsorted(sums[:-1], self.top_p)]  # of the fewest that sum to top_p
        drawn = torch.searchsorted(sums, self.random.random() * total, right=True)
        last = torch.searchsorted(sums[:-1], total)  # the product may be rounded up to the total
        return int(order[min(int(drawn), int(last))])


@dataclass(frozen=True)
class _Generator:
    """A generator that reads one prompt and continues it."""

    model: Net
    sampler: Sampler
    end_ids: Collection[int]
    texts: TextStream | None
    stops: StopTexts
    chunk: int
    dtype: str
    stream: Callable[..., Tensor]
    progress: Callable[..., None]

    def run(
        self,
        sequence: InputSequence[Document],
        max_tokens: int,
        reads_all: bool,
    ) -> Iterator[Step]:
        if not len(sequence):  # then `stream` is a CausalStream that has read before
            logits = self._logits(cast(Any, self.stream).last_hidden[0])
        for start in range(0, len(sequence), self.chunk):
            stop = min(start + self.chunk, len(sequence))
            logits = self._read(torch.from_numpy(sequence.read(start, stop)))
            self.progress(stop - start)
        for number in range(1, max_tokens + 1):
            token, logprob = self.sampler(logits)
            step = self._step(token, logprob, number == max_tokens)
            new = torch.tensor([token])
            if step.finish_reason:
                yield step
                if reads_all:
                    self._read(new)
                return
            if runs_ahead(logits.device):  # the device computes while the caller writes the text
                logits = self._read(new)
                yield step
            else:
                yield step
                logits = self._read(new)

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> Tensor:
        """Read the next ids (n,), and return the logits (vocab_size,) after the last one."""
        device = next(self.model.parameters()).device
        tokens = ids.long()[None].to(device)
        with precision(self.dtype, device):
            last = self.stream(tokens)[0, -1]
        return self._logits(last)

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Tensor:
        with precision(self.dtype, hidden.device):
            return self.model.logits(hidden)

    def _step(self, token: int, logprob: float, last: bool) -> Step:
        text = ""
        reason: FinishReason | None = "length" if last else None
        if token in self.end_ids:
            reason = "eos"
        elif self.texts:
            text = self.stops.add(self.texts.add(token))
        if self.texts and reason and not self.stops.reached:
            text += self.stops.add(self.texts.end()) + self.stops.end()
        if self.stops.reached:
            reason = "stop"
        return Step(token, logprob, text, reason)


def _check(model: Net, max_tokens: int, least: int) -> None:
    """Raise ConfigError for a model that cannot generate, and for fewer than the `least` tokens."""
    if not model.config.causal:
        raise ConfigError("a bidirectional model does not say what comes next: it cannot generate")
    if not model.config.vocab_size:
        raise ConfigError("this model has no vocabulary (vocab_size 0): it cannot generate tokens")
    if not model.config.streams:
        raise ConfigError(
            "this model reads a text in one forward only, not token by token: it cannot generate"
        )
    if max_tokens < least:
        raise ConfigError(f"max_tokens must be {least} or more, not {max_tokens}")
