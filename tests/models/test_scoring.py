from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stillhouse.models import scoring
from stillhouse.models.causal_lm import build_model, save_model
from stillhouse.models.scoring import ScoringModel, load_scoring_model
from stillhouse.selection.color import token_nll
from stillhouse.spec import ModelSettings, ScoringSettings

VOCAB, LENGTH = 1000, 24
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def small(architecture: str = "llama") -> PreTrainedModel:
    settings = ModelSettings.model_validate(
        {"architecture": architecture, "hidden_size": 64, "num_layers": 2}
    )
    model = build_model(settings, vocab_size=VOCAB, sequence_length=LENGTH, seed=0, eos_id=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    return model


def tokens(num_rows: int, dtype: str = "uint16") -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, VOCAB, (num_rows, LENGTH)).astype(dtype)


def expected(model: PreTrainedModel, input_ids: NDArray[Any]) -> NDArray[np.float32]:
    ids = torch.from_numpy(input_ids.astype(np.int64)).to(model.device)
    with torch.inference_mode():
        return token_nll(model(input_ids=ids).logits, ids).cpu().numpy()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2", "gpt_neox"])
def test_losses_are_the_definitions(architecture: str) -> None:
    model, ids = small(architecture), tokens(5)
    losses = ScoringModel(model, dtype=torch.float32, micro_batch=2).token_nll(ids)
    assert losses.dtype == np.float32 and losses.shape == (5, LENGTH - 1)
    np.testing.assert_allclose(losses, expected(model, ids), atol=2e-5)


def test_a_sequences_bytes_do_not_depend_on_its_neighbours() -> None:
    scorer, ids = ScoringModel(small(), dtype=torch.float32, micro_batch=4), tokens(11)
    whole = scorer.token_nll(ids)
    for dtype in ("uint32", "int64"):
        assert scorer.token_nll(tokens(11, dtype)).tobytes() == whole.tobytes()
    blocks = [scorer.token_nll(ids[start : start + 4]) for start in range(0, 11, 4)]
    assert np.concatenate(blocks).tobytes() == whole.tobytes()
    other = ids.copy()
    other[1:] = 7
    assert scorer.token_nll(other)[0].tobytes() == whole[0].tobytes()


def test_chunks_smaller_than_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(), tokens(8)
    monkeypatch.setitem(scoring._CHUNK_LOGITS, "cpu", 1)
    losses = ScoringModel(model, dtype=torch.float32).token_nll(ids)
    np.testing.assert_allclose(losses, expected(model, ids), atol=2e-5)


def test_bfloat16_stays_close_and_leaves_the_weights() -> None:
    model, ids = small(), tokens(16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = ScoringModel(model, dtype=torch.bfloat16).token_nll(ids)
    reference = expected(model, ids)
    assert 0 < np.abs(losses - reference).max() < 5e-2
    assert np.abs(losses.mean(1) - reference.mean(1)).max() < 5e-3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class HungryBody(torch.nn.Module):
    """Runs out of memory above `limits` sequences: one limit a call, then the last one."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body, self.sizes, self.limits = body, [], [2]

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        limit = self.limits[min(len(self.sizes), len(self.limits) - 1)]
        self.sizes.append(len(input_ids))
        if len(input_ids) > limit:
            raise torch.OutOfMemoryError
        return self.body(input_ids=input_ids, **options)


def test_out_of_memory_halves_and_remembers() -> None:
    model, ids = small(), tokens(5)
    scorer = ScoringModel(model, dtype=torch.float32, micro_batch=8)
    scorer._body = body = HungryBody(model.base_model)
    losses = scorer.token_nll(ids)
    assert body.sizes == [8, 4, 2, 2, 2]
    np.testing.assert_allclose(losses, expected(model, ids), atol=2e-5)
    scorer.token_nll(ids[:2])
    assert body.sizes[5:] == [2]


def test_what_is_scored_together_has_the_bytes_of_one_micro_batch() -> None:
    """Memory runs out in the middle of a call: all of it is scored again."""
    model, ids = small(), tokens(12)
    scorer = ScoringModel(model, dtype=torch.bfloat16, micro_batch=4)
    scorer._body = body = HungryBody(model.base_model)
    body.limits = [4, 4, 2]
    losses = scorer.token_nll(ids)
    assert body.sizes == [4, 4, 4, *[2] * 6] and scorer.micro_batch == 2
    pairs = ScoringModel(model, dtype=torch.bfloat16, micro_batch=2)
    assert losses.tobytes() == b"".join(
        pairs.token_nll(ids[i : i + 2]).tobytes() for i in range(0, 12, 2)
    )


def test_too_little_memory_for_one_sequence() -> None:
    scorer = ScoringModel(small(), dtype=torch.float32, micro_batch=4)
    scorer._body = body = HungryBody(torch.nn.Identity())
    body.limits = [0]
    with pytest.raises(torch.OutOfMemoryError):
        scorer.token_nll(tokens(5))
    assert body.sizes == [4, 2, 1]


def test_load_scoring_model(tmp_path: Path) -> None:
    model, ids = small(), tokens(3)
    save_model(model, tmp_path)
    settings = ScoringSettings(micro_batch=2)
    scorer = load_scoring_model(str(tmp_path), settings, device="auto", gpus=0, threads=1)
    np.testing.assert_allclose(scorer.token_nll(ids), expected(model, ids), atol=2e-5)
    assert scorer.token_nll(tokens(0)).shape == (0, LENGTH - 1)


@GPU
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_on_a_gpu(tmp_path: Path, compiled: str) -> None:
    model, ids = small(), tokens(70)
    save_model(model, tmp_path)
    settings = ScoringSettings.model_validate({"compile": compiled, "micro_batch": 32})
    scorer = load_scoring_model(str(tmp_path), settings, device="auto", gpus=1, threads=1)
    losses, reference = scorer.token_nll(ids), expected(model, ids)
    assert np.abs(losses.mean(1) - reference.mean(1)).max() < 2e-2
    assert losses.tobytes() == scorer.token_nll(ids).tobytes()
