"""The one way to write JSON. JSON has no NaN and no infinity, so `null` stands in their place."""

import json
import math
from typing import Any


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps(value, **options)`, with null in place of every number that is not finite."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
