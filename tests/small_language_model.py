"""A folder with a tiny untrained causal language model, a token for every byte."""

from pathlib import Path

from small_gguf import byte_tokens, small_llama


def write_language_model(folder: Path) -> Path:
    """Save the model of `small_llama` with its tokenizer; gives the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*byte_tokens(), "<pad>", "<s>", "</s>"]
    vocabulary = {token: k for k, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    small_llama().save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
