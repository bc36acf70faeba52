"""Clients that others have written: OpenAI's, and the model `local-completions` of lm-evaluation-harness.

Each runs in a process of its own: importing them would change what these tests check of types.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from tests.reliability import runs
from tests.reliability.served import Oracle, Served

pytestmark = pytest.mark.reliability

OPENAI = """
import sys
import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
name = client.models.list().data[0].id
whole = client.completions.create(model=name, prompt="the", seed=3, max_tokens=20, n=2, logprobs=2, temperature=0.8)
parts = client.completions.create(model=name, prompt="the", seed=3, max_tokens=20, temperature=0.8, stream=True)
assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
assert whole.choices[0].finish_reason in ("stop", "length")
found = whole.choices[0].logprobs
assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
more = client.completions.create(model=name, prompt="the", max_tokens=2, extra_body={"routed_experts": True})
assert more.choices[0].routed_experts
for wrong, error in (({"model": "other"}, openai.NotFoundError), ({"n": 1000}, openai.BadRequestError)):
    try:
        client.completions.create(**{"model": name, "prompt": "the", **wrong})
    except error as found:
        assert found.body["message"]
    else:
        raise AssertionError(wrong)
try:
    client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])
except openai.BadRequestError as found:
    assert found.code == "not_tuned"
print("fine")
"""


def test_the_client_of_openai(served: Served) -> None:
    """In a process of its own: importing it would change what these tests check of types."""
    pytest.importorskip("openai", reason="needs the group `serving`: uv run --group serving pytest -m reliability")
    finished = subprocess.run([sys.executable, "-c", OPENAI, served.url], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (0, "fine\n"), finished.stderr


LM_EVAL = """
import json
import sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, folder, context, pairs = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
ask = lambda kind, *arguments: Instance(kind, {}, arguments, 0)
model = LocalCompletionsAPI(
    base_url=url + "/v1/completions",
    model="whole",
    tokenizer=folder,
    tokenizer_backend="huggingface",
    max_length=context,
    max_retries=1,
)
until = {"until": ["zzz"], "max_gen_toks": 5, "temperature": 0}
found = {
    "ids": [model.tok_encode(first + then) for first, then in pairs],
    "scores": model.loglikelihood([ask("loglikelihood", *pair) for pair in pairs]),
    "whole": model.loglikelihood_rolling([ask("loglikelihood_rolling", "".join(pair)) for pair in pairs]),
    "text": model.generate_until([ask("generate_until", pairs[0][0], until)]),
}
print(json.dumps(found))
"""


def test_lm_eval_reads_what_the_model_gives(served: Served, cache: Path, tmp_path: Path) -> None:
    """Scores of a continuation, of a whole text, and a greedy text, with the tokenizer that `export` has written."""
    pytest.importorskip("lm_eval", reason="needs the group `serving`: uv run --group serving pytest -m reliability")
    exported = runs.complete(
        ["export", "--run", str(served.run), "--to", "hf", "--out", str(tmp_path / "hf")], cache, runs.COMMANDS
    )
    assert exported.returncode == 0, exported.stderr
    oracle, pairs = Oracle(served.run), [("the cat", " sat"), ("a dog", " ran on"), ("", "the")]
    arguments = [served.url, str(tmp_path / "hf"), str(oracle.seq_len), json.dumps(pairs)]
    finished = subprocess.run([sys.executable, "-c", LM_EVAL, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])

    separator = oracle.tokenizer.separator_id
    ids = [oracle.tokenizer.encode(first + then) for first, then in pairs]
    assert found["ids"] == ids
    for (first, _), tokens, (score, _) in zip(pairs, ids, found["scores"], strict=True):
        read = tokens if first else [separator, *tokens]  # without a beginning it puts the separator before
        begin = len(oracle.tokenizer.encode(first)) if first else 1
        assert score == pytest.approx(sum(oracle.logprobs(read)[begin - 1 :]), abs=1e-4)
    for tokens, score in zip(ids, found["whole"], strict=True):
        assert score == pytest.approx(sum(oracle.logprobs([separator, *tokens])), abs=1e-4)
    greedy = {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 0, "max_tokens": 5}
    text = oracle.generated(oracle.tokenizer.encode(pairs[0][0]), greedy, 0)
    assert found["text"] == [oracle.tokenizer.decode(text)]
