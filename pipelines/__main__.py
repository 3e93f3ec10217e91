"""The `graft` command: one table from word to function; each word imports only what it needs."""

from __future__ import annotations

import importlib
import sys

from models import GraftError
from pipelines.stopping import EXIT_CODE, exit_code, stop_signals

COMMANDS = {  # word: (module, function, what it does)
    "image": ("pipelines.image", "main", "fine-tune an image model on your pictures and export it"),
    "text": ("pipelines.text", "main", "fine-tune a text model on your texts and export it"),
    "audio": ("pipelines.audio", "main", "fine-tune an audio model on your clips and export it"),
    "speech": ("pipelines.speech", "main", "teach a speech model to write down what is said, and export it"),
    "resume": ("pipelines.resume", "resume_run", "go on with a run that was stopped or killed"),
    "predict": ("pipelines.batch", "predict", "label files or texts with a run's exported model"),
    "embed": ("pipelines.embed", "embed", "vectors of files or texts from a run's exported model"),
    "rank": ("pipelines.rank", "rank", "which backbone suits your data, in minutes and without training"),
    "curve": ("pipelines.curve", "curve", "what more data would bring, in minutes"),
    "evaluate": ("pipelines.rescore", "evaluate_run", "score a run's exported model on other labelled data"),
    "publish": ("pipelines.publish", "publish_run", "publish a run's model where TensorFlow Serving watches"),
    "rollback": ("pipelines.publish", "rollback_version", "serve an older published version again"),
    "versions": ("pipelines.publish", "print_versions", "list the published versions of a model"),
    "ask": ("pipelines.ask", "ask_server", "label files or texts with a served model"),
    "compare": ("pipelines.compare", "compare", "which answers change from one version of a model to the next"),
    "doctor": ("pipelines.doctor", "doctor", "what this machine has, and what to change"),
    "export": ("pipelines.export", "export_run", "export a run again, or what a stopped run had learned"),
}

HELP = """usage: graft COMMAND [OPTIONS]

Transfer learning for TensorFlow and Keras: a pretrained backbone and a small labelled
dataset in, a verified SavedModel for TensorFlow Serving and a report out.

commands:
{commands}

`graft COMMAND --help` shows a command's options. Start with: graft image --data photos/
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"  {word:<10}{text}" for word, (_, _, text) in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    word, rest = argv[0], argv[1:]
    if word not in COMMANDS:
        print(
            f"graft: unknown command {word!r}; there are {', '.join(COMMANDS)}. See graft --help.",
            file=sys.stderr,
        )
        return 2
    module, function, _ = COMMANDS[word]
    return guarded(getattr(importlib.import_module(module), function), rest)


def guarded(command, argv: list[str]) -> int:
    """Run a command; a GraftError becomes one message and its exit code, never a traceback."""
    try:
        with stop_signals():  # SIGTERM too ends with a word and 75
            return command(argv)
    except GraftError as error:
        print(f"graft: {error}", file=sys.stderr)
        return exit_code(error.exit_code)
    except KeyboardInterrupt:
        print("graft: stopped.", file=sys.stderr)
        return exit_code(EXIT_CODE)


if __name__ == "__main__":
    sys.exit(main())
