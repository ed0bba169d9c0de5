"""A model behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, a hosted one)."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from stillhouse.errors import EndpointError, EndpointRefusedError
from stillhouse.generation.asking import Answer, Ask
from stillhouse.generation.model_settings import EndpointSettings

_MAX_REASON = 300


class Endpoint:
    """Asks an endpoint for chat completions.

    The client repeats what was not answered (no connection, a time-out, 408, 409, 429, 5xx) after
    pauses that grow and vary, or as long as the server says.

    Args:
        settings: of the spec.
        in_flight: calls at once.
    """

    def __init__(self, settings: EndpointSettings, in_flight: int) -> None:
        self._settings, self._free = settings, BoundedSemaphore(in_flight)
        self.in_flight: int | None = in_flight

    @property
    def identity(self) -> list[Any]:
        return self._settings.identity

    @cached_property
    def _client(self) -> Any:
        from openai import OpenAI

        one = self._settings
        return OpenAI(
            base_url=one.url,
            api_key=read_key(one) or "none",
            timeout=one.timeout_s,
            max_retries=one.retries,
        )

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """The answers of calls, one after the other.

        Raises:
            EndpointRefusedError: the key or the model's name is not accepted. EndpointError: no
                answer after all retries, or one of another protocol.
        """
        with self._free:
            return [self._answer(ask) for ask in asks]

    def _answer(self, ask: Ask) -> Answer:
        import openai

        place = f"{self._settings.url} ({self._settings.model})"
        try:
            made = self._client.chat.completions.create(
                model=self._settings.model,
                messages=[{"role": "user", "content": ask.prompt}],
                temperature=ask.temperature,
                max_tokens=ask.max_tokens,
                seed=ask.seed,
                extra_body=self._settings.options or None,
            )
            return _parsed(made)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EndpointRefusedError(
                f"{place} refuses the key ({error.status_code}): {self._where_key()}"
            ) from None
        except openai.NotFoundError as error:
            raise EndpointRefusedError(
                f"{place} knows no such model or path: {_reason(error)}: `endpoint.url` ends where "
                "/chat/completions follows, such as http://host:8000/v1"
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Answer(fault=f"the endpoint refuses the call: {_reason(error)}")
        except openai.OpenAIError as error:
            raise EndpointError(
                f"{place} does not answer after {self._settings.retries} retries: "
                f"{_reason(error)}: run again once it does; answered calls are not repeated"
            ) from None
        except (AttributeError, TypeError, IndexError, ValueError):
            raise EndpointError(
                f"{place} is no OpenAI-compatible server: `endpoint.url` ends where "
                "/chat/completions follows, such as http://host:8000/v1"
            ) from None

    def _where_key(self) -> str:
        one = self._settings
        if one.key_env is not None:
            return f"look at the variable {one.key_env} (`endpoint.key_env`)"
        if one.key_file is not None:
            return f"look at the file {one.key_file} (`endpoint.key_file`)"
        return "name the variable that holds it by `endpoint.key_env`"


def _parsed(made: Any) -> Answer:
    choice, usage = made.choices[0], made.usage
    return Answer(
        text=(choice.message.content or "").encode(errors="replace").decode().strip(),
        finished=choice.finish_reason != "length",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )


def read_key(settings: EndpointSettings) -> str | None:
    """The key, from the environment or a file of this machine; None where none is named.

    Raises:
        EndpointRefusedError: the variable is not set, or the file cannot be read.
    """
    name, path = settings.key_env, settings.key_file
    if name is not None and not os.environ.get(name):
        raise EndpointRefusedError(
            f"`endpoint.key_env`: the variable {name} is not set where the calls are made: set it "
            "on every node before Ray starts there"
        )
    if path is not None:
        try:
            return Path(path).expanduser().read_text().strip()
        except OSError as error:
            raise EndpointRefusedError(
                f"`endpoint.key_file`: {path} cannot be read where the calls are made: "
                f"{error.strerror}"
            ) from None
    return None if name is None else os.environ[name]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON]
