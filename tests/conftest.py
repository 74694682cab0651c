from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.runs import OFFLINE_STAGES, start


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with data, SFT, preferences and reward model done, once a session."""
    runs_dir = tmp_path_factory.mktemp("prepared")
    run = start(runs_dir, "--stages", OFFLINE_STAGES)
    output = run.finish()
    assert run.process.returncode == 0, output
    return run.path
