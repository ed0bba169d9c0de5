"""Models behind endpoints: a real server of transformers, and one that fails."""

import threading

import pytest
from generation.models import small_model
from generation.servers import KEY, served, template_server
from generation.stand_in import StandIn, Unlimited

from stillhouse.errors import EndpointError, EndpointRefusedError
from stillhouse.generation.asking import Ask, Asker
from stillhouse.generation.endpoint import Endpoint
from stillhouse.generation.local_model import LocalModel
from stillhouse.generation.model_settings import EndpointSettings
from stillhouse.storage.artifact import Store


def endpoint(url, in_flight=64, **changes):
    return Endpoint(EndpointSettings(url=url, **({"model": "m"} | changes)), in_flight)


@pytest.fixture
def server():
    with template_server() as made:
        yield made


def programs(count):
    def one(i):
        [answer] = yield [Ask("strong", f"request {i}", temperature=0.7, seed=i)]
        return {"text": answer.text}

    return [one(i) for i in range(count)]


def wanted(count):
    model = StandIn("m")
    return [{"text": model.reply(Ask("strong", f"request {i}", seed=i))} for i in range(count)]


def test_a_server_of_transformers(tmp_path):
    """The likeliest tokens of a real model, as the model in this process writes them."""
    from generation.test_local_model import settings

    folder = small_model(tmp_path / "m", ends=False)
    asks = [Ask("strong", f"prompt {n}", None, 0.0, 16) for n in range(3)]
    here = LocalModel(settings(folder)).answer(asks)
    with served(folder, tmp_path / "server.log") as url:
        found = endpoint(url, model=str(folder)).answer(asks)
    assert [one.text for one in found] == [one.text for one in here]
    assert [one.prompt_tokens for one in found] == [one.prompt_tokens for one in here]
    assert [(one.finished, one.completion_tokens) for one in found] == [(False, 16)] * 3


def test_64_calls_in_flight_at_a_server_that_fails_one_in_ten(server, tmp_path):
    server.fail_one_in, server.gate = 10, threading.Barrier(64)
    asker = Asker(Store(str(tmp_path)), {"strong": endpoint(server.url)}, Unlimited())
    assert asker.run(programs(300)) == wanted(300)
    assert server.asked == asker.counts["calls"] == 300
    assert server.most == 64 and not server.gate.broken
    assert server.count >= 330


def test_the_key_comes_from_the_environment_or_a_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    (tmp_path / "key").write_text(f"{KEY}\n")
    ask = Ask("strong", "p")
    for named in ({"key_env": "LOOPBACK_KEY"}, {"key_file": str(tmp_path / "key")}):
        endpoint(server.url, **named).answer([ask])
    assert server.keys == {f"Bearer {KEY}"}
    monkeypatch.delenv("LOOPBACK_KEY")
    with pytest.raises(EndpointRefusedError, match="variable LOOPBACK_KEY is not set"):
        endpoint(server.url, key_env="LOOPBACK_KEY").answer([ask])
    with pytest.raises(EndpointRefusedError, match="nowhere cannot be read"):
        endpoint(server.url, key_file=str(tmp_path / "nowhere")).answer([ask])


def test_a_refused_key_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    server.status = 401
    with pytest.raises(EndpointRefusedError, match="LOOPBACK_KEY") as error:
        endpoint(server.url, key_env="LOOPBACK_KEY").answer([Ask("strong", "p")])
    assert KEY not in str(error.value) and error.value.exit_code == 2
    assert server.count == 1


@pytest.mark.parametrize(
    ("changes", "status", "kind", "message"),
    [
        ({}, 503, EndpointError, "does not answer after 1 retries"),
        ({}, 404, EndpointRefusedError, "no such model"),
        ({"timeout_s": 0.2}, 200, EndpointError, "does not answer after 1 retries"),
    ],
)
def test_what_an_endpoint_may_do_wrong(server, changes, status, kind, message):
    server.status, server.delay_s = status, 1.0 if changes else 0.0
    with pytest.raises(kind, match=message):
        endpoint(server.url, retries=1, **changes).answer([Ask("strong", "p")])


def test_nothing_listens():
    with template_server() as made:
        url = made.url
    with pytest.raises(EndpointError, match="run again once it does") as error:
        endpoint(url, retries=0).answer([Ask("strong", "p")])
    assert error.value.exit_code == 4


def test_a_refused_call_and_an_empty_answer_are_no_errors(server):
    server.status = 400
    [refused] = endpoint(server.url).answer([Ask("strong", "p")])
    assert "refuses the call" in refused.fault
    server.status, server.silent = 200, True
    [empty] = endpoint(server.url).answer([Ask("strong", "p")])
    assert empty.text == "" and not empty.fault


def test_a_server_of_another_kind(server):
    with pytest.raises((EndpointError, EndpointRefusedError), match="http://host:8000/v1"):
        endpoint(server.url.removesuffix("/v1"), retries=0).answer([Ask("strong", "p")])


def test_answers_are_known_by_the_model_not_by_the_place():
    one = EndpointSettings(url="http://a:1/v1", model="m", key_env="K", retries=3)
    assert one.identity == EndpointSettings(url="http://b:2/v1", model="m").identity
    for changes in ({"model": "n"}, {"version": "2"}, {"options": {"top_p": 0.5}}):
        other = EndpointSettings(**({"url": "http://a:1/v1", "model": "m"} | changes))
        assert other.identity != one.identity
