"""Killed processes, damaged files, full and read-only disks, and long runs."""
import os
import resource
import shutil
import stat
import tempfile
from pathlib import Path

import faults
import pytest
import torch
from threads import num_threads

import abba_ext


@pytest.fixture
def one_thread():
    """A forked process has no worker threads."""
    with num_threads(1):
        yield


def test_kills_of_save(tmp_path, one_thread):
    assert sum(faults.kills_of_save(100, 0, tmp_path).values()) == 100


def test_kills_of_conversion(tmp_path, one_thread):
    assert sum(faults.kills_of_conversion(100, 0, tmp_path).values()) == 100


def test_kills_of_merge(tmp_path):
    report = faults.kills_of_merge(12, 0, tmp_path)
    assert report["kills"] >= 12 and report["resumed"] >= 12, report


def test_damaged_adapters(tmp_path):
    assert faults.mutations(1000, 0, tmp_path)["refused"] > 950


def test_a_full_disk_leaves_the_old_adapter(tmp_path):
    model = faults.tiny_model(1.0)
    abba_ext.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model["a"].abba_B2.fill_(7.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond 4 KiB
    try:
        with pytest.raises(Exception, match="(?i)file too large|os error 27"):
            abba_ext.save_adapter(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_read_only_folder_keeps_the_old_adapter():
    """In a process without privileges: root may write everywhere."""
    folder = Path(tempfile.mkdtemp(prefix="abba-read-only-"))  # not tmp_path, which others may not enter
    try:
        model = faults.tiny_model(1.0)
        abba_ext.save_adapter(model, folder / "adapter")
        before = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
        for path in (folder / "adapter", folder):
            path.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        child = os.fork()
        if child == 0:
            refused = 0
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                for place in ("adapter", "new"):
                    try:
                        abba_ext.save_adapter(model, folder / place)
                    except PermissionError as error:
                        refused += str(folder) in str(error)
            finally:
                os._exit(refused)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 2, "both attempts must be a PermissionError that names the folder"
        assert sorted(folder.iterdir()) == [folder / "adapter"]
        assert {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()} == before
    finally:
        for path in (folder, folder / "adapter"):
            path.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)


def test_thousands_of_steps_need_no_more_memory():
    faults.steps(3000)


def test_a_thousand_merges_leave_the_base_bit_equal():
    faults.merges(1000)


def test_adapters_are_swapped_while_another_thread_infers(tmp_path):
    assert faults.swaps(200, tmp_path)["inferences"]
