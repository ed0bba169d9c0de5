"""A small model of random weights whose answers end: many of its tokens are ends."""

import json

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def small_model(folder, *, seed=0, hidden=32, template=TEMPLATE, context=1024, ends=True):
    """Write a model with a byte-level tokenizer and a chat template; the folder.

    Without `ends` hardly an answer ends before its limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = tokenizers.Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        eos_token_id=[0, *range(1, len(pieces), 11)] if ends else 0,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
