"""The report: what is counted, what is called a preference, and that the page holds it and cannot be broken."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_jax.cli.main import run_command
from moe_jax.config import ConfigError, UserError
from moe_jax.data.tokenizers import token_pieces
from moe_jax.inspection import corpus_routing, report
from moe_jax.inspection.corpus_routing import corpus_data, count_routing
from moe_jax.inspection.report import render, report_run, write_report
from moe_jax.inspection.specialisation import log_likelihood_ratio, specialisation
from moe_jax.inspection.trace import routing_trace
from moe_jax.pages import digest
from moe_jax.runs.load import open_run
from tests.support import saved_run, tiny

pytestmark = pytest.mark.runs

HOSTILE = (
    "</script><script>window.ran = 1</script><!-- <img src=x onerror='window.ran = 1'> &amp; \u2028 \u202e {{style}}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run.save_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def written(folder: Path) -> tuple[str, dict]:
    """The page of a hostile text, and its data by --json."""
    out = folder / "report" / "page.html"
    write_report(folder, out, text=HOSTILE, json_out=folder / "data.json")
    return out.read_text(encoding="utf-8"), json.loads((folder / "data.json").read_text(encoding="utf-8"))


@pytest.fixture
def without_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles two programs, which the fixture `written` has done."""
    monkeypatch.setattr(report, "ablation", refuse)


def refuse(*_: object) -> None:
    raise UserError("not here")


def data_in(page: str) -> dict:
    """The JSON block, found as a browser does: up to the first end tag of a script."""
    begin = page.index('<script type="application/json" id="routing-data">')
    return json.loads(page[page.index(">", begin) + 1 : page.index("</script", begin)])


def test_the_page_holds_the_data_and_the_trace(folder: Path, written: tuple[str, dict]) -> None:
    page, data = written
    assert data_in(page) == data
    trace = routing_trace(open_run(folder), HOSTILE)
    text = b"".join(
        bytes.fromhex(p[1:-1]) if i in data["text"]["mark"] else p.encode()
        for i, p in enumerate(data["text"]["pieces"])
        if i
    )
    assert text.decode() == HOSTILE
    for name, values in (("expert", trace.expert_index), ("slot", trace.slot), ("keep", trace.keep)):
        np.testing.assert_array_equal(np.array(data["routing"][name]), values.reshape(2, -1))
    for name, values in (("gate", trace.gate), ("prob", 10_000 * trace.probs)):
        atol = 0.00006 if name == "gate" else 0.51
        np.testing.assert_allclose(np.array(data["routing"][name]), values.reshape(2, -1), atol=atol)
    assert data["model"]["capacity"] == 8
    assert data["run"] == {
        "name": "run",
        "preset": "nano",
        "step": 40,
        "val_bits_per_byte": 1.5,
        "val_drop_fraction": None,
        "floor": 0.5,
        "val_stream": "whole",
        **{k: data["run"][k] for k in ("params_total", "params_active")},
    }


def test_the_page_holds_the_next_tokens_and_the_ablation(folder: Path, written: tuple[str, dict]) -> None:
    data, run = written[1], open_run(folder)
    trace = routing_trace(run, HOSTILE)
    following = data["text"]["next"]
    words = [following["words"][n] for n in following["index"]]
    assert words == token_pieces(run.tokenizer, trace.next_token[:-1].reshape(-1))
    np.testing.assert_allclose(np.array(following["permille"]) / 1000, trace.next_prob[:-1].reshape(-1), atol=0.00051)
    ablation, n = data["ablation"], len(data["text"]["ids"])
    assert (ablation["layers"], data["ablation_missing"]) == ([0, 1], "")
    assert np.array(ablation["change"]).shape == (2, 4, n - 1)
    assert len(ablation["loss"]) == n - 1
    assert [len(stories) for stories in ablation["stories"]] == [4, 4]


def test_no_text_can_become_markup(written: tuple[str, dict]) -> None:
    """One data block, one script, one style, each closed by us; nothing that loads; and a policy of digests."""
    page, _ = written
    assert page.count("<script") == page.count("</script") == 2
    assert page.count("<style") == page.count("</style") == 1
    assert "window.ran = 1</script" not in page
    assert "<img" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    style = page[page.index("<style>") + len("<style>") : page.index("</style>")]
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    policy = page[page.index("default-src 'none'") :].partition('"')[0]
    assert f"style-src '{digest(style)}'" in policy
    assert f"script-src '{digest(script)}'" in policy
    assert "unsafe" not in policy


def test_g2_by_hand() -> None:
    """30 of 100 tokens that went to the expert are of a kind that is 50 of 1,000. Cells 30, 70, 20, 880 against the
    expected 5, 95, 45, 855; independent cells give 0; no preference can be less."""
    cells = [(30, 5.0), (70, 95.0), (20, 45.0), (880, 855.0)]
    expected = 2 * sum(o * math.log(o / e) for o, e in cells)
    found = log_likelihood_ratio(np.array([30, 5, 0]), np.array([100, 100, 10]), np.array([50, 50, 10]), 1000)
    assert found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(0, abs=1e-9)
    # 10 tokens of the kind, none of the expert's 10: cells 0, 10, 10, 980.
    assert found[2] == pytest.approx(2 * (2 * 10 * math.log(10 / 9.9) + 980 * math.log(980 / 980.1)))


def planted(experts: int = 4, windows: int = 40, width: int = 32) -> corpus_routing.CorpusRouting:
    """Random choices of two experts, but kind 5 always chooses expert 2 first; expert 3 is chosen by nothing."""
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 10, (windows, width))
    first = rng.integers(0, 3, (1, windows, width))
    first[0][stream == 5] = 2
    second = (first + rng.integers(1, 3, first.shape)) % 3
    expert = np.stack([first, second], axis=-1)
    probs = np.full((1, windows, width, experts), 1 / experts, np.float32)
    config = tiny.config(vocab_size=10, seq_len=width, layers=1, experts=experts, top_k=2, capacity_factor=1.0)
    return count_routing(config, stream, probs, expert, np.ones(expert.shape, bool))


def test_a_planted_preference_is_the_only_one_found() -> None:
    corpus = planted()
    found = specialisation(corpus)
    (entry,) = found[0][2]["tokens"]
    assert entry["id"] == 5
    assert entry["here"] == entry["all"] == corpus.token_counts[5] == corpus.by_token[0, 2, 5]
    assert entry["times"] == pytest.approx(1280 / corpus.together[0, 2, 2], abs=0.01)
    assert entry["g2"] > 20
    assert [len(e["tokens"]) for e in found[0]] == [0, 0, 1, 0]


def test_drops_counted_from_loads_are_those_that_happened(folder: Path) -> None:
    run = open_run(folder)
    corpus = corpus_routing.corpus_routing(run, np.random.default_rng(1).integers(0, 257, 5000))
    assert corpus.tokens == 5000 // 16 * 16
    np.testing.assert_allclose(corpus.dropped, corpus.drop_fraction(1.0), rtol=1e-9)
    assert (corpus.drop_fraction(1.0) > 0.02).all()
    assert (corpus.drop_fraction(4.0) == 0).all()
    np.testing.assert_allclose(corpus_data(corpus)["drops"], corpus.drop_fraction(1.0), atol=0.00006)


@pytest.mark.usefixtures("without_ablation")
def test_without_its_text_the_run_is_shown_on_a_given_one(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "run"
    shutil.copytree(folder, alone)
    saved_run.edit_config(alone, "data", source=str(tmp_path / "gone.txt"))
    with pytest.raises(UserError, match="--text"):
        write_report(alone, tmp_path / "page.html")
    data = data_in(write_report(alone, tmp_path / "page.html", text="a cat").read_text(encoding="utf-8"))
    assert data["corpus"] is None
    assert (data["ablation"], data["ablation_missing"]) == (None, "not here")
    assert "gone.txt" in data["corpus_missing"]


@pytest.mark.usefixtures("without_ablation")
def test_the_end_of_a_run_writes_pictures_and_report(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = report_run(folder)
    assert lines == [
        f"pictures: {folder / 'report'}",
        f"routing report: {folder / 'report' / 'routing.html'}, to open in a browser",
    ]
    names = {p.name for p in (folder / "report").iterdir()}
    assert {"loss.png", "loss.svg", "load.png", "evenness.svg", "routing.html"} <= names


def test_a_page_is_made_of_its_data_alone(written: tuple[str, dict]) -> None:
    page, data = written
    assert render(data) == page
    other = data | {"run": data["run"] | {"name": "<b>{{data}}"}}
    assert "&lt;b&gt;{{data}}" in render(other)
    assert data_in(render(other)) == other
    # A token that is markup, as a tokenizer of whole words might have one.
    hostile = render(data | {"text": data["text"] | {"pieces": [HOSTILE]}})
    assert hostile.count("<script") == hostile.count("</script") == 2


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"--file .*empty\.txt: is empty; give a text"):
        run_command(["inspect", "--run", "nano", "--file", str(tmp_path / "empty.txt")])
