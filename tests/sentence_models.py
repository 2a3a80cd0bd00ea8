"""Small embedding models with random weights, saved by sentence-transformers itself, in the layouts that it has had.

Only `save_model` needs the library.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

WORDS = [
    "the",
    "an",
    "of",
    "long",
    "net",
    "reads",
    "document",
    "query",
    "passage",
    "vector",
    "makes",
    "window",
]
WORDS += ["token", "with", "without", "and", "in", "to", "for", "is"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
NONE = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


def word_pieces(**options: Any) -> tokenizers.Tokenizer:
    """Return a WordPiece tokenizer of BERT's kind: words, letters, punctuation."""
    letters = [*string.ascii_letters, *string.digits, *string.punctuation, "\u00e9", "\u6f22"]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters,
        *(f"##{each}" for each in letters),
    ]
    found = tokenizers.Tokenizer(
        models.WordPiece(
            {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"
        )
    )
    found.normalizer = normalizers.BertNormalizer(**{"lowercase": True, **options})
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    found.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return found


def sentence_pieces(open: str = "<s>") -> tokenizers.Tokenizer:
    """Return a Unigram tokenizer of XLM-R's kind."""
    pieces = [(f"\u2581{word}", -3.0) for word in WORDS] + [
        (each, -6.0)
        for each in ("\u2581", *string.ascii_letters, *string.digits, *string.punctuation, "\u00e9")
    ]
    vocab = [(open, 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, ("<mask>", 0.0)]
    found = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=3))
    found.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    found.add_special_tokens([open, "<pad>", "</s>", "<unk>", "<mask>"])
    found.post_processor = processors.RobertaProcessing(("</s>", 2), (open, 0), trim_offsets=True)
    return found


def byte_level(prefix_space: bool = False, close: bool = True) -> tokenizers.Tokenizer:
    """Return a byte-level BPE with some merges, of Qwen's and ModernBERT's kind; it may end a text with a token."""
    found = tokenizers.Tokenizer(models.BPE())
    found.normalizer = normalizers.NFC()
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    found.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    single = "$A:0 <end>:0" if close else "$A:0"
    found.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<end>", 2)]
    )
    return found


def net(kind: str, vocab_size: int, positions: int = 40) -> hf.PreTrainedModel:
    """Return a small Transformer whose attention matters: its weights are larger than initial ones."""
    sizes = {
        **SIZES,
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    shifted = {**sizes, "pad_token_id": 1, "max_position_embeddings": positions + 2}
    grouped = {**sizes, **ends, "num_key_value_heads": 2, "head_dim": 8}
    if kind == "bert":
        model = hf.BertModel(hf.BertConfig(**sizes, **NONE))
    elif kind == "distilbert":
        own = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        own |= {key: sizes[key] for key in sizes.keys() - SIZES.keys()}
        model = hf.DistilBertModel(hf.DistilBertConfig(**own, dropout=0.0, attention_dropout=0.0))
    elif kind == "xlm-roberta":
        model = hf.XLMRobertaModel(hf.XLMRobertaConfig(**shifted, **NONE))
    elif kind == "mpnet":
        model = hf.MPNetModel(hf.MPNetConfig(**shifted, **NONE))
    elif kind == "modernbert":
        own = {**ends, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
        own["layer_types"] = ["full_attention", "sliding_attention"]
        model = hf.ModernBertModel(hf.ModernBertConfig(**sizes, **own))
    elif kind == "gemma3":
        own = {"use_bidirectional_attention": True, "sliding_window": 8}
        model = hf.Gemma3TextModel(hf.Gemma3TextConfig(**grouped, **own))
    else:
        model = hf.Qwen3Model(hf.Qwen3Config(**grouped))
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return model.eval()


def save_model(
    folder: Path,
    kind: str = "bert",
    words: tokenizers.Tokenizer | None = None,
    *,
    pool: str | tuple[str, ...] = "mean",
    include_prompt: bool = True,
    window: int | None = 32,
    after: tuple[str, ...] = ("normalize",),
    prompts: dict[str, str | None] | None = None,
    older: bool = False,
    positions: int = 40,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Save a model with sentence-transformers, which reads a text of at most `window` tokens; return its folder.

    `older` rewrites the files into the layout of versions before 6. `settings` are added to tokenizer_config.json.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    words = words or word_pieces()
    specials = {"pad_token": words.id_to_token(1 if kind in ("xlm-roberta", "mpnet") else 0)}
    specials["sep_token"] = words.id_to_token(words.encode("a").ids[-1])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, **specials, model_max_length=window or int(1e30)
    )
    plain = folder.with_name(f"{folder.name}-transformer")
    net(kind, len(words.get_vocab()), positions).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    transformer = Transformer(str(plain))
    size = 32 * (1 if isinstance(pool, str) else len(pool))
    modules = [transformer, Pooling(32, pool, include_prompt=include_prompt)]
    torch.manual_seed(1)
    for name in after:
        if name == "norm":
            made = LayerNorm(size)
            torch.nn.init.normal_(made.norm.weight)
        elif name == "normalize":
            made = Normalize()
        else:
            made = Dense(size, size if "same" in name else 24, use_residual="residual" in name,
                         activation_function=torch.nn.GELU() if "gelu" in name else torch.nn.Tanh())  # fmt: skip
            size = made.out_features
        modules.append(made)
    model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    model.save_pretrained(str(folder))
    if settings:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    if older:
        _make_older(folder, pool, window)
    return folder


def _make_older(folder: Path, pool: str | tuple[str, ...], window: int | None) -> None:
    """Rewrite a folder as versions 2 to 5 wrote it."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": window, "do_lower_case": True})
    )
    modes = {pool} if isinstance(pool, str) else {*pool}
    names = {
        "cls": "cls_token",
        "lasttoken": "lasttoken",
        "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    }
    names |= {name: f"{name}_tokens" for name in ("max", "mean", "weightedmean")}
    flags = {f"pooling_mode_{key}": name in modes for name, key in names.items()}
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config.pop("model_type", None)
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
