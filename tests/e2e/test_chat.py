"""``chat``: conversations from a pipe and from a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.markdown import Markdown

from cpucache.cli.chat_screen import finished, markdown_answer
from cpucache.sessions import Transcripts
from tests.support.command import PATIENCE, SCHEMA, START, Outcome, cpucache, invoke
from tests.support.terminal import ALT_ENTER, CTRL_C, CTRL_D, UP, plain, terminal


def chat(name: str, model: Path, *options: str | Path, said: str, length: int = 12) -> Outcome:
    """A conversation from a pipe, which must go well."""
    done = cpucache("chat", name, "-m", model, "-n", str(length), "--temp", "0", "--threads", "1", *options, stdin=said)
    assert done.status == 0, done.err
    return done


def messages(name: str) -> list[dict[str, Any]]:
    """What a conversation consists of."""
    conversation = json.loads(invoke("sessions", "export", name, "--format", "json"))
    kept: list[dict[str, Any]] = conversation["messages"]
    return kept


def said(name: str, role: str = "user") -> list[str]:
    return [message["content"] for message in messages(name) if message["role"] == role]


FIGURES = re.compile(
    r"first token after \S+ m?s · (\d+) tokens from cache, (\d+) evaluated · \S+ tok/s · cut off after 12 tok"
)


# -- from a pipe -------------------------------------------------------------------------------------------------------
def test_a_conversation_goes_on_in_another_process(model: Path) -> None:
    whole = chat("whole", model, said="one\ntwo\nthree\n")
    first = chat("parts", model, said="one\n")
    rest = chat("parts", model, said="two\nthree\n")

    assert first.out + rest.out == whole.out == "".join(f"{text}\n" for text in said("whole", "assistant"))
    assert said("parts") == ["one", "two", "three"]
    turns = [tuple(map(int, found)) for found in FIGURES.findall(rest.err)]
    again = [tuple(map(int, found)) for found in FIGURES.findall(whole.err)]
    # All that was said is found in the store; what is evaluated is no more than in the context.
    assert turns == again[1:]
    assert all(cached > 20 for cached, _ in turns)
    recap = rest.err.splitlines()
    assert "'parts'" in recap[0]
    assert "2 messages" in recap[0]
    assert recap[1] == "> one"
    assert recap[2].startswith("< ")


def test_lines_are_messages_but_for_backslashes_and_quotes(model: Path) -> None:
    chat("lines", model, said='one\\\n two\n\n  \n"""\nthree \\\n\n/help\n"""\n"""/four"""\r\nfi"""ve\nsix\\', length=1)

    assert said("lines") == ["one\n two", "three \\\n\n/help", "/four", 'fi"""ve', "six"]


def test_a_message_is_edited_and_an_answer_given_again(model: Path) -> None:
    chat("edited", model, said='one\ntwo\n/edit 1 uno\ndue\n/edit """\ntre\nquattro\n"""\n/regen\n')
    chat("straight", model, said="uno\ntre\\\nquattro\n")

    assert said("edited") == ["uno", "tre\nquattro"]
    assert [each["content"] for each in messages("edited")] == [each["content"] for each in messages("straight")]


def test_a_conversation_is_forked(model: Path) -> None:
    done = chat("trunk", model, said="one\n/fork branch\n/save twig\n/save\ntwo\n")

    assert (said("trunk"), said("branch"), said("twig")) == (["one", "two"], ["one"], ["one"])
    assert "`cpucache chat branch`" in done.err
    assert "saved already" in done.err


def test_help_and_figures_are_no_answers(model: Path) -> None:
    done = chat("s", model, said="/help\none\n/stats\n/quit\nnever said\n")

    assert said("s") == ["one"]
    assert done.out == f"{said('s', 'assistant')[0]}\n"
    for part in ("/edit [N] TEXT", "messages", "of 4,096 tokens", "from cache"):
        assert part in done.err


def test_a_system_text_and_the_default_name(model: Path) -> None:
    command = ("chat", "-m", model, "-n", "1", "--threads", "1")
    first = cpucache(*command, "--system", "You cook.", stdin="one\n")
    again = cpucache(*command, stdin="two\n")
    other = cpucache(*command, "--system", "You sing.", stdin="three\n")

    assert (first.status, again.status, other.status) == (0, 0, 2)
    assert [each["role"] for each in messages("default")] == ["system", *["user", "assistant"] * 2]
    assert "another system text" in other.err


def test_a_conversation_begins_with_pml(model: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.xml").write_text(SCHEMA)
    prompt = tmp_path / "prompt.xml"
    prompt.write_text('<prompt schema="shop"><hours opens="ten"/><user>What is there to eat?</user></prompt>')
    begin = ("--prompt", prompt, "-s", tmp_path / "schema.xml")

    done = chat("shop", model, *begin, said="")
    more = chat("shop", model, *begin, said="And to drink?\n")

    # It waits for an answer, which is given first, and only once.
    assert [each["role"] for each in messages("shop")] == ["prompt", "assistant", "user", "assistant"]
    assert done.out + more.out == "".join(f"{text}\n" for text in said("shop", "assistant"))


def test_old_turns_leave_the_context(model: Path) -> None:
    lines = "".join(f"this is message {number}, and it is a long one to fill the context with\n" for number in range(5))
    done = chat("full", model, "--ctx", "256", said=lines)

    left = re.findall(r"(\d+) tokens of old turns left the context; tokens after them were moved(.*)", done.err)
    assert left
    assert any("evaluating them again: about" in cost for _, cost in left)
    assert len(said("full")) == 5
    refused = cpucache(
        "chat", "never", "-m", model, "--ctx", "256", "-n", "12", "--threads", "1", "--when-full", "refuse", stdin=lines
    )
    assert refused.status == 2
    assert "--ctx" in refused.err
    assert 0 < len(said("never")) < 5


def test_a_conversation_finds_its_model(model: Path, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    (tmp_path / "mine.gguf").symlink_to(model)
    (tmp_path / "other.gguf").symlink_to(tiny("llama", seed=1))
    settings = ("-n", "1", "--threads", "1")
    chat("s", tmp_path / "mine.gguf", said="one\n", length=1)

    again = cpucache("chat", "s", *settings, stdin="two\n", CPUCACHE_MODELS=str(tmp_path))
    other = cpucache("chat", "s", "-m", "other.gguf", *settings, stdin="no\n", CPUCACHE_MODELS=str(tmp_path))

    assert again.status == 0, again.err
    assert (other.status, other.err.count("\n")) == (2, 1)
    assert "is with mine, not other" in other.err
    assert said("s") == ["one", "two"]


def test_a_conversation_is_open_once(model: Path) -> None:
    chat("s", model, said="one\n", length=1)
    transcripts = Transcripts()
    opened = transcripts.open("s")

    done = cpucache("chat", "s", "-m", model, stdin="two\n")

    opened.close()
    transcripts.close()
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert "open in another window" in done.err


@pytest.mark.parametrize(
    ("arguments", "typed", "part"),
    [
        ((" ",), "", "can't name a conversation"),
        (("s", "--prompt", "p.xml"), "", "--prompt and --schema go together"),
        (("s", "--when-full", "never"), "", "'never'"),
        (("s",), "/hlep\n", "no command /hlep: did you mean /help?"),
        (("s",), "/fork\n", "/fork NAME"),
        (("s",), "/fork s\n", "there is a conversation 's' already"),
        (("s",), "/regen\n", "no answer to replace yet"),
        (("s",), "/edit 3 three\n", "no message 3"),
        (("s",), "/edit 3\n", "/edit [N] TEXT"),
    ],
)
def test_bad_input_is_refused_in_one_line(model: Path, arguments: tuple[str, ...], typed: str, part: str) -> None:
    done = cpucache("chat", *arguments, "-m", model, stdin=typed)

    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert part in done.err


# -- Markdown ----------------------------------------------------------------------------------------------------------
DOCUMENT = """\
# About soup

It is *hot*,
and a line may go on
---
A paragraph with a list right behind it:
- onions

  with salt
- leeks
1. one
2. two

| a | b |
|---|---|
| 1 | 2 |

```python
for x in y:

    pass
# no heading
```
> quoted
> text

The end, **bo"""


def test_only_what_can_change_no_more_is_finished() -> None:
    for end in range(len(DOCUMENT) + 1):
        done = finished(DOCUMENT[:end])
        # Rendering the parts gives what rendering the whole gives: the same blocks.
        assert _blocks(DOCUMENT[:done]) + _blocks(DOCUMENT[done:]) == _blocks(DOCUMENT)
    assert DOCUMENT[finished(DOCUMENT) :] == "> quoted\n> text\n\nThe end, **bo"
    assert finished("") == finished("one line") == finished("a paragraph\n\n") == 0


def _blocks(text: str) -> list[str]:
    """Every block, and what it holds, without where it stands."""
    tokens = Markdown(text).parsed
    return [f"{'  ' * token.level}{token.type} {token.content}" for token in tokens]


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_answer_is_drawn_once(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PERIOD", "_SHARE"):
        monkeypatch.setattr(f"cpucache.cli.chat_screen.{name}", 0)
    text = DOCUMENT + "\n\n" + "\n".join(f"- item {number}" for number in range(40)) + "\n\nAnd that was it."
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=40, height=12, color_system=None)

    with markdown_answer(console)() as show:
        for begin in range(0, len(text), step):
            show(text[begin : begin + step])

    expected = io.StringIO()
    Console(file=expected, width=40, force_terminal=True, color_system=None).print(Markdown(text))
    whole = [line.rstrip() for line in plain(expected.getvalue()).splitlines()]
    lines = _seen(screen.getvalue(), height=12)
    assert [line for line in lines if line] == [line for line in whole if line]
    # One empty line between blocks, also before those that rich begins with one of their own.
    shown = "\n".join(lines)
    for block in ("\n • onions", "\n 1 one"):
        assert f"\n{block}" in shown
        assert f"\n\n{block}" not in shown


_SEQUENCE = re.compile(r"\x1b\[\??(\d*)[;\d]*([A-Za-z])|\x1b\][^\x1b]*\x1b\\|([\r\n])|([^\x1b\r\n]+)")


def _seen(written: str, *, height: int) -> list[str]:
    """The lines that a terminal so high shows in the end, with those that it has scrolled away."""
    lines, row, column = [""], 0, 0
    for count, letter, move, text in (found.groups() for found in _SEQUENCE.finditer(written)):
        if move == "\r":
            column = 0
        elif move == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif letter == "A":
            # What has scrolled away is out of reach.
            row = max(row - int(count or 1), len(lines) - height, 0)
        elif letter == "K":
            lines[row] = ""
        elif text:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]


# -- at a terminal -----------------------------------------------------------------------------------------------------
def test_somebody_types(model: Path) -> None:
    with terminal("chat", "typed", "-m", model, "-n", "12", "--temp", "0", "--threads", "1") as there:
        there.until("1>")
        there.type(f"one\\\rtwo{ALT_ENTER}three\r")
        there.until("first token after")
        there.until("2>")
        # Pasted: its lines stay together.
        there.type("\x1b[200~four\nfive\x1b[201~\r")
        there.until("first token after")
        there.until("3>")
        there.type('"""\rsix\r\rseven\r"""\r')
        there.until("first token after")
        there.until("4>")
        there.type("/hlep\r")
        there.until("did you mean /help?")
        there.until("4>")
        # The draft of an edited message can be sent as it is, or be changed.
        there.type("/edit 2\r")
        there.until("/edit 2 four")
        there.type(" and more\r")
        there.until("first token after")
        there.until("3>")
        # Ctrl-C clears the line; on an empty line it leaves.
        there.type(f"never said{CTRL_C}")
        time.sleep(0.2)
        there.type(CTRL_C)
        assert there.closed() == 0

    assert said("typed") == ["one\ntwo\nthree", "four\nfive and more"]
    history = Path(os.environ["CPUCACHE_SESSIONS"]) / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+/edit 2 four" in history.read_text()

    with terminal("chat", "typed", "-m", model, "-n", "12", "--temp", "0", "--threads", "1") as there:
        there.until("4 messages")
        there.until("3>")
        there.type(f"{UP}{UP}")  # a line up in what was typed last, and what was typed before
        there.type(CTRL_C)
        there.type(CTRL_D)
        assert there.closed() == 0


def test_what_is_typed_is_evaluated_meanwhile(model: Path) -> None:
    question = "What is there to eat for somebody who comes from far away, is hungry, and has little time to wait?"
    with terminal("chat", "typed", "-m", model, "-n", "12", "--temp", "0", "--threads", "1", "--plain") as there:
        there.until("1>")
        for word in question.split(" ")[:-1]:
            there.type(f"{word} ")
            time.sleep(0.05)
        time.sleep(1)
        there.type("wait?\r")
        evaluated = int(re.findall(r"(\d+) evaluated", there.until(" evaluated ·"))[0])
        there.until("2>")
        there.type(CTRL_D)
        assert there.closed() == 0
    at_once = chat("at once", model, said=f"{question}\n")

    assert said("typed") == said("at once") == [question]
    assert said("typed", "assistant") == said("at once", "assistant")
    # The last word, and the end of the template.
    assert evaluated < int(FIGURES.findall(at_once.err)[0][1]) / 3


@pytest.mark.parametrize("options", [(), ("--plain",)])
def test_an_answer_that_is_interrupted_is_kept(smollm2: Path, options: tuple[str, ...]) -> None:
    questions = ["Tell a very long story of a fox.", "Tell a very long story of a bear."]
    with terminal("chat", "s", "-m", smollm2, "-n", "4000", "--temp", "0", "--threads", "1", *options) as there:
        for number, question in enumerate(questions, start=1):
            there.until(f"{number}>")
            there.type(f"{question}\r")
            # A letter of the answer: no question has it.
            there.until("h")
            there.type(CTRL_C)
            there.until("· interrupted")
        there.until("3>")
        there.type(CTRL_D)
        assert there.closed() == 0

    assert said("s") == questions
    for answer in messages("s")[1::2]:
        assert "h" in answer["content"]
        assert answer["metrics"]["finish"] == "interrupted"
        assert answer["metrics"]["completion_tokens"] < 1000
    # The state that is kept is that of the answers so far.
    chat("s", smollm2, said="Tell a long one of a cat.\n")
    metrics = messages("s")[-1]["metrics"]
    assert metrics["prompt_tokens"] - metrics["cached_tokens"] < 30 < metrics["cached_tokens"]


def test_a_prompt_that_is_interrupted_leaves_nothing(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "s.xml").write_text('<schema name="s"><module name="m">A short one.</module></schema>')
    (tmp_path / "p.xml").write_text(f'<prompt schema="s"><m/><user>{"much to read " * 2400}</user></prompt>')
    begin = ("--prompt", tmp_path / "p.xml", "-s", tmp_path / "s.xml")

    with terminal("chat", "s", "-m", smollm2, "-n", "4", "--threads", "1", *begin) as there:
        there.until("evaluating")
        there.type(CTRL_C)
        there.until("the message is kept, /regen answers it")
        there.until("1>")
        there.type("/quit\r")
        assert there.closed() == 0

    assert [each["role"] for each in messages("s")] == ["prompt"]


def test_killed_it_answers_when_it_is_opened_again(smollm2: Path) -> None:
    question = "Tell a very long story of a fox."
    with subprocess.Popen(
        [sys.executable, "-m", "cpucache.cli.main", "chat", "s", "-m", str(smollm2), "-n", "4000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as command:
        assert command.stdin
        assert command.stdout
        command.stdin.write(f"{question}\n".encode())
        command.stdin.flush()
        command.stdout.read(20)
        command.kill()

    assert [each["role"] for each in messages("s")] == ["user"]
    again = chat("s", smollm2, said="")
    assert "the last message has no answer yet; answering it now" in again.err
    assert said("s") == [question]
    assert again.out == f"{said('s', 'assistant')[0]}\n"


def test_ctrl_c_ends_a_conversation_from_a_pipe(smollm2: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", START, "chat", "s", "-m", str(smollm2), "-n", "4000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as command:
        try:
            assert command.stdin
            assert command.stdout
            command.stdin.write(b"Tell a very long story of a fox.\ntwo\n")
            command.stdin.flush()
            command.stdout.read(20)
            command.send_signal(signal.SIGINT)
            _, err = command.communicate(timeout=PATIENCE)
        finally:
            command.kill()

    assert command.returncode == 130
    assert err.decode().endswith("cpucache: interrupted\n")
    assert said("s") == ["Tell a very long story of a fox."]
