import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf.errors import ArtifactError
from rlhf.tracking.tracker import Entry, JournalTracker, Listener, NullTracker, Progress, read_journal


def steps(path: Path) -> list[int]:
    return [entry.step for entry in read_journal(path)]


def record(seen: list[Entry | Progress]) -> Listener:
    return seen.append


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    JournalTracker(path).log({"sft/loss": 1.25, "sft/lr": 3e-6}, step=10)
    [entry] = read_journal(path)
    assert entry.step == 10
    assert entry.values == {"sft/loss": 1.25, "sft/lr": 3e-6}
    assert abs(entry.t / 1000 - path.stat().st_mtime) < 60


def test_values_that_json_has_no_number_for_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JournalTracker(path).log({"a": math.nan, "b": math.inf, "c": -math.inf}, step=1)
    [entry] = read_journal(path)
    assert math.isnan(entry.values["a"])
    assert (entry.values["b"], entry.values["c"]) == (math.inf, -math.inf)
    assert "NaN" not in path.read_text()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JournalTracker(path)
    tracker.log({"a": 1.0}, step=1)
    tracker.log({"a": 2.0}, step=2)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        assert steps(path) == [1], length


def test_a_bad_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for bad in (b"{", b"[]", b'{"t": 1, "step": 1}', b'{"t": 1, "step": 1, "values": {"a": "x"}}', b"\xff"):
        path.write_bytes(b'{"t": 1, "step": 1, "values": {}}\n' + bad + b"\n")
        with pytest.raises(ArtifactError, match=r"metrics\.jsonl, line 2"):
            list(read_journal(path))


def test_rewind_drops_what_came_after_the_mark(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JournalTracker(path)
    tracker.log({"a": 1.0}, step=1)
    mark = tracker.mark()
    tracker.log({"a": 2.0}, step=2)

    resumed = JournalTracker(path)
    resumed.rewind(mark)
    resumed.log({"a": 2.5}, step=2)
    assert [(entry.step, entry.values["a"]) for entry in read_journal(path)] == [(1, 1.0), (2, 2.5)]


def test_an_attempt_that_starts_from_nothing_finds_an_empty_journal(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JournalTracker(path).log({"a": 1.0}, step=1)
    again = JournalTracker(path)
    assert steps(path) == [1]  # opening it changes nothing yet: the stage may still rewind to a mark
    assert again.mark() == 0
    again.log({"a": 1.0}, step=1)
    assert steps(path) == [1]


def test_a_torn_line_is_gone_after_a_rewind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JournalTracker(path)
    tracker.log({"a": 1.0}, step=1)
    mark = tracker.mark()
    with path.open("ab") as file:
        file.write(b'{"t": 1, "st')
    resumed = JournalTracker(path)
    resumed.rewind(mark)
    resumed.log({"a": 2.0}, step=2)
    assert steps(path) == [1, 2]


@pytest.mark.parametrize("wrong", [-10, 10_000])
def test_a_mark_that_cannot_be_keeps_whole_lines_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JournalTracker(path)
    for step in range(3):
        tracker.log({"a": 1.0}, step)
    size = path.stat().st_size
    JournalTracker(path).rewind(size + wrong)
    assert steps(path) == ([0, 1] if wrong < 0 else [0, 1, 2])
    assert "has no mark" in caplog.text


def test_rewinding_a_journal_that_is_gone_starts_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = JournalTracker(tmp_path / "metrics.jsonl")
    tracker.rewind(100)
    tracker.log({"a": 1.0}, step=7)
    assert steps(tmp_path / "metrics.jsonl") == [7]
    assert "has no mark" in caplog.text


def test_the_listener_sees_each_point_that_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JournalTracker(path)
    first.log({"a": 1.0}, step=1)
    first.log({"a": 2.0}, step=2)
    mark = first.mark()
    first.log({"a": 3.0}, step=3)

    seen: list[Entry | Progress] = []
    resumed = JournalTracker(path, record(seen))
    resumed.rewind(mark)
    resumed.log({"a": 3.5}, step=3)
    resumed.progress(3, 10, loss=0.5)
    resumed.rewind(resumed.mark())
    assert seen[:-1] == list(read_journal(path))
    assert seen[-1] == Progress(3, 10, {"loss": 0.5})


def test_a_listener_that_fails_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def listen(event: Entry | Progress) -> None:
        raise RuntimeError("broken display")

    path = tmp_path / "metrics.jsonl"
    tracker = JournalTracker(path, listen)
    for step in range(3):
        tracker.log({"a": 1.0}, step)
    assert steps(path) == [0, 1, 2]
    assert len(caplog.records) == 1
    assert "broken display" in caplog.text


def test_many_threads_log_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    seen: list[Entry | Progress] = []
    tracker = JournalTracker(path, record(seen))

    def work(thread: int) -> None:
        for step in range(50):
            tracker.log({f"t{thread}/a": float(step)}, step)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = list(read_journal(path))
    assert len(entries) == 400
    assert entries == seen


def test_everything_logged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from pathlib import Path; from rlhf.tracking.tracker import JournalTracker\n"
        "tracker = JournalTracker(Path(sys.argv[1])); step = 0\n"
        "while True:\n"
        "    tracker.log({'a': 1.0}, step); print(step, flush=True); step += 1\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    for _ in range(200):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split("\n")
    process.wait()
    process.stdout.close()
    acknowledged = int(rest[-2]) if len(rest) > 1 else 199
    logged = steps(path)
    assert logged == list(range(len(logged)))
    assert len(logged) in (acknowledged + 1, acknowledged + 2)


def test_the_null_tracker_keeps_nothing() -> None:
    tracker = NullTracker()
    tracker.log({"a": 1.0}, step=1)
    tracker.progress(1, 2)
    tracker.rewind(tracker.mark())
    assert tracker.mark() == 0
