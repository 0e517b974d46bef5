"""Stand-ins for the tokenizers and processors of a pipeline whose vocabulary is not here.

A configuration says which tokenizer class a pipeline uses and how long its texts may be; its
vocabulary, megabytes of it, lies in files that a planner has no use for. A stand-in is an instance
of that very class with its vocabulary replaced: one id for every special token and one for all
words. Padding, truncation, special tokens and chat templates are the class's own, so sequences have
the right lengths; what they say is not looked at.

A word, a punctuation run or a digit counts as one token. Real vocabularies split rare words
further, so a stand-in's text is a few tokens short of the real one; most pipelines pad it to a
fixed length anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    BatchEncoding,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

# not re-exported at the top of transformers, but the base of every image processor there
from transformers.image_processing_base import ImageProcessingMixin

from pipefit.errors import InvalidRequest

WORD = "▁word"
"""The one token that every word becomes."""

CHARACTERS_PER_WORD = 14
"""Letters of one token at most: longer runs are compounds, or a script without spaces.

Chosen so that the texts whose real lengths diffusers states come out: the template that
pipeline_qwenimage.py cuts off has 34 tokens (here 34), that of pipeline_hunyuan_video.py 95
(here 94).
"""

TOKEN_PATTERN = (
    r"<\|[^|>\s]+\|>|</?[a-z_]+>|\[/?[A-Z_]+\]"  # markers: <|im_start|>, <think>, [INST]
    rf"|\p{{Han}}|[\p{{L}}\p{{M}}&&[^\p{{Han}}]]{{1,{CHARACTERS_PER_WORD}}}"
    r"|\p{N}|[^\s\p{L}\p{M}\p{N}<\[]+|[<\[]"  # a marker may follow punctuation
)
"""What counts as one token."""

NEWLINES_PATTERN = r"[\r\n]+"
"""Blank lines count as one token too, for tokenizers that keep them."""

CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}{{- part.get('text', '') -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\n\n</think>\n\n' -}}
{%- endif -%}
{%- endif -%}"""
"""ChatML, for tokenizers whose own template is not in their configuration.

Source: the chat_template of Qwen/Qwen3-4B's tokenizer_config.json, without its tools. The templates
of other families differ by a few tokens a message.
"""

SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

TOKENIZER_SETTINGS = ("model_max_length", "padding_side", "chat_template")
"""Settings of a tokenizer_config.json that a stand-in follows, besides the special tokens."""

GENERIC_SPECIAL_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
"""For a configuration that names neither a class with special tokens nor the tokens."""

Processor = PreTrainedTokenizerBase | FeatureExtractionMixin | ImageProcessingMixin


def build_processor(
    cls: type, config: Mapping[str, Any], folder: Path | None = None
) -> Processor | StandInProcessor:
    """Return the tokenizer, image processor or feature extractor *cls*, real where it can be.

    Real are: whatever has its vocabulary in *folder*, and classes that need only *config*.

    Raises:
        InvalidRequest: if the vocabulary in *folder* cannot be read or *config* does not fit *cls*.
    """
    if folder is not None and _has_vocabulary(cls, folder):
        return _real_processor(cls, folder)
    if issubclass(cls, PreTrainedTokenizerBase):
        return stand_in_tokenizer(cls, config)
    if issubclass(cls, (ImageProcessingMixin, FeatureExtractionMixin)):
        return cls.from_dict(dict(config))
    return StandInProcessor(stand_in_tokenizer(PreTrainedTokenizerFast, config), cls.__name__)


def is_processor(cls: type) -> bool:
    """Whether *cls* turns text, pictures or sound into the inputs of a model."""
    kinds = (PreTrainedTokenizerBase, ProcessorMixin, ImageProcessingMixin, FeatureExtractionMixin)
    # transformers puts a placeholder that is no subclass of anything where a package is missing
    return issubclass(cls, kinds) or cls.__name__.endswith("Processor")


def stand_in_tokenizer(cls: type, config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return a tokenizer of class *cls* with a vocabulary of special tokens and one word.

    >>> from transformers import CLIPTokenizer
    >>> tokenizer = stand_in_tokenizer(CLIPTokenizer, {"model_max_length": 77})
    >>> len(tokenizer("a cat, sleeping").input_ids)  # two more than its words and punctuation
    6
    """
    settings = {name: config[name] for name in TOKENIZER_SETTINGS if name in config}
    settings |= {name: token for name in SPECIAL_TOKENS if (token := _token_text(config.get(name)))}
    if not issubclass(cls, PreTrainedTokenizerFast) and not cls.vocab_files_names:
        return cls(**settings)  # bytes or characters are its vocabulary
    tokenizer = _without_vocabulary(cls, settings)
    _count_words(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.bos_token and tokenizer.bos_token_id not in tokenizer(WORD).input_ids:
        tokenizer.add_bos_token = config.get("add_bos_token", True)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.is_stand_in = True
    return tokenizer


class StandInProcessor:
    """Stands in for a processor of text and pictures, as long as there are only texts."""

    is_stand_in = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stands_for: str) -> None:
        self.tokenizer = tokenizer
        self.stands_for = stands_for

    def __call__(self, text: Any = None, images: Any = None, **options: Any) -> BatchEncoding:
        if images is not None:
            raise InvalidRequest(
                f"Pictures cannot be processed without the files of the {self.stands_for}: give a "
                "folder that has them, or leave the pictures out."
            )
        return self.tokenizer(text, **options)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(conversation, **options)

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(sequences, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        return self.tokenizer.decode(ids, **options)


class _PositionedTokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose model wants the positions of the tokens as well, as ChatGLM's does."""

    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    padding_side = "left"

    def __call__(self, *args: Any, return_tensors: Any = None, **options: Any) -> BatchEncoding:
        encoded = super().__call__(*args, **options)
        masks = encoded["attention_mask"]
        is_batch = bool(masks) and isinstance(masks[0], list)
        positions = [_positions(mask) for mask in (masks if is_batch else [masks])]
        encoded["position_ids"] = positions if is_batch else positions[0]
        return encoded.convert_to_tensors(return_tensors, prepend_batch_axis=not is_batch)


def _positions(mask: list[int]) -> list[int]:
    """Number the tokens that are not padding, from 0; padding is 0."""
    first = mask.index(1) if 1 in mask else len(mask)
    return [max(i - first, 0) for i in range(len(mask))]


def _has_vocabulary(cls: type, folder: Path) -> bool:
    names = {"tokenizer.json"}
    if issubclass(cls, PreTrainedTokenizerBase):
        names |= set(cls.vocab_files_names.values())
    return any((folder / name).is_file() for name in names)


def _real_processor(cls: type, folder: Path) -> Any:
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise InvalidRequest(
            f"The {cls.__name__} in {folder} cannot be loaded ({error}): repair its files, or "
            "remove its vocabulary to have a stand-in."
        ) from error


def _token_text(token: Any) -> str | None:
    """Return a special token as text; configurations also write it as a serialised AddedToken."""
    return token["content"] if isinstance(token, Mapping) else token


def _without_vocabulary(cls: type, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a *cls* that knows its special tokens; of a pure Python class, a likeness."""
    if issubclass(cls, PreTrainedTokenizerFast) and cls is not PreTrainedTokenizerFast:
        return cls(**settings)
    likeness = (
        _PositionedTokenizer if "position_ids" in cls.model_input_names else PreTrainedTokenizerFast
    )
    tokenizer = Tokenizer(WordLevel({WORD: 0}, unk_token=WORD))
    return likeness(tokenizer_object=tokenizer, **(GENERIC_SPECIAL_TOKENS | settings))


def _count_words(tokenizer: PreTrainedTokenizerFast) -> None:
    """Replace the vocabulary of *tokenizer*: every match of a pattern is the same word."""
    backend = tokenizer.backend_tokenizer
    pattern = TOKEN_PATTERN + ("|" + NEWLINES_PATTERN if _keeps_newlines(backend) else "")
    vocabulary = tokenizer.get_vocab()
    vocabulary.setdefault(WORD, max(vocabulary.values(), default=-1) + 1)
    backend.model = WordLevel(vocabulary, unk_token=WORD)
    backend.normalizer = None
    backend.pre_tokenizer = Split(Regex(pattern), behavior="removed", invert=True)
    backend.decoder = None


def _keeps_newlines(backend: Tokenizer) -> bool:
    """Whether a line break reaches the vocabulary of *backend*, or counts as a space."""
    text = "a\nb"
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return "\n" in text
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return any("\n" in piece or "Ċ" in piece for piece in pieces)  # Ċ: its byte-level spelling
