"""Low-rank adapters on a given model (LoRA; Hu et al., 2021), by peft.

    y = W x + (alpha / rank) B A x        A [rank, in] random, B [out, rank] zero at first

Only A and B are trained. Merged, the result is an ordinary model with W + (alpha / rank) B A.
"""

import json
import warnings
from pathlib import Path
from typing import Any

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
        ModelError: it has no linear layers of these names, or they are its embeddings or head.
    """
    targets = _ALL if settings.targets == _ALL else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,
    )
    linear = sorted({name.rsplit(".", 1)[-1] for name, one in model.named_modules() if _fits(one)})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that hold their weights transposed
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"`lora.targets: {targets}`: the model has {', '.join(linear)}") from (
                error
            )
    assert isinstance(adapted, PeftModel)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    touched = next((one for one in ends if hasattr(one, "base_layer")), None)
    if touched is not None:
        raise ModelError(
            f"`lora.targets: {targets}` holds the embeddings or the head, which may be one matrix "
            f"and stay as they are: choose from {', '.join(linear)}"
        )
    return adapted


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


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
