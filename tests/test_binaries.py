"""Where the control plane's programs come from, and what is said when there are none."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import binaries

PROGRAM = Path(binaries.__file__)


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch(mode=0o755)
    return folder


def test_the_assets_of_envtest_win(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    touch(binaries.cache(), *binaries.NEEDED, *binaries.JOINED)
    assets = touch(tmp_path / "assets", "etcd", "kube-apiserver")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    found = binaries.ensure()
    assert found.folder == assets
    assert not found.joined


def test_assets_without_a_server_are_refused_by_name(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(touch(tmp_path, "etcd")))
    with pytest.raises(binaries.Missing, match="has no kube-apiserver"):
        binaries.ensure()


def test_a_complete_cache_is_used_and_half_a_one_is_not(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    touch(binaries.cache(), *binaries.NEEDED)
    assert binaries.find() is None
    touch(binaries.cache(), *binaries.JOINED)
    found = binaries.find()
    assert found
    assert found.joined


def test_without_room_to_build_it_says_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(binaries, "WORK_BYTES", 2**80)
    with pytest.raises(binaries.Missing, match="KUBEBUILDER_ASSETS"):
        binaries.ensure()


def test_the_command_prints_the_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(touch(tmp_path, *binaries.NEEDED)))
    told = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=True)
    assert told.stdout == f"{tmp_path}\n"


def test_the_command_fails_with_a_cure(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    told = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "setup-envtest" in told.stderr


SESSION = """
import pytest
@pytest.mark.cluster
def test_needs_a_server(control_plane):
    pass
def test_needs_none():
    pass
"""


def test_a_session_without_a_server_runs_the_rest_and_is_not_green(monkeypatch, tmp_path) -> None:
    (tmp_path / "test_some.py").write_text(SESSION)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "empty"))
    monkeypatch.setenv("PYTHONPATH", str(PROGRAM.parents[1]))
    options = ["-p", "cluster.fixtures", "-c", "/dev/null", "--rootdir=.", "-o", "markers=cluster"]
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, "test_some.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed, 1 skipped" in told.stdout
    assert "control plane missing" in told.stdout
    assert told.returncode == 1
