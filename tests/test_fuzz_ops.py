"""Ten thousand random calls of the operators; see fuzz_ops.py."""
import fuzz_ops


def test_every_call_is_right_or_refused():
    counts = fuzz_ops.fuzz(10_000, seed=0)
    assert counts["right"] > 5_000 and counts["refused"] > 2_000
