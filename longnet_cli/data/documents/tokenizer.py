"""Text to token ids and back: one class around `tokenizers.Tokenizer`, for the built-in bytes and any tokenizer.json.

A document is never anything but text: `<|endoftext|>` written inside one is encoded as its characters. So the byte
count of a document's tokens is the byte count of its text, and no document can forge a boundary. Embedding models are
the exception (`splits_special`): their vectors are those of transformers, which takes it for the token. So is a
tokenizer that has the token as a word of its vocabulary, too, as Unigram may.

Special tokens are the end of a text, those that options name, and those that tokenizer_config.json names.
"""

from __future__ import annotations

import base64
import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property, partial
from itertools import chain, islice, product
from os.path import commonprefix
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.configuration import parse, read_text
from longnet_cli.basics.digests import json_sha256
from longnet_cli.basics.errors import (
    ConfigError,
    RefusedError,
    first_line,
    one_line,
    refuse_web_address,
)
from longnet_cli.basics.model_files import END_OF_TEXT, TOKENIZER
from longnet_cli.data.files.local_files import Part
from longnet_cli.data.files.manifest import MANIFESTS, read_manifest
from longnet_cli.hub.model_names import find_tokenizer, list_models, preset_dir
from longnet_cli.hub.repository import download_again

from .text_pieces import (
    AT_SIGN,
    TextCutter,
    cut_text,
    decodes_bytes,
    find_cut,
    plain_steps,
    words_of,
)

SETTINGS = "tokenizer_config.json"  # what transformers writes beside a tokenizer.json
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})  # where there is none

# The end-of-text token: the one that SETTINGS names (models that mask tokens have only `sep_token`), otherwise the
# first of EOS_NAMES in the vocabulary.
EOS_KEYS = ("eos_token", "sep_token")
EOS_NAMES = (
    END_OF_TEXT,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end\u2581of\u2581sentence|>",
    "[SEP]",
)
NO_END = (
    f"the tokenizer has no end-of-text token: neither {SETTINGS} ({' or '.join(EOS_KEYS)}) names one of its tokens, "
    f"nor is any of {' '.join(EOS_NAMES)} among them"
)

_MEANING = {"--eos": "end-of-text", "--bos": "begin-of-text"}


def end_of_text(written: str | int | bool | None, tokenizer: Tokenizer | None) -> int | None:
    """Return the id that `--eos` names (see `token_id`): the tokenizer's own for True, None for None and False.

    Raises ConfigError for an unknown token or id, and for True if the tokenizer has no end-of-text token.
    """
    if written is None or written is False:
        return None
    if written is True:
        end = tokenizer.eos_id if tokenizer else None
        if end is None:
            raise ConfigError(f"{NO_END}: name a token or an id (--eos)")
        return end
    return token_id("--eos", written, tokenizer)


def token_id(option: str, written: str | int, tokenizer: Tokenizer | None) -> int:
    """Return the id that an option names: a number, or a token of the tokenizer.

    Raises ConfigError for a token that the tokenizer does not have, and for an id that does not fit its vocabulary.
    """
    if re.fullmatch(r"[-+]?[0-9]+", str(written)):
        return fitting(option, written, tokenizer.vocab_size if tokenizer else None)
    if tokenizer is None:
        raise ConfigError(
            f"{option} {written} is no id, and there is no tokenizer that has it as a token: give its id"
        )
    index = tokenizer.id_of(str(written))
    if index is None:
        raise ConfigError(
            f"{option} {written}: the tokenizer has no such token; name one of its tokens, or an id"
        )
    return index


def fitting(option: str, written: str | int, vocab_size: int | None, where: str = "") -> int:
    """Return the id that an option gives as a number. Raises ConfigError for one that no token can have."""
    number = int(written) if len(str(written)) < 20 else -1
    if not 0 <= number < (vocab_size or 1 << 63):
        limit = f"a vocabulary of {vocab_size}" if vocab_size else "64 bits"
        raise ConfigError(
            f"{where}the {_MEANING[option]} id {written} ({option}) does not fit {limit}"
        )
    return number


def special_token(written: Any) -> str:
    """Return the text of a special token as tokenizer_config.json writes it, plain or in a table; empty for none."""
    text = written.get("content") if isinstance(written, dict) else written
    return text if isinstance(text, str) else ""


def read_settings(path: Path) -> dict[str, Any]:
    """Return the contents of a tokenizer_config.json, empty if it is missing. Raises ConfigError for a damaged one."""
    settings = None
    with refuse_damaged(path), suppress(FileNotFoundError):
        settings = parse(read_text(path))
    return settings if isinstance(settings, dict) else {}


@contextmanager
def refuse_damaged(path: Path) -> Iterator[None]:
    """Raise ConfigError for a file of settings that the block cannot read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None


# The library keeps some 100 bytes per token. So the pieces of a text are encoded in groups of GROUP characters.
GROUP = 1 << 22
PLACED_GROUP = 1 << 17  # with places, an encoding takes 150 bytes per character
MOST_IDS = 1 << 24  # in a vocabulary: each takes memory before a text is read
# of a text by a normalizer, at worst. Unicode's own, NFKC, makes 18 characters of one.
MOST_GROWTH = 256


def _byte_alphabet() -> dict[str, int]:
    """Return the byte for which each of 256 characters stands in byte-level BPE. A printable one stands for itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}


BYTE_OF = _byte_alphabet()
INNER_BYTES = bytes(range(0x80, 0xC0))  # of a character, after its first byte
REPLACEMENT = "\ufffd"  # stands for bytes that are no character, or not yet one
LONGEST_WAIT = 64  # tokens to wait for such bytes to become a character


@contextmanager
def library_call(
    before: str = "the tokenizer fails (", after: str = "): see its tokenizer.json"
) -> Iterator[None]:
    """Raise ConfigError for the library's errors, which stand between `before` and `after`.

    They are a bare Exception, or a panic, which is no Exception: over a regular expression that takes too long.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ not in ("Exception", "PanicException"):
            raise
        raise ConfigError(f"{before}{one_line(error)}{after}") from None


class Tokenizer:
    """An encoder and decoder. `vocab_size` is one more than the largest id. Make one with `load`, `bytes` or `train`.

    `eos_id` is the id of its end-of-text token, None where it has none. `folder` is the folder of its tokenizer.json.
    """

    folder: Path | None = None
    # whether a special token that is written in a text is encoded as its characters
    splits_special = True
    tells_places = False  # whether `encode_long` gives the place of each token in the text
    prompt_ids: tuple[int, ...] = ()  # of the text `_prompt`, which stands before each document
    _prompt = ""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        settings: Mapping[str, Any] = NO_SETTINGS,
    ) -> None:
        """Wrap `inner`. `settings` come from a tokenizer_config.json, which may name the end-of-text token."""
        # A tokenizer.json may say "truncate to 512 tokens", "pad", or "leave out merges by chance": not in a document.
        inner.no_truncation()
        inner.no_padding()
        if isinstance(inner.model, models.BPE):
            inner.model.dropout = None
        inner.encode_special_tokens = True
        self._inner = inner
        self._vocab: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        self._vocab.pop("", None)  # nobody means a token of no characters, also where there is one
        if self.vocab_size > MOST_IDS:
            raise ConfigError(
                f"the tokenizer has an id {self.vocab_size - 1}: {MOST_IDS - 1:,} is the largest"
            )
        names = [*(special_token(settings.get(key)) for key in EOS_KEYS), *EOS_NAMES]
        end_ids = (index for name in names if (index := self.id_of(name)) is not None)
        self.eos_id: int | None = next(end_ids, None)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, written as in tokenizer.json; None if it is not in the vocabulary."""
        return self._vocab.get(token)

    def with_eos(self, written: str | int | None) -> Tokenizer:
        """Return the tokenizer with the end-of-text token that `--eos` names, a token or an id; unchanged for None.

        Raises ConfigError for a token or an id that it does not have.
        """
        if written is None:
            return self
        tokenizer = copy(self)
        tokenizer.eos_id = token_id("--eos", written, self)
        return tokenizer

    @cached_property
    @library_call()
    def ids_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the tokenizer's template puts before and after a text.

        They are `[CLS]` and `[SEP]` for BERT, `<s>` and nothing for Llama, nothing for GPT-2.
        """
        bare = self._inner.encode("a", add_special_tokens=False).ids
        ids = self._inner.encode("a").ids
        for start in range(len(ids) if bare else 0):
            if ids[start : start + len(bare)] == bare:
                return tuple(ids[:start]), tuple(ids[start + len(bare) :])
        return (), ()

    def for_documents(self, prompt: str = "") -> Tokenizer:
        """Return a copy that reads the text of a document as if `prompt` stood before it, and tells places.

        The ids of the prompt (`prompt_ids`) are left out. Without `splits_special`, a special token that is written in
        a text is that token, as it is for transformers.
        """
        reader = copy(self)
        reader._inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        reader._inner.encode_special_tokens = self.splits_special
        reader.tells_places = True
        if prompt:
            reader._prompt = prompt
            reader.prompt_ids = reader._ids_of_prompt(prompt)
        return reader

    def within_text(self) -> Tokenizer:
        """Return a copy for text behind other text: it puts no space before it that only a first text has."""
        reader = copy(self)
        description = self.to_json().replace(
            '"prepend_scheme": "first"', '"prepend_scheme": "never"'
        )
        reader._inner = tokenizers.Tokenizer.from_str(description)
        reader._inner.encode_special_tokens = True
        return reader

    @library_call()
    def _ids_of_prompt(self, prompt: str) -> tuple[int, ...]:
        """Return the ids of a prompt that are the same whatever follows it. Those of a space at its end are not."""
        texts = [f"{prompt}{sample}" for sample in ("a", "A", "1", ".", "\u4e00", " a", "\na")]
        encoded = self._inner.encode_batch(texts, add_special_tokens=False)
        first = encoded[0]
        alone = first.ids[: sum(end <= len(prompt.rstrip()) for _, end in first.offsets)]
        return tuple(commonprefix([alone, *(encoding.ids for encoding in encoded)]))  # noqa: RUF071 (of ids)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Return the built-in tokenizer: the id of byte b is b (0..255), `<|endoftext|>` is 256."""
        inner = tokenizers.Tokenizer(models.BPE(vocab=BYTE_OF, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([END_OF_TEXT])
        return cls(inner)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json with the tokenizer_config.json beside it, or the tokenizer in a data set's manifest.

        Raises ConfigError for a missing file and for one that is no tokenizer.
        """
        path = Path(path)
        in_folder = path.name == TOKENIZER
        try:
            if path.name in MANIFESTS:
                description = getattr(read_manifest(path.parent), "tokenizer", None) or {}
            else:
                settings = read_settings(path.with_name(SETTINGS)) if in_folder else {}
                description = {**settings, "json": read_text(path)}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path}: cannot read the tokenizer: {first_line(error)}{download_again(path)}"
            ) from error
        tokenizer = cls.from_description(description, path, download_again(path))
        if in_folder:
            tokenizer.folder = path.parent
        return tokenizer

    @classmethod
    def from_description(
        cls,
        description: Mapping[str, Any],
        where: str | Path,
        advice: str = "",
    ) -> Tokenizer:
        """Return the tokenizer with this `description`, which stands in the file or folder `where`.

        Raises ConfigError, with the `advice`, for what is no tokenizer, and for one that may make a text much longer.
        """
        text = description.get("json", "")
        with library_call(f"{where}: not a tokenizer.json: ", advice):
            inner = tokenizers.Tokenizer.from_str(text)
        for part in ("normalizer", "decoder"):
            steps = plain_steps(json.loads(text).get(part))
            if (growth := math.prod(map(_growth, steps))) > MOST_GROWTH:
                what = f"its {part} may make a text {growth:,.0f} times as long"
                raise ConfigError(f"{where}: {what}: {MOST_GROWTH} times is the most")
        return cls(inner, description)

    @classmethod
    def load(cls, spec: str | Path) -> Tokenizer:
        """Load a tokenizer: `bytes`, a tokenizer.json, the folder of a model or a data set, or the name of a model.

        The name is a shipped model's, or ORG/NAME on a hub. Raises ConfigError for anything else, CheckpointError for a
        model that is neither here nor can be downloaded.
        """
        path = cls.find(spec)
        return cls.from_file(path) if path else cls.bytes()

    @staticmethod
    def find(spec: str | Path) -> Path | None:
        """Return the file that `load` reads; None for `bytes`, which is built in."""
        if str(spec) == "bytes":
            return None
        refuse_web_address(str(spec))
        path = Path(spec)
        if not path.exists() and str(spec) in list_models():
            path = preset_dir() / spec
        elif located := find_tokenizer(str(spec)):
            path = located.path
        if not path.is_dir():
            return path
        if (path / TOKENIZER).exists():
            return path / TOKENIZER
        # a folder of shares has folders
        for folder, name in product((path, *sorted(path.iterdir())), MANIFESTS):
            if (folder / name).exists():
                return folder / name
        return path / TOKENIZER

    @classmethod
    def train(cls, texts: Iterable[Iterable[str]], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE of at most `vocab_size` ids: `<|endoftext|>` is 0, then the 256 bytes, then the merges.

        Each text comes in parts. A small corpus may give fewer ids than asked for. Raises ConfigError when `vocab_size`
        has no room for the bytes, or is over MOST_IDS.
        """
        if vocab_size < 257:
            raise ConfigError(
                f"a byte-level vocabulary needs 257 ids or more (256 bytes and {END_OF_TEXT})"
            )
        if vocab_size > MOST_IDS:
            raise ConfigError(
                f"a vocabulary of {vocab_size} ids cannot be trained: {MOST_IDS:,} are the most"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        # Not the pre-tokenizer of `inner`, which is locked while it trains: to read it then waits for ever.
        words = partial(words_of, pre_tokenizers.ByteLevel(add_prefix_space=False))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        groups = (iter(partial(cut_text(parts, words).take, GROUP), []) for parts in texts)
        inner.train_from_iterator(chain.from_iterable(groups), trainer)
        return cls(inner)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, (tokens,) int32, without added special tokens. Time is linear in its length."""
        cutter = self.cutter([text])
        encoded = [np.empty(0, np.int32)]
        while pieces := cutter.take(GROUP):
            encoded += self.encode_pieces(pieces)
        return np.concatenate(encoded)

    def cutter(self, parts: Iterable[str]) -> TextCutter:
        """Cut a text, which comes in parts, into pieces whose tokens together are the tokens of the text.

        Some tokenizers need the whole text at once: it is then the only piece.
        """
        if self.is_bytes:
            return TextCutter(parts, lambda text, start: min(start + GROUP, len(text)))
        if self._cut:
            return cut_text(parts, self._ids, self._cut)
        return TextCutter(["".join(parts)], lambda text, _: len(text))

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each of some pieces of a text (see `cutter`), (tokens,) int32.

        Memory is some 100 bytes per token: give pieces of GROUP characters together.
        """
        if self.is_bytes:
            return [np.frombuffer(piece.encode(), np.uint8).astype(np.int32) for piece in pieces]
        with library_call():
            encodings = self._inner.encode_batch_fast(pieces, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    @library_call()
    def _ids(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_long(self, parts: Iterable[str]) -> Iterator[Part]:
        """Yield the parts of a text that comes in parts: together, its `encode`, without the ids of the prompt.

        Memory is that of GROUP characters and of a part. Places are given if the tokenizer `tells_places`, unless they
        can be counted from the ids (`TextPlaces`). Raises RefusedError for a text that changes the ids of the prompt.
        """
        parts = filter(None, parts)
        parts = chain((self._prompt + part for part in islice(parts, 1)), parts)
        placed = self.tells_places and bool(self._prompt or not self.spells)
        place = -len(self._prompt)
        prompt_bytes = len(self._prompt.encode())
        skip = len(self.prompt_ids)
        cutter = self.cutter(parts)
        while pieces := cutter.take(PLACED_GROUP if placed else GROUP):
            n_bytes = sum(len(piece.encode()) for piece in pieces) - prompt_bytes
            places = None
            if placed:
                ids, places = self._placed(pieces, place)
                places = np.maximum(places[skip:], 0)
            else:
                ids = np.concatenate(self.encode_pieces(pieces))
            if tuple(ids[:skip]) != self.prompt_ids[:skip]:
                raise RefusedError(
                    f"the tokenizer joins the prompt {self._prompt!r} with the text after it"
                )
            yield Part(ids[skip:], n_bytes=n_bytes, places=places)
            place += sum(map(len, pieces))
            prompt_bytes = skip = 0

    def encode_placed(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text, as `encode` does, and the characters [start, end) of each token, (tokens, 2)."""
        cutter = self.cutter([text])
        all_ids = [np.empty(0, np.int32)]
        all_places = [np.empty((0, 2), np.int64)]
        place = 0
        while pieces := cutter.take(PLACED_GROUP):
            ids, places = self._placed(pieces, place)
            all_ids.append(ids)
            all_places.append(places)
            place += sum(map(len, pieces))
        return np.concatenate(all_ids), np.concatenate(all_places)

    def _placed(self, pieces: Sequence[str], place: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of pieces of a text, and their places from `place` on."""
        with library_call():
            encodings = self._inner.encode_batch(pieces, add_special_tokens=False)
        all_ids = []
        all_places = []
        for piece, encoding in zip(pieces, encodings, strict=True):
            ids = np.array(encoding.ids, np.int32)
            all_ids.append(ids)
            all_places.append(self._places(piece, ids, encoding.offsets) + place)
            place += len(piece)
        return np.concatenate(all_ids), np.concatenate(all_places)

    def _places(self, text: str, ids: np.ndarray, offsets: Any) -> np.ndarray:
        """Return the characters [start, end) of each token in its text, (tokens, 2) int64.

        `offsets` are the library's for this text. A character of which a token has only some bytes counts as its own. A
        token that stands for no character is an empty place between its neighbours.
        """
        bytes_of = self.bytes_of
        if bytes_of and b"".join(map(bytes_of.__getitem__, ids.tolist())) == text.encode():
            begin, inside = self.characters
            ends = np.cumsum(begin[ids])
            return np.stack((ends - begin[ids] - inside[ids], ends), 1)
        places = np.array(offsets, np.int64).reshape(-1, 2)
        nowhere = places[:, 0] == places[:, 1]
        before = np.zeros(len(places), np.int64)
        before[1:] = np.maximum.accumulate(places[:-1, 1])
        places[nowhere] = before[nowhere, None]
        return places

    @cached_property
    def bytes_of(self) -> dict[int, Any]:
        """The UTF-8 bytes of each id, none for a special token; empty if the tokenizer is not byte-level."""
        if not decodes_bytes(self._description):
            return {}
        bytes_of = dict.fromkeys(range(self.vocab_size), b"")
        for token, index in self._vocab.items():
            of_bytes = {*token} <= BYTE_OF.keys()
            bytes_of[index] = bytes(map(BYTE_OF.__getitem__, token)) if of_bytes else token.encode()
        for added in self.added_tokens:  # these are written as text
            bytes_of[added["id"]] = b"" if added["special"] else added["content"].encode()
        return bytes_of

    @cached_property
    def characters(self) -> tuple[np.ndarray, np.ndarray]:
        """For each id, how many characters begin in its bytes, and whether it begins inside of one."""
        bytes_of = self.bytes_of.values()
        begin = [len(data.translate(None, INNER_BYTES)) for data in bytes_of]
        inside = [b"\x80" <= data[:1] < b"\xc0" for data in bytes_of]
        return np.array(begin, np.int64), np.array(inside, bool)

    @library_call()
    def decode(self, ids: np.ndarray | list[int], *, special: bool = True) -> str:
        """Return the text of (tokens,) ids, with special tokens if `special`. A cut UTF-8 character becomes U+FFFD."""
        return str(self._inner.decode(np.asarray(ids).tolist(), skip_special_tokens=not special))

    def token_of(self, token_id: int) -> str:
        """Return a token as tokenizer.json writes it; empty for an unknown id. The inverse of `id_of`."""
        return self._inner.id_to_token(token_id) or ""

    @property
    def changes_ends(self) -> bool:
        """True if the normalizer takes spaces from the ends of a text, or puts something before it."""
        steps = plain_steps(self._description["normalizer"])
        return not {"Strip", "Prepend"}.isdisjoint(step["type"] for step in steps)

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """The tokens beside the vocabulary, as tokenizer.json has them: `id`, `content`, `special`."""
        return list(self._description["added_tokens"])

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(added["id"] for added in self.added_tokens if added["special"])

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """The number of UTF-8 bytes of each id, (vocab_size,) int64, 0 for a special token; empty if not byte-level."""
        return np.array([*map(len, self.bytes_of.values())], np.int64)

    def n_bytes(self, ids: np.ndarray) -> int | None:
        """Return the number of UTF-8 bytes of (tokens,) ids; None if the tokenizer is not byte-level or lacks an id."""
        try:
            return int(np.add.reduce(self.token_bytes.take(ids)))
        except IndexError:
            return None

    def encodes_as(self, other: Tokenizer) -> bool:
        """Return whether both encode a text alike, whatever their templates are."""
        beside = {"post_processor", "truncation", "padding"}
        mine = self._description
        theirs = other._description
        return all(mine[key] == theirs.get(key) for key in mine.keys() - beside)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the tokenizer's JSON with sorted keys and no spaces: equal for equal tokenizers."""
        return json_sha256(self._description)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, whole or not at all."""
        write_file(path, self.to_json().encode())

    @property
    def description(self) -> dict[str, str]:
        """The tokenizer for the manifest of a data set: the text of its tokenizer.json, and its end-of-text token."""
        description = {"json": self.to_json()}
        if self.eos_id is not None and (ending := self.token_of(self.eos_id)):
            description["eos_token"] = ending
        return description

    def to_json(self) -> str:
        """Return the text of the tokenizer.json."""
        return self._inner.to_str(pretty=True)

    @cached_property
    def _description(self) -> dict[str, Any]:
        return dict(json.loads(self._inner.to_str()))

    @cached_property
    def is_bytes(self) -> bool:
        """Return whether ids are the text's bytes: encoding then needs neither the library nor its memory."""
        model = self._description["model"]
        pre = self._description["pre_tokenizer"] or {}
        return (
            model["type"] == "BPE"
            and not model["merges"]
            and BYTE_OF.items() <= model["vocab"].items()
            and self._description["normalizer"] is None
            and pre.get("type") == "ByteLevel"
            and not pre["add_prefix_space"]
            and all(added["special"] for added in self.added_tokens)
        )

    @property
    def spells(self) -> bool:
        """True if the bytes of a text's ids are the text's, one after the other: then places are counted from ids."""
        return self.splits_special and (self.is_bytes or self._cut is AT_SIGN)

    @cached_property
    @library_call()
    def _cut(self) -> re.Pattern[str] | None:
        """The places where a text may be cut; None if the tokenizer needs all of it at once."""
        return find_cut(self._inner, self._description)


# Not tokenizers.decoders.DecodeStream: as of 0.23.3 it has no end that returns bytes cut in a character, it waits for
# bytes that never become one, in quadratic time, and it raises "Invalid prefix" when a token changes the bytes before
# it into U+FFFD, which SentencePiece's byte fallback does (vLLM's pull request #19449 works around that).
class TextStream:
    """A decoder of ids, one by one: the parts together are the text of all ids, without special tokens.

    Time per token does not depend on the number of tokens before. Bytes that make no character become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The last ids whose text was returned, and the ids since then: a decoder may join them.
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def add(self, token_id: int) -> str:
        """Return the characters that this id completes."""
        if bytes_of := self._tokenizer.bytes_of:
            return self._decoder.decode(bytes_of.get(token_id, b""))
        self._waiting.append(token_id)
        return self._text(final=len(self._waiting) >= LONGEST_WAIT)

    def end(self) -> str:
        """Return the rest of the text when no more ids come."""
        if self._tokenizer.bytes_of:
            return self._decoder.decode(b"", final=True)
        return self._text(final=True)

    def _text(self, *, final: bool) -> str:
        """Return the text of the waiting ids, unless it ends with bytes that may become a character."""
        shown = self._tokenizer.decode(self._shown, special=False)
        both = self._tokenizer.decode(self._shown + self._waiting, special=False)
        text = both[len(shown) :]
        if text.endswith(REPLACEMENT) and not final:
            return ""
        if text:  # otherwise only special tokens came, and these join with nothing
            self._shown = self._waiting
        self._waiting = []
        return text


def _growth(step: Mapping[str, Any]) -> float:
    """Return how many times as long a step (see `plain_steps`) makes a text, at worst."""
    kind = step.get("type")
    if kind == "Replace":
        written = len(step["content"])
        # a regular expression may match the empty text
        replaced = step["pattern"].get("String")
        return max(1, written / len(replaced) if replaced else 1 + written)
    if kind == "Precompiled":  # a tree of so many bytes, then what it writes for a character
        table = base64.b64decode(step["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
        return max(1, *(len(text.decode(errors="replace")) for text in texts))
    return 1
