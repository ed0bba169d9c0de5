"""A model in this process: what it writes does not depend on the batch, against plain loops."""

import numpy as np
import pytest
import torch
from generation.models import small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.generation.asking import Ask
from stillhouse.generation.local_model import LocalModel
from stillhouse.generation.model_settings import LocalModelSettings
from stillhouse.spec import ScoringSettings

PROMPTS = ["a", "What is the capital of the sea?", "x" * 40, "Say it in other words: " + "w " * 30]


def settings(folder, **scoring):
    return LocalModelSettings(
        "d", "t", "<|endoftext|>", None, (), 1024, ScoringSettings(**scoring), str(folder),
        str(folder), "cpu", 0, 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model(folder):
    return LocalModel(settings(folder))


def by_hand(folder, ask, stops):
    """The ids of an answer by a plain loop without cache or padding, with Gumbel noise."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": ask.prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    draws, found = np.random.default_rng([ask.seed]), []
    while len(found) < ask.max_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([ids + found])).logits[0, -1].double().numpy()
        if ask.temperature:
            noise = -np.log(-np.log(draws.random(len(logits))))
            logits = logits / ask.temperature + noise
        found.append(int(logits.argmax()))
        if found[-1] in stops:
            break
    return tokenizer, found


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_it_writes_what_a_plain_loop_writes(folder, model, temperature):
    asks = [Ask("strong", p, None, temperature, 24, n) for n, p in enumerate(PROMPTS)]
    for ask, answer in zip(asks, model.answer(asks), strict=True):
        tokenizer, ids = by_hand(folder, ask, model._stops)
        ended = ids[-1] in model._stops
        wanted = tokenizer.decode(ids[: len(ids) - ended], skip_special_tokens=True).strip()
        assert (answer.text, answer.finished) == (wanted, ended)
        assert answer.completion_tokens == len(ids)


def test_an_answer_does_not_depend_on_the_batch(folder, model):
    asks = [Ask("strong", f"{p} {n}", None, 1.0, 30, n) for n in range(9) for p in PROMPTS]
    together = model.answer(asks)
    assert [model.answer([ask])[0] for ask in asks] == together
    assert model.answer(asks[::-1])[::-1] == together
    assert len({one.text for one in together}) > 20
    assert {one.finished for one in together} == {True, False}


def test_draws_follow_the_distribution(folder, model):
    """First tokens of many seeds against the softmax of the logits."""
    ask = Ask("strong", "a", None, 0.8, 1)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    with torch.no_grad():
        logits = plain(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1]
    likely = torch.softmax(logits / 0.8, 0)
    count = 800
    drawn = model.answer([Ask("strong", "a", None, 0.8, 1, seed) for seed in range(count)])
    ended = sum(one.finished for one in drawn) / count
    wanted = float(likely[model._stops].sum())
    assert ended == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / count) ** 0.5)
    assert ask.max_tokens == 1


def test_scores_are_mean_log_likelihoods(folder, model):
    pairs = [(p, f"answer {n}" * (n + 1)) for n, p in enumerate(PROMPTS)]
    answers = model.answer([Ask("judge", p, given) for p, given in pairs])
    plain = AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for (prompt, given), answer in zip(pairs, answers, strict=True):
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer(given + "\n\n", add_special_tokens=False)["input_ids"] + [0]
        ids = torch.tensor([before + after])
        with torch.no_grad():
            log_probs = plain(ids).logits[0, :-1].log_softmax(-1)
        each = log_probs.gather(1, ids[0, 1:, None])[len(before) - 1 :, 0]
        assert answer.score == pytest.approx(float(each.mean()), abs=1e-5)
    [empty] = model.answer([Ask("judge", "p", "")])
    assert empty.score is not None  # of its end


def test_scores_and_texts_side_by_side(model):
    """Scoring uses another attention than writing, in which padding counts."""
    write, score = Ask("strong", "a", None, 0.7, 12, 3), Ask("judge", "a", "b")
    alone = model.answer([write]) + model.answer([score])
    assert model.answer([write, score]) == alone
    assert model.answer([score, write])[::-1] == alone
    assert model.answer([write]) == alone[:1]


def test_what_does_not_fit_the_context(folder):
    narrow = small_model(folder.parent / "narrow", context=96)
    model = LocalModel(replace_context(settings(narrow), 96))
    fits, too_long = model.answer(
        [Ask("strong", "a" * 40, None, 0.0, 36), Ask("strong", "a" * 90, None, 0.0, 36)]
    )
    assert not fits.fault and fits.text
    assert "longer than the context of 96 tokens" in too_long.fault


def replace_context(one, context):
    from dataclasses import replace

    return replace(one, max_positions=context)


def test_without_a_template_a_turn_has_its_plain_form(folder):
    bare = small_model(folder.parent / "bare", template=None)
    [plain] = LocalModel(settings(bare)).answer([Ask("strong", "a", None, 0.0, 12)])
    written = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    written += "{% if add_generation_prompt %}{{ '\n\nassistant:' }}{% endif %}"
    same = small_model(folder.parent / "same", template=written)
    assert LocalModel(settings(same)).answer([Ask("strong", "a", None, 0.0, 12)]) == [plain]
