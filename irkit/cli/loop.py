"""The prompt loop: a conversation in a terminal."""

import os
import sys
from typing import TYPE_CHECKING, Any

from irkit import hub
from irkit.cli.terminal import is_terminal, say, typed_ahead, wait
from irkit.errors import IrkitError, OptionError
from irkit.options import GenerateOptions

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from irkit.session import Session

HELP = '''\
/reset       forget the conversation
/exit, /bye  leave, as does Ctrl-D
/help        show this
"""          begin, and end, a message of several lines
Ctrl-C       stop the answer'''


def prompt_loop(session: "Session", system: str | None, options: GenerateOptions) -> None:
    """Hold a conversation: read messages, stream answers, until /exit or Ctrl-D.

    Raises:
        OptionError: there is no terminal.
    """
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        raise OptionError("a prompt loop needs a terminal")
    session.model.load()
    with typed_ahead():
        _converse(session, system, options)


def _converse(session: "Session", system: str | None, options: GenerateOptions) -> None:
    prompt = _prompt_session()
    wait(session.model.load(), f"loading {session.name}", lambda: session.model.progress)
    say(session.info().backend)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            text = _read_message(prompt)
        except KeyboardInterrupt:
            say("Ctrl-D or /exit leaves, /help shows the commands.")
            continue
        except EOFError:
            return
        match text.split(maxsplit=1):
            case []:
                continue
            case ["/exit" | "/bye"]:
                return
            case ["/help"]:
                print(HELP)
            case ["/reset"]:
                session.reset()
                messages = list(opening)
                say("The conversation is forgotten.")
            case [command] if command.startswith("/"):
                say(f"There is no command {command}; /help shows those there are.")
            case _:
                messages.append({"role": "user", "content": text})
                answer = _answer(session, messages, options)
                if answer:
                    messages.append({"role": "assistant", "content": answer})
                else:
                    messages.pop()


def _answer(session: "Session", messages: list[dict[str, Any]], options: GenerateOptions) -> str:
    """Prints the answer as it comes, and returns what there is of it: less if Ctrl-C or an error ends it."""
    generation = None
    try:
        generation = session.respond(messages, **dict(options))
        for text in generation.texts():
            print(text, end="", flush=True)
        print()
        if generation.finish_reason == "context":
            say("The context is full; /reset starts anew.")
    except KeyboardInterrupt:
        if generation:
            generation.cancel()
        print()
    except IrkitError as error:
        say(f"irkit: {error}")
    return generation.partial_text if generation else ""


def _read_message(prompt: "PromptSession[str]") -> str:
    text = prompt.prompt(">>> ").encode(errors="replace").decode()  # a terminal may send what is no UTF-8
    if not text.startswith('"""'):
        return text
    text = text[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + prompt.prompt("... ")
    return text.rstrip()[:-3]


def _prompt_session() -> "PromptSession[str]":
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    path = hub.home() / "history"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # what people ask is theirs alone
    return PromptSession(history=FileHistory(str(path)))
