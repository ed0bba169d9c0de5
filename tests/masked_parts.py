"""Tiny masked language models of random weights, and a tokenizer of their kind."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, PreTrainedModel

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CLS_ID, MASK_ID = 2, 4
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"intermediate_size": 64}
_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_IDS = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
CONFIGS = {
    "bert": ("Bert", _SIZES | _DROPOUT),
    "roberta": ("Roberta", _SIZES | _DROPOUT),
    "electra": ("Electra", _SIZES | _DROPOUT | {"embedding_size": 16}),
    "distilbert": (
        "DistilBert",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0}
        | {"attention_dropout": 0.0},
    ),
    "modernbert": ("ModernBert", _SIZES | _IDS | {"local_attention": 4}),
}


def tiny_masked(
    architecture: str = "bert", *, vocab_size: int, positions: int = 64, seed: int = 0
) -> PreTrainedModel:
    """A float32 model without dropout; its weights are large, so that its losses differ."""
    name, sizes = CONFIGS[architecture]
    config = getattr(transformers, f"{name}Config")(
        **sizes, vocab_size=vocab_size, max_position_embeddings=positions
    )
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def put_bert_tokenizer(
    folder: Path, words: list[str], *, masks: bool = True, declares: bool = True
) -> int:
    """A tokenizer of whole words as BERT's are saved; the number of its ids.

    Args:
        masks: it has a mask token.
        declares: its configuration names its special tokens, which BERT's own does not.
    """
    declared = {name: token for name, token in SPECIAL.items() if masks or name != "mask_token"}
    special = [*declared.values()]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted({*words})])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    made.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **declared} if declares else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return len(vocabulary)
