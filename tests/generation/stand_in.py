"""A deterministic stand-in for the models: a template that parses what it is asked."""

import hashlib
import json
import re
from collections import Counter

from stillhouse.generation.asking import Answer
from stillhouse.generation.judges import parse_scores


def number(*parts):
    """A number that depends on the parts alone."""
    return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8], 16)


class StandIn:
    """Follows the prompts of CodecLM. `reply` of a subclass changes single answers.

    Attributes:
        asked: how often each prompt was answered.
    """

    in_flight = None

    def __init__(self, name):
        self.identity, self.asked = [name], Counter()

    def answer(self, asks):
        found = []
        for ask in asks:
            self.asked[ask.prompt, ask.seed] += 1
            text = self.reply(ask)
            found.append(Answer(text, True, None, len(ask.prompt.split()), len(text.split())))
        return found

    def reply(self, ask):
        prompt, draw = ask.prompt, number(ask.prompt, ask.seed)
        if prompt.startswith("Describe the request"):
            return f"Use case: kind {draw % 7}\nSkills: skill {draw % 5}, skill {draw % 3}"
        if prompt.startswith("Write one request that asks for"):
            return f"merged {draw}"
        if prompt.startswith("Which of the two texts"):
            first, second = re.findall(r"text:\n(.*)", prompt)
            return "equal" if first[-1] == second[-1] else "first" if first < second else "second"
        if prompt.startswith("Say the request below"):
            return f"in other words {draw}"
        if prompt.startswith("Write one request"):
            return f"a request numbered {draw} of " + re.findall("Use case: (.*)", prompt)[0]
        if prompt.startswith("Requests of this kind"):
            return "\n".join(f"Rubric: hard {n}\nAction: change {n}" for n in range(4))
        if prompt.startswith("Rewrite the request"):
            action = re.findall("by this change: (.*)", prompt)[0]
            return f"rewritten by {action}: number {draw}"
        if prompt.startswith("Two assistants"):
            return f"First: {1 + draw % 10}\nSecond: {1 + draw // 16 % 10}"
        return f"{self.identity[0]} answers {number(prompt)}"


class Unlimited:
    """A budget that counts."""

    def __init__(self):
        self.calls = self.tokens = 0

    def take(self, role, calls):
        self.calls += calls

    def used(self, role, prompt_tokens, completion_tokens):
        self.tokens += prompt_tokens + completion_tokens


def scores_of(model, judge_prompt, seed):
    """What the stand-in says to a judge's prompt."""
    from stillhouse.generation.asking import Ask

    return parse_scores(model.reply(Ask("judge", judge_prompt, seed=seed)))
