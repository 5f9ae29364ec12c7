"""Credentials in URIs are taken out, put back where a store is opened, and hidden in what is said."""

import os

import pytest

from pipelines.runs import credentials, storage
from pipelines.runs.credentials import complete, redact, strip
from pipelines.runs.errors import UserError


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setenv(credentials.VARIABLE, "")


@pytest.mark.parametrize(
    ("given", "bare", "whole"),
    [
        ("s3://KEYKEYKEY:SECRETSECRET@bucket/a/b.tar", "s3://bucket/a/b.tar", None),
        ("s3://KEYKEYKEY:SEC/RET+SECRET@bucket/a", "s3://bucket/a", "s3://KEYKEYKEY:SEC%2FRET%2BSECRET@bucket/a"),
        ("s3://K:S@bucket/a?region=eu-west-1", "s3://bucket/a?region=eu-west-1", None),
        ("https://host:81/x.tar?token=abcdefgh", "https://host:81/x.tar", None),
        ("https://h/x.tar?part=1&X-Amz-Signature=00ff00ff&X-Amz-Credential=AKIA%2Fs3", "https://h/x.tar?part=1", None),
        ("hdfs://user@name/x", "hdfs://user@name/x", None),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x", None),
        ("s3://bucket/a:b@c.tar", "s3://bucket/a:b@c.tar", None),
        ("s3://bucket/train-?_token.tar", "s3://bucket/train-?_token.tar", None),
        ("data/a:b@c?token=1", "data/a:b@c?token=1", None),
    ],
)
def test_a_uri_without_its_credentials_and_with_them_again(given, bare, whole):
    assert strip(given) == bare
    assert complete(bare) == (whole or given)


def test_several_in_one_text_and_what_patterns_expand_to():
    given = "s3://KEYKEYKEY:SECRETSECRET@one/{a,b}.tar::https://h/{0..1}.tar?sig=abcdefgh::s3://two/x.tar"
    assert strip(given) == "s3://one/{a,b}.tar::https://h/{0..1}.tar::s3://two/x.tar"
    assert complete("s3://one/b.tar") == "s3://KEYKEYKEY:SECRETSECRET@one/b.tar"
    assert complete("https://h/1.tar") == "https://h/1.tar?sig=abcdefgh"
    assert complete("s3://two/x.tar") == "s3://two/x.tar"


@pytest.mark.parametrize(
    "text",
    [
        "cannot open s3://KEYKEYKEY:hunter2hunter2@bucket/x: no",
        "postgresql+psycopg2://user:hunter2hunter2@host:5432/db is not there",
        "http://user:hunter2hunter2@mlflow.example.org/#/x, 401",
        "'https://h/x.tar?password=hunter2hunter2&y=1' and https://h/x.tar?api_key=hunter2hunter2",
        "gs://b/x?access_token=hunter2hunter2",
    ],
)
def test_what_is_said_hides_them(text):
    assert "hunter2" not in redact(text) and credentials.HIDDEN in redact(text)


def test_what_was_stripped_is_hidden_wherever_it_appears():
    strip("s3://KEYKEYKEY:SEC%2FRETSECRET@bucket/x https://h/x?token=tokentoken")
    assert (
        redact("Key KEYKEYKEY, secret SEC/RETSECRET (SEC%2FRETSECRET), tokentoken") == "Key ***, secret *** (***), ***"
    )


def test_paths_and_plain_uris_are_said_as_they_are():
    for text in (
        "/data/a:b@c",
        "s3://bucket/x?region=eu-west-1",
        "file:///a?b=1",
        "k@x.org: 3:4@5",
        "a://b/c?monkey=1",
    ):
        assert redact(text) == strip(text) == text


def test_too_many_for_an_environment_are_refused():
    with pytest.raises(UserError, match="profile or a role"):
        strip(" ".join(f"https://h/{number}.tar?token={'x' * 100}{number}" for number in range(500)))


def test_storage_stores_uris_without_and_opens_them_with(s3_server, s3_folder, monkeypatch):
    folder = s3_folder.replace("s3://", "s3://KEYKEYKEY:SECRETSECRET@")
    assert storage.absolute(f"{folder}/") == s3_folder
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    storage.write_text_atomic(f"{s3_folder}/x", "y")
    assert storage.read_bytes(f"{s3_folder}/x") == b"y"
