"""What a run that is not finite is blamed on."""

from __future__ import annotations

import pytest

from mlx_diffgemma.errors import not_finite


@pytest.mark.parametrize(
    ("float16", "adapter", "said", "unsaid"),
    [
        (False, False, ["its weights may be damaged", "check=True", "--check"], ["float16"]),
        (False, True, ["its weights or those of the adapter may be damaged"], ["float16"]),
        (True, False, ["float16 overflows", "bf16", "its weights may be damaged"], ["adapter"]),
        (True, True, ["float16 overflows", "those of the adapter"], []),
    ],
)
def test_every_culprit_is_named(
    float16: bool, adapter: bool, said: list[str], unsaid: list[str]
) -> None:
    line = not_finite("canvas 1, step 2", float16=float16, adapter=adapter)
    assert line.startswith("canvas 1, step 2: the model returned NaN or infinity; ")
    assert line.endswith(".") and "\n" not in line
    assert all(words in line for words in said)
    assert not any(words in line for words in unsaid)
