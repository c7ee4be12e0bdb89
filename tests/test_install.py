"""What is pinned can be installed on every Python that is promised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Pins of the newest versions that support Python 3.10, as their makers say: later ones need 3.11.
LAST_ON_3_10 = {"numpy": "2.2.6", "networkx": "3.4.2", "pillow": "12.3.0", "pyarrow": "25.0.1", "filelock": "4.1.0"}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_package_has_one_pin_that_its_python_supports(python: str) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate({"python_version": python})]
    counts = Counter(canonicalize_name(pin.name) for pin in pins)
    assert set(counts.values()) == {1}
    found = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert {name: found[name] == last for name, last in LAST_ON_3_10.items()} == dict.fromkeys(
        LAST_ON_3_10, python == "3.10"
    )
