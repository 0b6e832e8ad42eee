"""Where the base model comes from: a folder, or a hub that may be away or switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = "from osft_trainer.base_model import local_folder; local_folder('someone/some-model')"
NOBODY = "http://127.0.0.1:9"
"""The discard port: nothing listens there."""


@pytest.mark.parametrize(
    ("offline", "kind"),
    [("0", "ConnectionError"), ("1", "ValueError")],
    ids=["an outage may be tried again", "offline mode is final"],
)
def test_a_hub_that_is_away(tmp_path: Path, offline: str, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env={
            **os.environ,
            "HF_ENDPOINT": NOBODY,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": offline,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert f"{kind}: model_path: there is no folder 'someone/some-model'" in done.stderr, last


@pytest.mark.parametrize("path", ["/models/none", "./none", "a/b/c"])
def test_a_path_is_never_looked_for_on_the_hub(path: str) -> None:
    from osft_trainer.base_model import local_folder

    with pytest.raises(ValueError, match="is its volume mounted"):
        local_folder(path)
