"""Effort of randomised tests, from the environment: `PEMA_TEST_PROFILE` is `fast`, `dev` (default) or `ci`.

`ci` runs the number of examples that a test states, `dev` a quarter of them, and `fast` at most 20.
"""

from __future__ import annotations

import os
from typing import Final

from hypothesis import HealthCheck, settings

_FAST_EXAMPLES: Final = 20
_PROFILES: Final = ("fast", "dev", "ci")

PROFILE: Final = os.environ.get("PEMA_TEST_PROFILE", "dev")
NO_BROWSER: Final = "PEMA_TEST_NO_BROWSER" in os.environ
"""Leave out the tests that need a browser."""
NO_CLIENTS: Final = "PEMA_TEST_NO_CLIENTS" in os.environ
"""Leave out the tests that need the environment of other applications."""


def scaled(examples: int) -> int:
    """Number of hypothesis examples in this profile for a test that has `examples` of them in CI."""
    if PROFILE == "fast":
        return min(examples, _FAST_EXAMPLES)
    return max(examples // 4, min(examples, _FAST_EXAMPLES)) if PROFILE == "dev" else examples


def load() -> None:
    """Make this profile the one of hypothesis. No deadline: no test may depend on how busy the machine is.

    Raises:
        ValueError: `PEMA_TEST_PROFILE` is none of the profiles.
    """
    if PROFILE not in _PROFILES:
        raise ValueError(f"PEMA_TEST_PROFILE is {PROFILE!r}; choose one of {', '.join(_PROFILES)}")
    settings.register_profile(
        PROFILE,
        max_examples=scaled(settings.get_profile("default").max_examples),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=True,
    )
    settings.load_profile(PROFILE)
