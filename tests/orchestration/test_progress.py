"""What a run says while it works: lines a while apart in a log, nothing on stdout, nothing when switched off."""

from __future__ import annotations

import threading
import time

import pytest

from soul.orchestration.progress import Display


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made.monotonic)
    return made


def test_a_log_gets_a_line_in_a_while_and_the_last_one_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    with display.live():
        for done in range(1, 31):
            display.update("train", done, 30)
            clock.now += 1
        display.update("train", 30, 30)
        display.update("evaluate", 1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["train: 1/30", "train: 11/30", "train: 21/30", "train: 30/30", "evaluate: 1/2"]


def test_switched_off_it_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(enabled=False)
    with display.live():
        display.say("hello")
        display.update("train", 1, 1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["runs/[red]x: done before", "closed [/] and longer than a terminal is wide " + "x" * 200])
def test_said_texts_go_to_stderr_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Display().say(text)
    assert capsys.readouterr() == ("", text + "\n")


def test_stages_of_two_threads_do_not_mix(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()

    def work(name: str) -> None:
        for done in range(1, 51):
            display.update(name, done, 50)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(capsys.readouterr().err.splitlines()) == ["a: 1/50", "a: 50/50", "b: 1/50", "b: 50/50"]
