"""S7: a chat template is a program that came with a model, and may neither run on nor reach out."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.unit.data.build import CHATML, byte_tokenizer, example, replies, turns
from tunesmith.data import guard
from tunesmith.data.guard import OverLimit, Watch, check_length, try_in_child
from tunesmith.data.render import Renderer
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import ModelError, TunesmithError

CANARY = "tunesmith-canary"
EVIL = {
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "namespace": "{{ namespace.__init__.__globals__['os'].system('touch CANARY') }}",
    "import": "{% set x = cycler.__init__.__globals__.os.popen('touch CANARY').read() %}{{ x }}",
    "range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
    "string": "{{ 'a' * 10**10 }}",
    "list": "{{ ([0] * 10**10) | length }}",
    "power": "{{ 9**(9**9) }}",
}


@pytest.mark.parametrize("name", EVIL)
def test_a_hostile_template_is_an_error_within_two_seconds(name: str, tmp_path: Path) -> None:
    canary = tmp_path / CANARY
    source = EVIL[name].replace("CANARY", str(canary)) + CHATML
    started = time.monotonic()
    with pytest.raises(TunesmithError):
        Renderer(byte_tokenizer(), ChatTemplate("evil", source), 100).trees(example(turns("q"), replies("a")))
    # 1.2 seconds of processor time is the limit of the trial: under two by the clock, but for a busy machine.
    assert time.monotonic() - started < (2 if os.getloadavg()[0] < 1 else 10)
    assert not canary.exists()


def test_a_template_that_turns_on_one_row_is_stopped_at_that_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "RENDER_SECONDS", 0.3)
    loops = EVIL["loops"]
    r = Renderer(
        byte_tokenizer(),
        ChatTemplate("sly", "{% if 'now' in messages[0]['content'] %}" + loops + "{% endif %}" + CHATML),
        100,
    )
    assert r.render_many([example(turns("good"), replies("a"))])[0].error is None
    started = time.process_time()
    with pytest.raises(ModelError, match="the chat template was stopped: it ran for more than"):
        r.render_many([example(turns(text), replies("a")) for text in ("good", "now", "fine")])
    assert time.process_time() - started < 1


def test_a_template_that_writes_too_much_for_one_row_is_stopped() -> None:
    flood = "{% if 'now' in messages[0]['content'] %}" + EVIL["output"] + "{% endif %}"
    r = Renderer(byte_tokenizer(), ChatTemplate("flood", flood + CHATML), 100)
    with pytest.raises(ModelError, match="it wrote 9,999,"):
        r.render_many([example(turns("now"), replies("a"))])


def test_the_length_limit_grows_with_the_conversation() -> None:
    assert check_length("x" * 1_000_000, 60_000) == "x" * 1_000_000
    with pytest.raises(OverLimit, match="it wrote 1,000,000 characters for a conversation of 10"):
        check_length("x" * 1_000_000, 10)


def test_a_child_answers_or_is_killed() -> None:
    assert try_in_child(lambda: "") == ""
    assert try_in_child(lambda: "a reason") == "a reason"
    assert "MiB of memory" in try_in_child(lambda: str(len("a" * 10**10)))

    def fail() -> str:
        raise ValueError("no")

    assert try_in_child(fail) == "ValueError: no"


def test_the_trial_of_an_ordinary_template_is_cheap() -> None:
    tokenizer = byte_tokenizer()
    times = []
    for number in range(3):
        r = Renderer(tokenizer, ChatTemplate("x", CHATML + f"{{# {number} #}}"), 100)
        started = time.process_time()
        _ = r.shape
        times.append(time.process_time() - started)
    assert min(times) < 0.05


def test_a_watch_leaves_time_outside_of_renders_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "RENDER_SECONDS", 0.2)
    with Watch() as watch:
        watch.start()
        watch.stop()
        end = time.thread_time() + 0.4
        while time.thread_time() < end:
            pass
