"""Ray's environment variables, which it reads when it is imported: so this comes first."""

from __future__ import annotations

import os
from typing import Final

RAY_ENVIRONMENT: Final = {
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def prepare_ray_environment() -> None:
    """Set what the user has not set. Call before anything imports ray."""
    for key, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
