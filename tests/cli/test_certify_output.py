"""What `certify` prints of a claim: plain titles, at most 80 columns, and no spaces at the end of a line."""

import pytest

from moe_jax.certify import Certificate
from moe_jax.certify.causality import VARIANTS, PerturbationResult
from moe_jax.cli import certify
from moe_jax.system.terminal import rich_console


def test_a_claim_is_printed_in_80_columns_without_padding(capsys: pytest.CaptureFixture[str]) -> None:
    found = str(PerturbationResult(123_456, 6, 1_024, 8_192, 1_234, 0, 5, 0.5))
    certificate = Certificate("causality: a", True, found, "earlier [outputs] change " * 6, "a plain title")
    console = rich_console(width=200)
    certify._print(console, certificate)
    certify._print(console, certificate._replace(passed=False, title=""))
    for line in (certify.TRIED, certify.NOT_TRIED):
        certify._print_wrapped(console, line)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pass  a plain title"
    assert "FAIL  causality: a" in lines
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()]
    assert "1,024 of 8,192 positions" in " ".join(" ".join(lines).split())
    assert any("[outputs]" in line for line in lines)


def test_headings_and_titles_fit_into_a_line() -> None:
    titles = [f"pass  {variant.title}" for variant in VARIANTS.values()]
    assert max(map(len, [*certify.GROUPS.values(), *titles])) <= 80
