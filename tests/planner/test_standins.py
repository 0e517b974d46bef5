"""Stand-in tokenizers: the interface that pipelines use, with honest lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.kolors import ChatGLMTokenizer
from hypothesis import given
from hypothesis import strategies as st

from pipefit.errors import InvalidRequest
from pipefit.planner.standins import StandInProcessor, build_processor, stand_in_tokenizer

PROMPT = "An astronaut riding a horse on mars, highly detailed."
NUM_PROMPT_TOKENS = 11  # its words, the comma and the full stop

SPECIALS = {  # class -> special tokens that it puts around a text
    transformers.CLIPTokenizer: 2,
    transformers.T5TokenizerFast: 1,
    transformers.RobertaTokenizerFast: 2,
    transformers.BertTokenizer: 2,
    transformers.LlamaTokenizerFast: 1,
    transformers.GemmaTokenizerFast: 1,
    transformers.Qwen2Tokenizer: 0,
    transformers.PreTrainedTokenizerFast: 1,
    ChatGLMTokenizer: 1,
}
SMALLEST_VOCABULARY = 1000
T5 = stand_in_tokenizer(transformers.T5TokenizerFast, {})

every_class = pytest.mark.parametrize("cls", SPECIALS, ids=lambda cls: cls.__name__)


@every_class
def test_a_text_has_one_token_a_word_plus_the_special_tokens(cls: type) -> None:
    tokenizer = stand_in_tokenizer(cls, {"model_max_length": 77})
    assert len(tokenizer(PROMPT).input_ids) == NUM_PROMPT_TOKENS + SPECIALS[cls]


@every_class
def test_padding_to_a_length_masks_what_is_not_text(cls: type) -> None:
    tokenizer = stand_in_tokenizer(cls, {"model_max_length": 77})
    encoded = tokenizer([PROMPT, "mars"], padding="max_length", max_length=40, return_tensors="pt")
    assert encoded.input_ids.shape == encoded.attention_mask.shape == (2, 40)
    lengths = encoded.attention_mask.sum(dim=1).tolist()
    assert lengths == [NUM_PROMPT_TOKENS + SPECIALS[cls], 1 + SPECIALS[cls]]


@every_class
def test_padding_without_a_length_takes_that_of_the_tokenizer(cls: type) -> None:
    tokenizer = stand_in_tokenizer(cls, {"model_max_length": 77})
    assert tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids.shape == (1, 77)


@every_class
def test_padding_to_the_longest_and_cutting_off(cls: type) -> None:
    tokenizer = stand_in_tokenizer(cls, {"model_max_length": 77})
    longest = tokenizer(["mars", PROMPT], padding=True, return_tensors="pt").input_ids
    assert longest.shape == (2, NUM_PROMPT_TOKENS + SPECIALS[cls])
    cut = tokenizer(PROMPT, truncation=True, max_length=6, return_tensors="pt").input_ids
    assert cut.shape == (1, 6)


@every_class
def test_ids_stay_inside_a_small_vocabulary(cls: type) -> None:
    tokenizer = stand_in_tokenizer(cls, {"model_max_length": 77})
    ids = tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    assert 0 <= int(ids.min()) <= int(ids.max()) < SMALLEST_VOCABULARY


@every_class
def test_text_without_special_tokens_is_words_only(cls: type) -> None:
    tokenizer = stand_in_tokenizer(cls, {})
    ids = tokenizer(PROMPT, add_special_tokens=False).input_ids
    assert len(ids) == NUM_PROMPT_TOKENS
    assert len(set(ids)) == 1


@every_class
def test_ids_become_text_again(cls: type) -> None:
    tokenizer = stand_in_tokenizer(cls, {})
    texts = tokenizer.batch_decode(tokenizer([PROMPT]).input_ids, skip_special_tokens=True)
    assert len(texts[0].split()) == NUM_PROMPT_TOKENS


@given(words=st.lists(st.text("abcdefgh", min_size=1, max_size=9), max_size=30))
def test_every_word_adds_one_token(words: list[str]) -> None:
    assert len(T5(" ".join(words)).input_ids) == len(words) + 1


def test_the_class_is_the_real_one_so_pipelines_can_tell_it() -> None:
    """AudioLDM 2 asks which class its tokenizers have before it pads."""
    tokenizer = stand_in_tokenizer(transformers.RobertaTokenizerFast, {"model_max_length": 512})
    assert isinstance(tokenizer, transformers.RobertaTokenizer)


def test_a_long_prompt_is_seen_to_be_cut_off() -> None:
    """The pattern of every CLIP pipeline: compare with the text that was not cut."""
    tokenizer = stand_in_tokenizer(transformers.CLIPTokenizer, {"model_max_length": 77})
    prompt = "horse " * 100
    ids = tokenizer(
        prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    untruncated = tokenizer(prompt, padding="longest", return_tensors="pt").input_ids
    assert untruncated.shape == (1, 102)
    assert not torch.equal(ids, untruncated[:, :77])
    assert len(tokenizer.batch_decode(untruncated[:, 76:-1])[0].split()) == 25


def test_what_overflows_and_lengths_are_returned_when_asked_for() -> None:
    tokenizer = stand_in_tokenizer(transformers.T5TokenizerFast, {})
    encoded = tokenizer(
        "one two three four five", truncation=True, max_length=4,
        return_overflowing_tokens=True, return_length=True,
    )  # fmt: skip
    assert [len(ids) for ids in encoded.input_ids] == encoded["length"] == [4, 3]


def test_a_configured_padding_token_and_side_are_followed() -> None:
    config = {"model_max_length": 77, "pad_token": "!", "padding_side": "left"}
    tokenizer = stand_in_tokenizer(transformers.CLIPTokenizer, config)
    ids = tokenizer("mars", padding="max_length", return_tensors="pt").input_ids[0]
    assert tokenizer.pad_token == "!"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert (ids[:74] == tokenizer.pad_token_id).all()
    assert tokenizer.convert_tokens_to_ids("!") == tokenizer.pad_token_id


def test_a_serialised_special_token_is_understood() -> None:
    config = {"eos_token": {"__type": "AddedToken", "content": "<end>", "lstrip": False}}
    assert stand_in_tokenizer(transformers.T5TokenizerFast, config).eos_token == "<end>"


def test_templates_that_pipelines_cut_off_have_their_real_length() -> None:
    """Where they do not, a pipeline cuts into the prompt: 34 and 95 are written in diffusers."""
    qwen = stand_in_tokenizer(transformers.Qwen2Tokenizer, {})
    template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
        "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
        "<|im_start|>user\n"
    )
    assert len(qwen(template).input_ids) == 34
    llama = stand_in_tokenizer(transformers.LlamaTokenizerFast, {})
    before_prompt = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    assert abs(len(llama(before_prompt).input_ids) - DEFAULT_PROMPT_TEMPLATE["crop_start"]) <= 1


def test_line_breaks_count_only_where_the_class_keeps_them() -> None:
    breaking, plain = "one\n\ntwo", "one two"
    for cls, added in ((transformers.Qwen2Tokenizer, 1), (transformers.T5TokenizerFast, 0)):
        tokenizer = stand_in_tokenizer(cls, {})
        lengths = [len(tokenizer(text).input_ids) for text in (breaking, plain)]
        assert lengths[0] - lengths[1] == added


def test_chat_templates_take_texts_and_parts_and_return_text_or_tokens() -> None:
    tokenizer = stand_in_tokenizer(transformers.Qwen2Tokenizer, {})
    plain = [{"role": "user", "content": "a horse"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a horse"}]}]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\na horse<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(parts, tokenize=False) in text
    silent = tokenizer.apply_chat_template(
        plain, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert silent == text + "<think>\n\n</think>\n\n"
    encoded = tokenizer.apply_chat_template(
        [plain, parts], tokenize=True, return_dict=True, return_tensors="pt",
        padding="max_length", max_length=32, truncation=True,
    )  # fmt: skip
    assert encoded["input_ids"].shape == encoded["attention_mask"].shape == (2, 32)


def test_a_template_in_the_configuration_goes_before_ours() -> None:
    config = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    tokenizer = stand_in_tokenizer(transformers.Qwen2Tokenizer, config)
    message = [{"role": "user", "content": "a horse"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "a horse"


def test_a_processor_of_texts_and_pictures_takes_texts() -> None:
    processor = build_processor(transformers.PixtralProcessor, {"patch_size": 14})
    assert isinstance(processor, StandInProcessor)
    message = [{"role": "user", "content": [{"type": "text", "text": "a horse"}]}]
    encoded = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt",
        padding="max_length", max_length=512, truncation=True,
    )  # fmt: skip
    assert encoded["input_ids"].shape == (1, 512)
    assert processor(text="a horse", return_tensors="pt").input_ids.shape[0] == 1
    assert processor.tokenizer.batch_decode([[0]])
    with pytest.raises(InvalidRequest, match="PixtralProcessor"):
        processor(text="a horse", images=["not looked at"])


def test_a_model_that_wants_positions_gets_them() -> None:
    tokenizer = stand_in_tokenizer(ChatGLMTokenizer, {"model_max_length": 256})
    encoded = tokenizer(["mars", PROMPT], padding="max_length", max_length=16, return_tensors="pt")
    assert encoded.position_ids.shape == (2, 16)
    assert encoded.position_ids[0].tolist() == [0] * 14 + [0, 1]
    assert encoded.position_ids[1].tolist() == [0] * 4 + list(range(12))
    assert tokenizer("mars")["position_ids"] == [0, 1]


def test_bytes_need_no_stand_in() -> None:
    tokenizer = build_processor(transformers.ByT5Tokenizer, {"model_max_length": 256})
    assert tokenizer.decode(tokenizer("mars").input_ids, skip_special_tokens=True) == "mars"
    assert not hasattr(tokenizer, "is_stand_in")


def test_picture_and_sound_processors_are_real() -> None:
    pictures = build_processor(transformers.CLIPImageProcessor, {"crop_size": 224})
    assert pictures.crop_size == {"height": 224, "width": 224}
    sound = build_processor(transformers.ClapFeatureExtractor, {"sampling_rate": 48_000})
    assert sound.sampling_rate == 48_000


def test_a_vocabulary_in_the_folder_is_used(tmp_path: Path) -> None:
    saved = transformers.T5TokenizerFast(model_max_length=99)
    saved.add_tokens(["mars"])
    saved.save_pretrained(tmp_path)
    loaded = build_processor(transformers.T5TokenizerFast, {"model_max_length": 77}, tmp_path)
    assert loaded.model_max_length == 99
    assert loaded("mars").input_ids == saved("mars").input_ids


def test_a_damaged_vocabulary_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidRequest, match="repair its files, or remove its vocabulary"):
        build_processor(transformers.T5TokenizerFast, {}, tmp_path)
