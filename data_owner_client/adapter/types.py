"""Names of the adapter's forms and of the schedules of λ. Free of torch, so that settings and options can import it."""

from __future__ import annotations

from typing import Literal, get_args

AdapterForm = Literal["paper", "residual", "recent"]
"""Form of the adapter's network; `adapter.trained` gives the formula of each."""
ADAPTER_FORMS: tuple[AdapterForm, ...] = get_args(AdapterForm)

Schedule = Literal["gradual", "linear", "constant", "none"]
"""Course of λ over a text; `adapter.interpolation.Interpolation` gives the formula of each."""
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
