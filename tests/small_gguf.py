"""A GGUF file of a tiny language model, written tensor by tensor."""

from pathlib import Path
from typing import Any


def byte_tokens() -> list[str]:
    """Give the 256 signs that stand for bytes in a byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def small_llama(seed: int = 0, n_layers: int = 2) -> Any:
    """Give an untrained model of 259 tokens; the last one is the end of a text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=n_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.2, bos_token_id=257, eos_token_id=258, pad_token_id=258,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_gguf(model: Any, path: Path) -> None:
    """Write a model of `small_llama` as GGUF, float32, with its byte-level tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*byte_tokens(), "th", "<s>", "</s>"])
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_add_bos_token(False)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        **{f"self_attn.{k}_proj": f"attn_{k}" for k in "qkv"}, "self_attn.o_proj": "attn_output",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        inner = name.removesuffix(".weight")
        if inner.startswith("model.layers."):
            number, inner = inner.removeprefix("model.layers.").split(".", 1)
            given = f"blk.{number}.{names[inner]}"
            if (part := inner[-6:-5]) in heads:  # llama.cpp turns pairs, not halves
                n, (rows, width) = heads[part], array.shape
                array = array.reshape(n, 2, rows // n // 2, width).swapaxes(1, 2)
                array = array.reshape(rows, width).copy()
        else:
            given = names[inner]
        writer.add_tensor(f"{given}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
