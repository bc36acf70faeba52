"""Public data sets, without the network."""

from collections.abc import Iterator
from typing import Any

import pytest
import xxhash

from moe_jax.config import UserError
from moe_jax.data import documents
from moe_jax.data.hub import HUB, articles


def serve(monkeypatch: pytest.MonkeyPatch, *texts: str, error: Exception | None = None) -> list[Any]:
    """The hub gives these texts, and then fails. Returns what it is asked for."""
    asked: list[Any] = []

    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in texts)
        if error is not None:
            raise error

    def load(*arguments: Any, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((*arguments, options))
        return rows()

    monkeypatch.setattr("datasets.load_dataset", load)
    return asked


@pytest.mark.parametrize("name", HUB)
def test_a_data_set_is_named_by_its_revision(name: str) -> None:
    corpus = HUB[name]
    assert corpus.name == name
    assert len(corpus.revision) == 40
    text = f"{corpus.repository} {corpus.configuration} {corpus.revision}"
    assert corpus.fingerprint() == xxhash.xxh3_128_hexdigest(text.encode())
    assert (corpus.size("train"), corpus.size("valid")) == (None, None)


@pytest.mark.parametrize(("split", "asked_for"), [("train", "train"), ("valid", "validation")])
def test_a_split_has_the_hubs_name(split: Any, asked_for: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, "A tale.")
    assert list(HUB["pg19"].documents(split)) == ["A tale."]
    ((repository, configuration, options),) = asked
    revision = HUB["pg19"].revision
    assert (repository, configuration) == ("emozilla/pg19", None)
    assert options == {"split": asked_for, "revision": revision, "streaming": True}


def test_rows_are_documents_but_for_wikitext(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["\n", " = One = \n", " It is . \n", "\n", " = Two = \n", " = = Part = = \n"]
    serve(monkeypatch, *lines)
    assert list(HUB["tinystories"].documents("train")) == [line.strip() for line in lines if line.strip()]
    assert list(HUB["wikitext"].documents("train")) == ["= One = \n It is .", "= Two = \n = = Part = ="]


def test_a_long_document_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LONGEST", 32)
    serve(monkeypatch, "a" * 50, "b")
    assert list(HUB["pg19"].documents("train")) == ["a" * 32, "a" * 18, "b"]


def failures() -> list[Exception]:
    import datasets
    import huggingface_hub

    response: Any = type("Response", (), {"headers": {}, "request": None, "status_code": 500})()
    return [
        OSError("gone\nmore"),
        datasets.exceptions.DatasetsError("gone\nmore"),  # pyright: ignore[reportAttributeAccessIssue]
        huggingface_hub.errors.HfHubHTTPError("gone\nmore", response=response),
        RuntimeError("gone\nmore"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_failure_of_the_hub_is_one_line(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "A tale.", error=failures()[number])
    documents = HUB["tinystories"].documents("train")
    assert next(documents) == "A tale."
    with pytest.raises(UserError, match=r"^tinystories: no network, or the hub cannot be reached \(gone\); use --data"):
        list(documents)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], [""]),
        ([" = A = \n", "x\n"], [" = A = \nx\n"]),
        (["\n", " = A = \n", "x\n"], ["\n", " = A = \nx\n"]),
        ([" = A = \n", "x\n", " = B = \n"], [" = A = \nx\n = B = \n"]),  # not after a blank line
        ([" = A = \n", " \n", " = B = "], [" = A = \n \n", " = B = "]),
        ([" = A = \n", "\n", " = = B = = \n"], [" = A = \n\n = = B = = \n"]),
        (["\n", "= A =\n", " = A\n", "x = A = \n"], ["\n= A =\n = A\nx = A = \n"]),
    ],
)
def test_an_article_begins_at_a_heading_after_a_blank_line(lines: list[str], found: list[str]) -> None:
    assert list(articles(lines)) == found
