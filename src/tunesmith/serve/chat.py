"""Talk to a stage of a run in the terminal.

In: a run folder, a stage's name, lines that a person types (or a pipe brings). Out: streamed answers.
Must not know: training, figures.

What a person types is rendered as a user's turn by the renderer that trained the stage; control tokens that it spells
stay text, so it cannot open a system turn (TRAPS S8). What the model writes is shown without terminal controls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tunesmith.data.types import Message, RowError
from tunesmith.errors import TunesmithError
from tunesmith.model.stage import LoadedStage, load_stage
from tunesmith.sample.generate import Answer, stream

MAX_NEW_TOKENS = 512
"""Longest answer in tokens; less where the model has no more positions."""
MIN_ROOM = 16
"""Positions kept free for an answer; old turns are forgotten to keep them."""

HELP = """\
/reset        forget the conversation
/stage NAME   talk to another stage (base, or a stage of the recipe)
/temp T       sample at temperature T; /temp 0 goes back to the likeliest answer
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(slots=True)
class Talk:
    """A conversation with a stage. `temperature` None takes the likeliest token each time."""

    stage: LoadedStage
    messages: list[Message] = field(default_factory=list)
    temperature: float | None = None
    num_asked: int = 0

    def ask(self, text: str, on_text: Callable[[str], None]) -> tuple[Answer, int]:
        """Put a user's turn, stream the answer to `on_text`; the answer, and how many old messages were dropped.

        The turn is forgotten again where it cannot be rendered or the answer is interrupted before its first token.
        """
        said: list[str] = []

        def show(piece: str) -> None:
            piece = printable(piece)
            said.append(piece)
            on_text(piece)

        before = list(self.messages)
        self.messages.append(Message("user", text))
        try:
            prompt, num_dropped = self._prompt()
            answer = self._stream(prompt, show)
        except KeyboardInterrupt:
            self._keep("".join(said), before)
            raise
        except TunesmithError:
            self.messages = before
            raise
        self._keep("".join(said), before)
        return answer, num_dropped

    def _keep(self, said: str, before: list[Message]) -> None:
        if said.strip():
            self.messages.append(Message("assistant", said))
        else:
            self.messages = before  # two user turns in a row is what no template expects

    def _stream(self, prompt: Sequence[int], on_text: Callable[[str], None]) -> Answer:
        room = max_positions(self.stage)
        self.num_asked += 1
        return stream(
            self.stage.model,
            prompt,
            decode=lambda ids: str(self.stage.tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
            on_text=on_text,
            max_new_tokens=MAX_NEW_TOKENS if room is None else min(MAX_NEW_TOKENS, room - len(prompt)),
            stop_ids=self.stage.stop_ids,
            temperature=self.temperature,
            seed=self.num_asked,
        )

    def _prompt(self) -> tuple[list[int], int]:
        """The conversation in tokens, without its oldest turns where it would fill the model's positions."""
        room = max_positions(self.stage)
        num_dropped = 0
        while True:
            ids = self.stage.renderer.prompt_ids(tuple(self.messages))
            if room is None or len(ids) + MIN_ROOM <= room:
                return ids, num_dropped
            if len(self.messages) == 1:
                what = f"the message has {len(ids)} tokens; this model has room for {room - MIN_ROOM}."
                raise RowError(what)
            del self.messages[:2]  # a question and its answer
            num_dropped += 2


def max_positions(stage: LoadedStage) -> int | None:
    """Tokens that the model was made for; None where its configuration does not say."""
    value = stage.model.config.get_text_config().to_dict().get("max_position_embeddings")
    return value if isinstance(value, int) else None


def printable(text: str) -> str:
    """The text with control characters made visible: a model's answer must not drive the terminal."""
    return "".join(
        char if char in "\n\t" or not (ord(char) < 32 or 127 <= ord(char) < 160) else f"\\x{ord(char):02x}"
        for char in text
    )


def chat(
    run: Path,
    stage: str | None = None,
    *,
    lines: TextIO | None = None,
    out: TextIO | None = None,
    load: Callable[[Path, str | None], LoadedStage] = load_stage,
) -> None:
    """Talk to `stage` of `run` (the last finished one if None) until Ctrl-D, /quit or the end of the input.

    Where the input is not a terminal every line is a turn and only the answers are written.
    """
    source, sink = lines or sys.stdin, out or sys.stdout
    interactive = source.isatty() and sink.isatty()
    talk = Talk(load(run, stage))
    session = _Session(run, talk, sink, interactive, load)
    session.tell(f"{run.name}: {talk.stage.name}. Answers are the likeliest ones; /help lists the commands.")
    for line in _typed(session) if interactive else (line.rstrip("\r\n") for line in source):
        if line.strip() and not session.turn(line):
            break


@dataclass(slots=True)
class _Session:
    """A terminal around a talk."""

    run: Path
    talk: Talk
    out: TextIO
    interactive: bool
    load: Callable[[Path, str | None], LoadedStage]

    def turn(self, line: str) -> bool:
        """Handle one line; False to leave."""
        if line.startswith("/"):
            name, _, argument = line.strip().partition(" ")
            return self._command(name, argument.strip())
        try:
            answer, num_dropped = self.talk.ask(line, self._write)
            self._write("\n")
            if num_dropped:
                self.tell(f"The {num_dropped} oldest messages were forgotten: the model has no room for more.")
            if not answer.stopped:
                self.tell(f"The answer was cut at {len(answer.ids)} tokens.")
        except KeyboardInterrupt:
            self._write("\n")
            self.tell("Stopped.")
            if not self.interactive:
                raise
        except TunesmithError as error:
            if not self.interactive:
                raise
            self.tell(error.message())
        return True

    def tell(self, text: str) -> None:
        """A line of ours; never in a pipe, where only answers are wanted."""
        if self.interactive:
            self.out.write(f"\033[2m{printable(text)}\033[0m\n")
            self.out.flush()

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _command(self, name: str, argument: str) -> bool:
        if name == "/quit":
            return False
        if name == "/reset":
            self.talk.messages.clear()
            self.tell("The conversation was forgotten.")
        elif name == "/stage":
            self._change_stage(argument)
        elif name == "/temp":
            self._change_temperature(argument)
        else:
            self.tell(HELP if name == "/help" else f"There is no command {name}.\n{HELP}")
        return True

    def _change_stage(self, name: str) -> None:
        try:
            self.talk.stage = self.load(self.run, name or None)
        except TunesmithError as error:
            if not self.interactive:
                raise
            self.tell(error.message())
            return
        self.talk.messages.clear()
        self.tell(f"{self.talk.stage.name} answers now; the conversation starts anew.")

    def _change_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 10:
            self.tell("/temp wants a number from 0 to 10, such as 0.7.")
            return
        self.talk.temperature = value or None
        self.tell(f"Sampling at temperature {value:g}." if value else "Answers are the likeliest ones.")


def _typed(session: _Session) -> Iterator[str]:
    """Lines from the keyboard, with the editing that the terminal offers; ends at Ctrl-D."""
    with suppress(ImportError):  # input() gets history and arrow keys from it where it exists
        import readline  # noqa: F401
    while True:
        try:
            yield input(f"{session.talk.stage.name}> ")
        except KeyboardInterrupt:
            session.out.write("\n")
            session.tell("Ctrl-D leaves.")
        except EOFError:
            session.out.write("\n")
            return
