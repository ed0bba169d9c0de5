"""Low-rank adapters on a given model (LoRA; Hu et al., 2021), by peft.

    y = W x + (alpha / rank) B A x        A [rank, in] random, B [out, rank] zero at first

Only A and B are trained. Merged, the result is an ordinary model with W + (alpha / rank) B A.
"""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from stillhouse.errors import ModelError
from stillhouse.training.spec import LoraSettings

_ALL = "all-linear"


def with_adapters(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Put adapters into a float32 model, in place, and freeze its own weights.

    `get_base_model()` of the result is the model as it is trained; it scores as before at first.

    Args:
        seed: of the random matrices A.

    Raises:
        ModelError: it has no linear layers of these names between embeddings and head, or smaller
            ones than the rank.
    """
    targets = adapted_layers(model, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that hold their weights transposed
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def adapted_layers(model: PreTrainedModel, settings: LoraSettings) -> str | list[str]:
    """The layers that get adapters, as `LoraConfig` names them; embeddings and head may be one
    matrix and stay. The model's weights may be on `meta`.

    Raises:
        ModelError: as `with_adapters`.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    layers = {
        name: min(list[int](one.weight.shape))
        for name, one in cast(Any, model).named_modules()
        if (isinstance(one, nn.Linear) or type(one).__name__ == "Conv1D") and one not in ends
    }
    if settings.targets == _ALL:
        asked, wrong = layers, list[str]()
    else:
        ending = {t: {n for n in layers if f".{n}".endswith(f".{t}")} for t in settings.targets}
        asked = {name: layers[name] for names in ending.values() for name in names}
        wrong = [target for target, names in ending.items() if not names]
    if wrong:
        names = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise ModelError(
            f"`lora.targets`: {', '.join(wrong)}: adapters go on linear layers between embeddings "
            f"and head, which the model calls {', '.join(names)}"
        )
    if settings.rank > max(asked.values()):
        raise ModelError(
            f"`lora.rank: {settings.rank}` is above the {max(asked.values())} rows or columns of "
            "the layers: adapters would be larger than what they adapt"
        )
    return _ALL if settings.targets == _ALL else list(settings.targets)


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The model with its adapters added to its own weights."""
    model: Any = adapted
    return model.merge_and_unload()


def save_adapters(adapted: PeftModel, folder: Path) -> None:
    """Write the adapters alone, as `PeftModel.from_pretrained` reads them; the same bytes each
    time.
    """
    model: Any = adapted
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):  # a set, in any order
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
