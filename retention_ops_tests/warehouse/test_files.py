"""A file is whole or absent, a lock ends with its process, and a folder left behind is told from one in use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from retention_ops.warehouse.files import locked, replacing, scratch_folder, write_atomic

HOLDER = """
import sys
from pathlib import Path
from retention_ops.warehouse import files
with getattr(files, sys.argv[1])(*(Path(sys.argv[2]), *sys.argv[3:])):
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts a process that is inside `files.<name>(*arguments)` until it is killed."""
    started = []

    def start(name: str, *arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, name, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )
        started.append(process)
        assert process.stdout.readline() == "holding\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_file_that_could_not_be_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old", mode=0o600)
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_told_to_be_taken_and_is_free_once_its_process_is_killed(tmp_path, hold):
    holder = hold("locked", str(tmp_path / "lock"))
    said = []

    def before_waiting() -> None:
        said.append("taken")
        holder.kill()

    with locked(tmp_path / "lock", before_waiting):
        assert said == ["taken"]
    with locked(tmp_path / "lock", before_waiting):
        assert said == ["taken"]


def test_a_scratch_folder_goes_with_its_block_or_with_the_next_one_after_a_kill(tmp_path, hold):
    killed, busy = hold("scratch_folder", str(tmp_path), "x-"), hold("scratch_folder", str(tmp_path), "x-")
    other = tmp_path / "y-1"
    other.mkdir()
    assert len(list(tmp_path.glob("x-*"))) == 2
    killed.kill()
    killed.wait()
    with scratch_folder(tmp_path, "x-") as folder:
        (folder / "file").touch()
        left = set(tmp_path.glob("x-*")) - {folder}
        assert len(left) == 1 and busy.poll() is None
    assert set(tmp_path.iterdir()) == {*left, other}
