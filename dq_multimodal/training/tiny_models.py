"""Tokenizers and models with random weights, to try out recipes without a network."""

from pathlib import Path
from typing import Any

PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
MAX_POSITIONS = 1024
HEAD_DIM = 64
PATCH, N_LAYERS = 8, 2
IMAGE = "<image>"
"""Token of a place of an image."""
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role + ': ' }}"
    "{% for part in turn.content %}{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{{ eos_token if turn.role == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)


def train_tokenizer(texts: list[str], vocab_size: int, special: tuple[str, ...] = ()) -> Any:
    """Train a byte-level BPE tokenizer, which can write any text.

    The vocabulary holds the special tokens and the 256 bytes among others.

    Args:
        texts: To train on.
        vocab_size: Tokens, at most this many.
        special: More special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": PAD, "bos_token": BOS, "eos_token": EOS},
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def configure_llama(tokenizer: Any, hidden_size: int, num_hidden_layers: int) -> Any:
    """Give the settings of a Llama; its width is a multiple of that of a head."""
    from transformers import LlamaConfig

    n_heads = hidden_size // HEAD_DIM
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_llava(
    folder: Path, texts: list[str], *, image_size: int, hidden_size: int = 128, seed: int = 0
) -> None:
    """Write a LLaVA, a CLIP vision tower and a Llama of two layers each, with its processor.

    `AutoModelForImageTextToText` and `AutoProcessor` load the folder like any model of the Hub. Its
    chat template takes turns whose content is parts of type image and text.

    Args:
        folder: Where to; it is there whole or not at all.
        texts: What the tokenizer is trained on.
        image_size: Side of the pictures in pixels, a multiple of 8.
        hidden_size: Width, a multiple of 64.
        seed: Of the weights.
    """
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        set_seed,
    )

    tokenizer = train_tokenizer(texts, 1024, (IMAGE,))
    text = configure_llama(tokenizer, hidden_size, N_LAYERS)
    vision = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 2,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=text.num_attention_heads,
        image_size=image_size,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    set_seed(seed)
    model = LlavaForConditionalGeneration(config)
    size = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    partial = folder.with_name(f".{folder.name}.tmp")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.replace(folder)
