"""Merges in processes that are killed, whose files may not grow, or whose memory is measured; see test_merge_command.py."""
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from abba_ext.__main__ import main
from abba_ext.base_checkpoint import BaseCheckpoint
from abba_ext.merging import merge_checkpoint, partial_folder


def start(base, adapter, out):
    """Begins a merge in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            merge_checkpoint(base, adapter, out)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def kill(base, adapter, out, kills, seed):
    """Kills merges at random moments and checks what is there, until as many shards were resumed; the last one may finish."""
    work, generator = partial_folder(out) / "model", random.Random(seed)
    shards = len(list(Path(base).glob("*.safetensors")))
    BaseCheckpoint(base).model  # imports what every process will need
    begin = time.perf_counter()
    _, status = os.waitpid(start(base, adapter, out), 0)
    assert status == 0
    duration = time.perf_counter() - begin
    done = resumed = 0
    kept = {}
    while done < kills or resumed < kills and done < 5 * kills:  # on a busy machine merges get less far than the first did
        for path in sorted(Path(out).glob("*"), reverse=True):
            path.unlink() if path.is_file() else [*map(os.unlink, path.iterdir()), path.rmdir()]
        child = start(base, adapter, out)
        time.sleep(generator.random() * duration)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        complete = Path(out, "config.json").exists()
        folder = Path(out) if complete else work
        found = {path.name: path.stat().st_ino for path in folder.glob("model-*.safetensors")}
        resumed += sum(found.get(name) == inode for name, inode in kept.items())
        if complete:
            assert len(found) == shards and not work.exists() and not list(Path(out).rglob(".tmp-*"))
        else:
            assert not os.path.exists(out) or not os.listdir(out)
        kept = {} if complete else found
        done += os.WIFSIGNALED(status)
    _, status = os.waitpid(start(base, adapter, out), 0) if not Path(out, "config.json").exists() else (0, 0)
    assert status == 0
    print(json.dumps({"kills": done, "resumed": resumed, "shards": shards}))


def full(base, adapter, out):
    """Runs the command where no file may be longer than 16 KiB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
    sys.exit(main(["merge", base, adapter, out]))


def memory(base, adapter, out):
    """Prints by how many bytes a merge raises the resident memory of the process at its peak."""
    BaseCheckpoint(base).model  # imports and the model's modules are not what is measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak()
    merge_checkpoint(base, adapter, out)
    print(peak() - before)


def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    command, base, adapter, out, *options = sys.argv[1:]
    {"kill": kill, "full": full, "memory": memory}[command](base, adapter, out, *map(int, options))
