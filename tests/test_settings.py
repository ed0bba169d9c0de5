"""Which keys of a spec's free options are secrets, and which only sound like one."""

import pytest

from stillhouse.settings import refuse_secret_urls, refuse_secrets

NONE = [
    {"max_tokens": 128, "tokenizer": "gpt2", "num_tokens": "all", "eos_token": "</s>"},
    {"max_token": 5, "tokenizer_path": "a/b", "tokens": ["a", "b"], "token_column": "text"},
    {"token": "anon"},
    {"token": "google_default"},
    {"token": "cloud", "project": "p"},
    {"anon": True, "endpoint_url": "http://127.0.0.1:9000", "profile": "team"},
    {"client_kwargs": {"region_name": "eu-west-1"}, "use_private_endpoint": True},
    {"account_name": "a", "host": "abfs://container@account.dfs.core.windows.net/path"},
]
SECRETS = [
    ("token", {"token": "ya29.abc"}),
    ("token", {"token": {"type": "service_account"}}),
    ("key", {"key": "AKIA"}),
    ("secret", {"secret": "x"}),
    ("password", {"password": 12345}),
    ("session_token", {"session_token": "x"}),
    ("aws_secret_access_key", {"client_kwargs": {"aws_secret_access_key": "x"}}),
    ("awsSecretAccessKey", {"awsSecretAccessKey": "x"}),
    ("sas_token", {"sas_token": "?sv=1"}),
    ("accountKey", {"accountKey": "x"}),
    ("connection_string", {"connection_string": "AccountKey=x"}),
    ("api_key", {"api_key": "x"}),
    ("hf_token", {"hf_token": "x"}),
    ("endpoint_url", {"endpoint_url": "http://user:hidden@host:9000"}),
    ("proxies.http", {"proxies": [{"http": "http://user:hidden@proxy"}]}),
]


@pytest.mark.parametrize("options", NONE, ids=str)
def test_no_secret(options):
    refuse_secrets(options)


@pytest.mark.parametrize(("key", "options"), SECRETS, ids=[key for key, _ in SECRETS])
def test_a_secret_is_refused_by_its_key(key, options):
    with pytest.raises(ValueError, match="use the environment or a profile") as refused:
        refuse_secrets(options)
    assert f"{key}`" in str(refused.value)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:pw@host/a.jsonl",
        "https://a.blob.core.windows.net/c/a.jsonl?sv=2024&sig=abc%3D",
        "https://b.s3.amazonaws.com/a.jsonl?X-Amz-Credential=x&X-Amz-Signature=y",
        "https://storage.googleapis.com/b/a?X-Goog-Signature=y",
    ],
)
def test_a_url_with_a_secret_anywhere_in_a_spec(url):
    with pytest.raises(ValueError, match=r"`pool\.path`"):
        refuse_secret_urls({"store": "./s", "pool": {"path": ["a.jsonl", url]}}, "")


def test_urls_without_one():
    refuse_secret_urls({"path": ["s3://b/a:b@c", "https://host/a.jsonl?page=2&sign=no"]}, "")
