"""The command line, run as a user runs it."""
import subprocess
import sys

import pytest

import abba_ext
from abba_ext.__main__ import main


def test_info_prints_versions_build_and_paths(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (abba_ext.__version__, "built with torch", "flags", "-O3", "CUDA architectures", "threads", "khatri_rao", "dense"):
        assert word in out


def test_info_for_one_shape_as_a_command(tmp_path):
    command = [sys.executable, "-m", "abba_ext", "info", "--shape", "64", "768", "3072", "--ranks", "8", "24", "--dtype", "bfloat16"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "T=64 n=768 m=3072 r1=8 r2=24 bfloat16 cpu: khatri_rao, cpu (half-precision activations)" in out


def test_unknown_command():
    with pytest.raises(SystemExit):
        main(["fly"])
