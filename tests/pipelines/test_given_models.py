"""Models that a spec gives by path: checked with their tokenizer, and read from the store alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from architectures import own_nll, tiny
from pydantic import ValidationError
from small import STYLES, rows, small_spec, write
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from stillhouse import open_selection
from stillhouse.errors import ModelError, SpecError
from stillhouse.jobs.verify import verify
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.given import check_given
from stillhouse.spec import SelectSpec
from stillhouse.text.tokenizer import train_tokenizer

BOS = "<bos>"


def put_tokenizer(folder: Path, texts: list[str], *, bos: bool = False, size: int = 300) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = Backend.from_str(train_tokenizer(texts, vocab_size=size).decode())
    made.add_special_tokens([BOS])
    if bos:
        tokens = [(BOS, made.token_to_id(BOS))]
        made.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=tokens
        )
    made.save(str(folder / "tokenizer.json"))
    return folder


def put_model(folder: Path, seed: int, architecture: str = "llama") -> Path:
    tiny(architecture, seed, vocab_size=320).save_pretrained(folder)
    return folder


SEA = [" ".join(words) for words in STYLES.values()] * 5
LAW = [" ".join(reversed(words)) for words in STYLES.values()] * 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with and without a tokenizer beside them, and a little data."""
    folder = tmp_path_factory.mktemp("given")
    write(folder / "pool" / "a.parquet", rows(1, 8, ["sea", "law"]))
    write(folder / "target" / "b.parquet", rows(2, 6, ["sea"]))
    for name, texts in (("prior", SEA), ("conditional", SEA), ("other", LAW)):
        put_tokenizer(put_model(folder / name, len(name)), texts)
    put_model(folder / "bare", 5)
    put_tokenizer(folder / "copy", SEA, bos=True)
    put_tokenizer(folder / "law", LAW)
    put_tokenizer(folder / "large", SEA, size=330)
    return folder


def spec(place: Path, **changes: object) -> SelectSpec:
    """Of the small one without its tokenizer."""
    content = small_spec(place)
    del content["tokenizer"]
    given = {k: {"path": str(place / v)} for k, v in changes.items() if isinstance(v, str)}
    return SelectSpec.model_validate(content | changes | given)


def test_the_tokenizer_is_that_of_the_models(place: Path) -> None:
    both = spec(place, prior="prior", conditional="conditional")
    assert both.tokenizer.path == str(place / "prior")
    assert spec(place, conditional="conditional").tokenizer.path == str(place / "conditional")
    assert spec(place).tokenizer.train is not None
    named = spec(place, prior="prior", tokenizer={"bos": False})
    assert (named.tokenizer.path, named.tokenizer.bos) == (str(place / "prior"), False)
    check_given(both)
    check_given(spec(place, prior="bare", conditional="prior", tokenizer="copy"))
    mix = {
        "job": "mix",
        "target": {"path": "a"},
        "auxiliary": {"path": "b"},
        "model": {"kind": "decoder", "path": "./model"},
    }
    assert MixSpec.model_validate(mix).tokenizer.path == "./model"
    with pytest.raises(ValidationError, match=r"`tokenizer.train` beside `model.path`"):
        MixSpec.model_validate(mix | {"tokenizer": {"train": {}}})


@pytest.mark.parametrize("key", ["prior", "conditional"])
def test_no_tokenizer_is_trained_beside_a_given_model(place: Path, key: str) -> None:
    with pytest.raises(ValidationError, match=rf"`tokenizer.train` beside `{key}.path`"):
        spec(place, **{key: "prior"}, tokenizer={"train": {"vocab_size": 300}})


REFUSED: dict[str, tuple[dict[str, str], type[Exception], str]] = {
    "no tokenizer": ({"prior": "bare"}, SpecError, r"bare' has no tokenizer .* `tokenizer.path`"),
    "another": ({"prior": "prior", "tokenizer": "law"}, ModelError, r"law' .* beside prior "),
    "larger": (
        {"prior": "prior", "tokenizer": "large"},
        ModelError,
        r"large' is not the one beside prior .*\(331 ids, the model's 301\)",
    ),
    "two that differ": (
        {"prior": "prior", "conditional": "other"},
        ModelError,
        r"prior' is not the one beside conditional '.*other'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizers_of_other_models_are_refused(place: Path, name: str) -> None:
    """Without Ray, before anything is written."""
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as refused:
        check_given(spec(place, **changes))
    assert refused.value.exit_code == 2
    assert not (place / "store").exists()


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A hub's cache with two Gemma 2 models, whose tokenizer puts BOS before a text."""
    for seed, name in enumerate(("prior", "conditional")):
        repository = tmp_path / "cache" / "hub" / f"models--sea--{name}"
        put_tokenizer(put_model(repository / "snapshots" / "0123", seed, "gemma2"), SEA, bos=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")
    return tmp_path


def test_hub_models_are_read_from_the_store(ray_cluster: str, hub: Path) -> None:
    """The driver's cache is mounted for the driver alone: no worker's machine has that folder.

    Losses are those of the models' own logits, soft cap and BOS included.
    """
    write(hub / "pool" / "a.parquet", rows(1, 8, ["sea", "law"]))
    write(hub / "target" / "b.parquet", rows(2, 6, ["sea"]))
    content = small_spec(hub, prior={"path": "sea/prior"}, conditional={"path": "sea/conditional"})
    del content["tokenizer"]
    content |= {"selection": {"min_score": -1e9, "exclude_contaminated": False}}
    content["compute"] |= {"address": ray_cluster}
    (hub / "spec.yaml").write_text(yaml.safe_dump(content))
    home = hub / "home"
    home.mkdir()
    command = f"mount --bind {hub}/cache {home} && exec {Path(sys.executable).parent}/stillhouse"
    alone = ["unshare", "--mount", "sh", "-c", f"{command} run {hub}/spec.yaml --json"]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("may not mount")
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(alone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(home.iterdir()) == []
    result = json.loads(done.stdout)
    kept = open_selection(result["artifacts"]["selection"]).to_arrow().read_all()
    ids = np.array(kept["input_ids"].to_pylist())
    words = Backend.from_file(str(next((hub / "cache").rglob("tokenizer.json"))))
    assert BOS not in words.decode(ids.flatten().tolist(), skip_special_tokens=False)
    column = {"prior": "prior_nll", "conditional": "conditional_nll"}
    for seed, name in enumerate(column):
        expected = own_nll(tiny("gemma2", seed, 320), ids, before=words.token_to_id(BOS)).mean(1)
        found = kept[column[name]].to_numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert result["artifacts"][name].startswith(str(hub / "store"))
    assert verify(result["run"], 16)["problems"] == []
