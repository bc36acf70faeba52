"""What processes compare before the first step, without processes."""

import json

import pytest

from moe_jax.config import ConfigError
from moe_jax.parallel import processes

FACTS = {"--lr": 0.001, "--data": "text", "a run in --out": False}


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("index", [1, 2])
def test_every_fact_of_every_process_is_compared(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(text: str) -> list[str]:
        return [json.dumps(json.loads(text) | ({name: 7} if i == index else {})) for i in range(3)]

    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    monkeypatch.setattr(processes, "exchange_texts", exchange)
    with pytest.raises(ConfigError, match=f"^{name}: 7 in process {index}, and {FACTS[name]} in process 0; "):
        processes.agree_on(FACTS)
    monkeypatch.setattr(processes, "exchange_texts", lambda text: [text, text])
    processes.agree_on(FACTS)
