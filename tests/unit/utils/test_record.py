from pathlib import Path

from owl_deploy.utils.record import Record, Unfinished


def test_the_end_says_what_failed_and_why() -> None:
    left = [
        Record(state="failed", title="A", said="No.", code=2),
        Record(state="skipped", title="C", said="it needs what failed: A"),
        Record(state="failed", title="B", said="It broke.", code=4),
    ]
    error = Unfinished(left, 4, Path("out/logs"))
    assert error.exit_code == 2
    assert str(error) == (
        "2 of 4 tasks failed, and 1 that need them were skipped. A: No; B: It broke. "
        "See out/logs; the same command goes on from here."
    )
