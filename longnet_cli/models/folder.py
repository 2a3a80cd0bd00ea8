"""A model that `--model` names: a LongNet, a Hugging Face model or a GGUF file; what it reads, and how to load it.

    folder = ModelFolder.find("./my-llama")
    loaded = folder.load(device=torch.device("cpu"))

The small files of a folder are read once, however often they are asked for. Torch is imported with the first net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from longnet_cli.basics.configuration import as_list, parse, read_text
from longnet_cli.basics.digests import json_sha256
from longnet_cli.basics.errors import CheckpointError, ConfigError, MemoryLimitError, extra
from longnet_cli.basics.model_files import (
    CONFIG,
    GENERATION,
    MODEL_TYPE,
    MODULES,
    SHARDED,
    TOKENIZER,
    TOKENIZER_SHA256,
    WEIGHTS,
    first_bytes,
    is_within,
    read_or_empty,
    weight_files,
)
from longnet_cli.data.documents.tokenizer import SETTINGS, Tokenizer, special_token, token_id
from longnet_cli.hub.model_names import find_model
from longnet_cli.hub.repository import Located, download_again

if TYPE_CHECKING:
    import torch

    from longnet_cli.attention import Pattern
    from longnet_cli.data.documents.chat import ChatTemplate
    from longnet_cli.models.hf.pretrained_net import TransformersNet
    from longnet_cli.models.hf.sentence_folder import SentenceModel
    from longnet_cli.nets.config import LongNetConfig, TransformersConfig
    from longnet_cli.nets.net import Bos, Net

PICKLED = "pytorch_model*.bin*"
NO_BOS = "none"  # the value of --bos


class Embedding(NamedTuple):
    """The way in which an embedding model reads a text and makes its vector, and the tokenizer with its template."""

    model: SentenceModel
    tokenizer: Tokenizer


class Loaded(NamedTuple):
    """A net, its tokenizer, and the ids `bos` that it reads before each document; None for a missing part.

    `ends` are the ids at which the net's own texts end, `chat` is its chat template if you asked for it. `origin` is
    the `ModelFolder.origin` of the net. `embedding` is for a Hugging Face model that makes vectors as
    sentence-transformers does; only a folder that `embeds` has it.
    """

    net: Net
    tokenizer: Tokenizer | None
    bos: Bos
    ends: frozenset[int]
    chat: ChatTemplate | None
    origin: str
    embedding: Embedding | None = None

    @property
    def tokenizer_sha256(self) -> str | None:
        return self.tokenizer.sha256 if self.tokenizer else None


class ModelFolder:
    """The model at a path: `is_gguf` for a GGUF file, `of_transformers` for any Hugging Face model.

    A LongNet is not a Hugging Face model, though transformers can open it. A GGUF file is one, since it is converted.
    `name` is what the user calls it, for messages. `origin` names it in outputs: with the commit, if it is on a hub.
    A model that `embeds` is to make vectors. If its modules.json (`modules`) names a subfolder for the Transformer,
    `path` is that subfolder.
    """

    def __init__(self, path: Path, *, embeds: bool = False) -> None:
        self.path = _transformer_of(path) if embeds else path
        self.name = self.origin = str(path)
        self.is_gguf = is_gguf(path)
        self.embeds = embeds
        self.modules = path / MODULES

    @classmethod
    def find(cls, name: str, *, gguf: bool = False, embeds: bool = False) -> ModelFolder:
        """Return the model that `name` stands for: a shipped model, a path, or a model on a hub.

        Raises ConfigError for a name of nothing; CheckpointError for a path that holds no complete model, for
        a model that cannot be downloaded and, unless `gguf`, for a GGUF file.
        """
        located = Located(Path(name), name)
        if not is_gguf(located.path):
            located = find_model(name, embeds)
        folder = cls(located.path, embeds=embeds)
        folder.name = name
        folder.origin = located.name
        if not folder.is_gguf:
            folder._check_complete()
        elif not gguf:
            raise CheckpointError(
                f"{name}: a GGUF file: make a folder of it, longnet convert {name} -o DIR"
            )
        return folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """The keys of config.json; empty if it cannot be read, which loading reports."""
        return read_or_empty(self.path / CONFIG, dict)

    @cached_property
    def _tokenizer_settings(self) -> dict[str, Any]:
        return read_or_empty(self.path / SETTINGS, dict)

    @cached_property
    def of_transformers(self) -> bool:
        kind = self.config.get("model_type", self.config.get("architectures"))
        return self.is_gguf or kind not in (None, MODEL_TYPE)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata in the header of model.safetensors; empty if it cannot be read, which loading reports."""
        from safetensors import SafetensorError, safe_open

        with (
            suppress(OSError, SafetensorError),
            safe_open(self.path / WEIGHTS, framework="numpy") as file,
        ):
            return file.metadata() or {}
        return {}

    def tokenizer(self, spec: str | None = None, *, differs: bool = False) -> Tokenizer | None:
        """Return the folder's tokenizer, or the one that `spec` names (see `Tokenizer.load`), or None without either.

        The ids of another tokenizer mean nothing to a model, so `spec` must name an equal one, unless it `differs` on
        purpose. Raises CheckpointError for a tokenizer.json that is not the one the weights were saved with and,
        without `spec`, for a missing one. Raises ConfigError for another tokenizer.
        """
        saved_sha256 = self.metadata.get(TOKENIZER_SHA256)
        if not spec:
            own = self._own_tokenizer(saved_sha256)
            if saved_sha256 and not own:
                raise CheckpointError(
                    f"{self.path / TOKENIZER} is missing, which the model was saved with: put it back, or name it"
                )
            return own
        named = Tokenizer.load(spec)
        if differs:
            return named
        own = self._own_tokenizer(saved_sha256)
        needed = own.sha256 if own else saved_sha256
        if needed not in (None, named.sha256):
            raise ConfigError(
                f"{spec}: not the tokenizer of the model in {self.path}, so its ids stand for other tokens: add "
                "--tokenizer-differs to use it"
            )
        return own or named

    def _own_tokenizer(self, saved_sha256: str | None) -> Tokenizer | None:
        """Return the tokenizer in the folder, None for none. Raises CheckpointError for another than the saved one."""
        path = self.path / TOKENIZER
        if not path.exists():
            return None
        tokenizer = Tokenizer.from_file(path)
        if saved_sha256 and json_sha256(parse(read_text(path))) != saved_sha256:
            raise CheckpointError(
                f"{path}: not the tokenizer that the model was saved with: put that one back, or add "
                f"--tokenizer {path} --tokenizer-differs to use this one"
            )
        return tokenizer

    def bos(self, tokenizer: Tokenizer | None, written: str | None = None) -> Bos:
        """Return the id, or ids, that the model reads before each document; None for nothing.

        `written` is the value of `--bos`: none, a token of the tokenizer, or an id. Without it, a LongNet reads the
        end-of-text id, with which its documents ended in training. A Hugging Face model reads the ids that its
        tokenizer's template puts before a text, otherwise `bos_token` if tokenizer_config.json sets `add_bos_token`,
        otherwise the `bos_token_id` of config.json, otherwise the end-of-text id. Raises ConfigError for an unknown
        token and for an id outside of the vocabulary.
        """
        if written is not None:
            return None if written == NO_BOS else token_id("--bos", written, tokenizer)
        end = tokenizer.eos_id if tokenizer else None
        if not self.of_transformers:
            return end
        if tokenizer:
            if ids := tokenizer.ids_around[0]:
                return ids if ids[1:] else ids[0]
            settings = self._tokenizer_settings
            start = tokenizer.id_of(special_token(settings.get("bos_token")))
            if start is not None and settings.get("add_bos_token") is True:
                return start
        configured = self.config.get("bos_token_id")
        return configured if isinstance(configured, int) else end

    def ends(self, tokenizer: Tokenizer | None) -> frozenset[int]:
        """Return the ids that end the model's texts; empty if none are known.

        For a Hugging Face model, they are the `eos_token_id`, one or several, of generation_config.json, otherwise of
        config.json. Without it, and for a LongNet, it is the end-of-text id of the tokenizer.
        """
        settings: dict[str, Any] = {}
        if self.of_transformers:
            settings = self.config | read_or_empty(self.path / GENERATION, dict)
        value = settings.get("eos_token_id")
        if value is None and tokenizer:
            value = tokenizer.eos_id
        return frozenset(end for end in as_list(value) if isinstance(end, int))

    @property
    def eos(self) -> str:
        """The token that ends documents, from tokenizer_config.json; empty if that names none."""
        return special_token(self._tokenizer_settings.get("eos_token"))

    def chat(self, tokenizer: Tokenizer | None, asked: bool | None) -> ChatTemplate | None:
        """Return the chat template if it is `asked` for or, for None, the one that there may be.

        Raises ConfigError for one that is asked for, without a tokenizer or if it is missing.
        """
        if asked is False:  # which loads no Jinja
            return None
        from longnet_cli.data.documents.chat import ChatTemplate, chat_settings

        if asked is None and not chat_settings(tokenizer):
            return None
        if tokenizer is None:
            raise ConfigError(
                f"{self.path}: there is no tokenizer, which --chat needs: give --tokenizer"
            )
        return ChatTemplate(self.path, tokenizer)

    def net_config(
        self,
        pattern: Pattern | None = None,
        lora: Mapping[str, Any] | None = None,
    ) -> TransformersConfig | LongNetConfig:
        """Return the facts of the net, without its weights. `pattern` replaces the model's own.

        `lora` holds the arguments of `add_lora`, for a Hugging Face model. Raises ConfigError and CheckpointError
        as `net` does.
        """
        if not self.of_transformers:
            from longnet_cli.nets.weights import load_config

            return load_config(self.path, pattern)
        return self._transformers().read_facts(
            self.path,
            self.config,
            pattern,
            lora,
            dtype=self.stored_dtype(),
            embeds=self.embeds,
        )

    def net(
        self,
        *,
        pattern: Pattern | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Net:
        """Load the net, a `Net` in eval mode, on `device`. `pattern` replaces the model's own.

        The weights of a Hugging Face model are of type `dtype` (default: float32). A LongNet's are float32 always.
        Raises ConfigError or CheckpointError, in one line that names the folder, also if transformers is not installed.
        """
        if not self.of_transformers:
            return self.native().from_pretrained(self.path, device, pattern=pattern)
        import torch

        return self._transformers().load_transformers(
            self.path,
            self.config,
            pattern=pattern,
            device=device,
            dtype=dtype or torch.float32,
            embeds=self.embeds,
        )

    def native(self) -> type[Any]:
        """Return the class of the net of a LongNet: VectorNet for a slide encoder. Raises as `load_config` does."""
        from longnet_cli.nets.config import SlideConfig
        from longnet_cli.nets.longnet import LongNet
        from longnet_cli.nets.slide import VectorNet
        from longnet_cli.nets.weights import load_config

        return VectorNet if isinstance(load_config(self.path), SlideConfig) else LongNet

    def stored_dtype(self) -> torch.dtype:
        """Return the type of a Hugging Face model's weights if all of them are bfloat16 or float16, else float32."""
        import torch
        from safetensors import SafetensorError, safe_open

        types = set()
        for file_name in weight_files(self.path):
            with (
                suppress(OSError, SafetensorError),
                safe_open(self.path / file_name, framework="numpy") as file,
            ):
                types |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        half = {("BF16",): torch.bfloat16, ("F16",): torch.float16}
        return half.get(tuple(types), torch.float32)

    def trainable(
        self,
        config: TransformersConfig,
        lora: Mapping[str, Any] | None,
        note: Callable[[str], None],
    ) -> Net:
        """Load a Hugging Face model for training, with the pattern of `config`, on the CPU, not mapped.

        Weights are float32. `lora` holds the arguments of `add_lora`, for which matrices have the `stored_dtype`, or
        is None to train all weights. `note` gets the net's. Raises as `net` does, and ConfigError if the gradient of a
        long sequence cannot go through the model.
        """
        pattern = None if config.as_trained else config.pattern
        dtype = None if lora is None else self.stored_dtype()
        net = cast("TransformersNet", self.net(pattern=pattern, dtype=dtype))
        net.check_trainable()
        self._tell(note, net.note)
        # the weights are mapped from files until now, which may vanish during a run
        for parameter in net.parameters():
            parameter.data = parameter.data.clone()
        if lora is not None:
            net.add_lora(lora)
        return net

    def load(
        self,
        *,
        device: torch.device,
        dtype: str = "auto",
        tokenizer: str | None = None,
        tokenizer_differs: bool = False,
        pattern: Pattern | None = None,
        bos: str | None = None,
        chat: bool | None = False,
        vectors: bool = False,
        note: Callable[[str], None] = lambda line: None,
    ) -> Loaded:
        """Load the model on `device` for `dtype` (--dtype), with `tokenizer` (--tokenizer) or its own.

        `bos` is --bos. `chat` loads the chat template, None the one that there may be. If the model `embeds`, the
        modules of sentence-transformers are loaded too. `note` gets a line for each thing that the user should know
        about the way the model reads documents. Raises ConfigError for a tokenizer that is not the model's, unless
        `tokenizer_differs`; for a tokenizer with more ids than the model; for a model that reads vectors, unless
        `vectors`; for `bos` where nothing is read before a document; for modules that are not computed; and for an
        attention kernel that cannot run in `dtype`.
        """
        from longnet_cli.running.device import (
            DTYPES,
            check_kernel,
            keep_freed_memory,
            resolve_dtype,
        )

        dtype_name = resolve_dtype(dtype, device)
        keep_freed_memory(device)
        with self._unpacked(dtype_name, note) as folder:
            model_tokenizer = folder.tokenizer(tokenizer, differs=tokenizer_differs)
            start = folder.bos(model_tokenizer, bos)
            ends = folder.ends(model_tokenizer)
            template = folder.chat(model_tokenizer, chat)
            model = folder.sentence_model()
            net = folder.net(pattern=pattern, device=device, dtype=DTYPES[dtype_name])
            embedding = folder.embedding(model, model_tokenizer, net, note)
        check_kernel(device, dtype, net.config.head_dim)
        if embedding:
            model_tokenizer = model_tokenizer or embedding.tokenizer
            if bos:
                raise ConfigError(
                    f"{self.name}: its tokenizer's template says what stands before a text: leave out --bos"
                )
        if net.config.vocab_size:
            start = self._start_of(net, start, bos)
            self._check_ids(net.config.vocab_size, model_tokenizer, start, tokenizer)
        elif vectors:
            model_tokenizer = start = None
        else:
            raise ConfigError(
                f"{self.name}: this model has no vocabulary: it reads vectors, not tokens"
            )
        in_windows = embedding and not net.config.causal and not net.dilated
        if not in_windows:
            self._tell(note, net.note)
        return Loaded(net, model_tokenizer, start, ends, template, self.origin, embedding)

    def _start_of(self, net: Net, start: Bos, bos: str | None) -> Bos:
        """Return the ids that a net reads before a text: `start`, or None for a net that looks in both directions.

        Raises ConfigError for a --bos that is not read.
        """
        if net.config.causal:
            return start
        if bos not in (None, NO_BOS):
            raise ConfigError(f"{self.name}: it looks in both directions: leave out --bos")
        return None

    def _check_ids(
        self,
        size: int,
        tokenizer: Tokenizer | None,
        start: Bos,
        named: str | None,
    ) -> None:
        """Raise ConfigError for ids of the tokenizer or of the `start` that a vocabulary of this size does not have."""
        from longnet_cli.nets.net import bos_ids

        if tokenizer and tokenizer.vocab_size > size:
            raise ConfigError(
                f"{named or self.path / TOKENIZER}: the tokenizer has {tokenizer.vocab_size} ids and the model "
                f"{size}: they do not belong together"
            )
        for bos_id in bos_ids(start):
            if not 0 <= bos_id < size:
                raise ConfigError(
                    f"{self.name}: it reads the id {bos_id} before a text, and its vocabulary has {size}: give --bos"
                )

    def _tell(self, note: Callable[[str], None], text: str) -> None:
        """Give `note` a line about the model, unless the text is empty."""
        if text:
            note(f"{self.name}: {text}")

    def sentence_model(self) -> SentenceModel | None:
        """Return how sentence-transformers makes vectors with the model; None where it does not, or no file says how.

        Raises ConfigError for what is not computed here, also for a LongNet that has modules beside its own.
        """
        if not self.embeds or not self.modules.exists():
            return None
        if not self.of_transformers:
            if len(read_or_empty(self.modules, list)) > 1:
                raise ConfigError(
                    f"{self.modules}: a LongNet makes vectors alone: leave out the other modules"
                )
            return None
        self._transformers()
        from longnet_cli.models.hf.sentence_folder import read_sentence_model

        return read_sentence_model(self.modules.parent)

    def embedding(
        self,
        model: SentenceModel | None,
        tokenizer: Tokenizer | None,
        net: Net,
        note: Callable[[str], None],
    ) -> Embedding | None:
        """Return how the model reads texts, and put the steps of its `sentence_model` into the net; None for others.

        `tokenizer` is its own, or the one that a user named. Without either, the library makes one of older files.
        """
        if model is None:
            is_encoder = self.of_transformers and not net.config.causal
            if not (self.embeds and is_encoder and tokenizer):
                return None
            from longnet_cli.models.hf.sentence_folder import plain_model

            model = plain_model(self.path)
        self._tell(note, model.note)
        if tokenizer:
            text_tokenizer = self._reading_texts(tokenizer, model.lowercase)
        else:
            from longnet_cli.models.hf.sentence_folder import read_tokenizer

            text_tokenizer = read_tokenizer(self.path, model.lowercase)
        cast("TransformersNet", net).add_steps(model.steps)
        return Embedding(model, text_tokenizer)

    def _reading_texts(self, tokenizer: Tokenizer, lowercase: bool) -> Tokenizer:
        """Return a tokenizer, the model's own or a named one, as it reads texts for an embedding model."""
        from longnet_cli.models.hf.sentence_folder import lowercased, read_tokenizer

        if tokenizer.folder == self.path:
            text_tokenizer = read_tokenizer(self.path, lowercase)
        else:
            text_tokenizer = lowercased(tokenizer) if lowercase else tokenizer.for_documents()
            text_tokenizer.splits_special = False
        if text_tokenizer.encodes_as(tokenizer):
            text_tokenizer.sha256 = tokenizer.sha256
        return text_tokenizer

    def check_weights_fit(self, dtype: str, device: torch.device, free: float) -> None:
        """Raise MemoryLimitError, before they are loaded, if the weights take more than `free` bytes.

        A GGUF file is not checked: its size is known only when it is unpacked.
        """
        from longnet_cli.running.device import DTYPES, resolve_dtype

        if self.is_gguf:
            return
        itemsize = DTYPES[resolve_dtype(dtype, device)].itemsize if self.of_transformers else 4
        size = self.net_config().num_parameters() * itemsize
        if size > free:
            raise MemoryLimitError(
                f"{self.name}: the weights take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: choose a "
                "smaller model, or a larger device"
            )

    @contextmanager
    def _unpacked(self, dtype: str, note: Callable[[str], None]) -> Iterator[ModelFolder]:
        """Yield this folder or, for a GGUF file, a temporary folder with the converted model, and tell it to `note`.

        Weights that are mapped from a temporary folder stay readable after it is deleted. The error of a damaged model
        of a hub then says how to download it again.
        """
        try:
            if not self.is_gguf:
                yield self
                return
            from longnet_cli.models.gguf import convert_gguf
            from longnet_cli.running.device import DTYPES

            note(
                f"{self.name}: converted for this run alone: `longnet convert {self.name} -o DIR` does it once"
            )
            with TemporaryDirectory(prefix="longnet-") as place:
                folder = Path(place) / self.path.stem
                convert_gguf(self.path, folder, DTYPES.get(dtype))
                yield ModelFolder(folder, embeds=self.embeds)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{download_again(self.path)}") from None

    def _transformers(self) -> ModuleType:
        try:
            from longnet_cli.models.hf import pretrained_net as transformers_net
        except ImportError as error:
            raise ConfigError(
                f"{self.path} is a Hugging Face model, which cannot be imported ({error}): {extra('hf')}"
            ) from None
        return transformers_net

    def _check_complete(self) -> None:
        folder = self.path
        if not folder.is_dir():
            what = "not a folder" if folder.exists() else "no such folder"
            raise CheckpointError(f"{folder}: {what}; expected a model")
        missing = []
        for name in [CONFIG, *weight_files(folder)]:
            path = folder / name
            if not is_within(name):
                raise ConfigError(f"{folder / SHARDED}: the file {name} is outside of the folder")
            if not path.exists():
                missing.append(name)
            elif not path.is_file():
                raise CheckpointError(f"{path}: not a file: a folder, a pipe or a device")
        if not missing:
            return
        if any(folder.glob(PICKLED)):
            raise CheckpointError(
                f"{folder}: pickled weights are never read, since a pickle can run code: save them as safetensors"
            )
        what = f"not a complete model, {' and '.join(missing)} missing"
        if (folder / "adapter_config.json").is_file():
            what += "; save an adapter of peft merged (merge_and_unload)"
        raise CheckpointError(f"{folder}: {what}")


def _transformer_of(folder: Path) -> Path:
    """Return the folder of a model's Transformer: a subfolder if modules.json names one first that is there."""
    modules = read_or_empty(folder / MODULES, list)
    with suppress(IndexError, KeyError, TypeError, AttributeError):  # of no list of modules
        subfolder = modules[0]["path"]
        if is_within(subfolder) and (folder / subfolder).is_dir():
            return folder / subfolder
    return folder


def is_gguf(path: Path) -> bool:
    """Return whether a path leads to a GGUF file, by its first bytes."""
    return first_bytes(path, 4) == b"GGUF"
