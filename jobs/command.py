"""What every command is made of: dataclasses of options -> flags, YAML and --help; one result, one exit status.

Status 0: done. 2: the user's mistake, one line that names the option or file. 1: a stage failed, the line says what is kept.
"""

import dataclasses
import json
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from docstring_parser import parse_from_object
from jsonargparse import ActionConfigFile, ArgumentParser

from pipelines.runs import credentials
from pipelines.runs.errors import StageFailed, UserError

Body = Callable[..., dict[str, Any]]


class OneLineParser(ArgumentParser):
    """jsonargparse's parser with errors of one line and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = _readable(" ".join(str(message).split()))
        sys.stderr.write(f"{self.prog}: error: {credentials.redact(text)} (see {self.prog} --help)\n")
        raise SystemExit(2)

    def format_help(self) -> str:
        """Without what jsonargparse adds to options that have no value: their help tells what happens then."""
        return re.sub(r",\s+default:\s+null|\s+\|\s+null", "", super().format_help()).replace(".:\n", ":\n")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its name, the groups of options that it takes, and the function that is called with them in that order.

    The function returns what `--json` prints: counts, seconds, paths, metrics. A `failed` among them says what is wrong
    with what was looked at: it is printed too, and the status is 1. The function imports pipelines itself, so that
    --help and mistakes in options do not wait for torch and Ray.
    """

    name: str
    summary: str
    groups: tuple[type, ...]
    body: Body

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Parse, run, report; returns the exit status."""
        sys.excepthook = _without_credentials
        try:
            options = self.parse(sys.argv[1:] if argv is None else list(argv))
        except SystemExit as exit_:  # argparse's way to end after --help or a mistake
            return int(exit_.code or 0)
        try:
            os.getcwd()
        except FileNotFoundError:
            return self._fail(2, "error: the working folder does not exist any more; change into one that does")
        # A job that is stopped gets SIGTERM: leave through the same door as Ctrl-C, so that Ray and MLflow are closed.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self._run(options)
        finally:
            signal.signal(signal.SIGTERM, before)

    def parse(self, argv: list[str]) -> list[Any]:
        """One instance of each group, from flags over a YAML file over defaults. SystemExit(2) on a mistake."""
        parser = OneLineParser(prog=f"hardset {self.name}", description=self.summary.strip().splitlines()[0])
        parser.add_argument("--config", action=ActionConfigFile, help="YAML file of these options; flags override it")
        for group in self.groups:
            _add_options(parser, group)
        try:
            values = parser.parse_args([_dashed(word) for word in argv])
        except (OSError, UnicodeDecodeError) as error:  # what else is read here than --config
            parser.error(f"--config: cannot be read as a YAML file ({error})")
        try:
            return [
                group(**{f.name: _bare(f.name, getattr(values, f.name)) for f in dataclasses.fields(group)})
                for group in self.groups
            ]
        except UserError as error:
            parser.error(_told(error))

    def _run(self, options: list[Any]) -> int:
        from jobs import session, tracking
        from pipelines.runs.holder import COMMAND
        from pipelines.runs.retries import StorageError, waiting_for_storage

        COMMAND.set(f"hardset {self.name}")
        session.set_environment()
        asked = next((g.storage_retry_s for g in options if getattr(g, "storage_retry_s", None) is not None), None)
        try:
            for uri in (session.tracking_uri(group) for group in options if hasattr(group, "mlflow")):
                if uri is not None:
                    tracking.warm_up(uri)
            with waiting_for_storage(asked):
                result = self.body(*options)
        except KeyboardInterrupt:
            return self._fail(1, "stopped; finished shards are kept, the same command goes on from there")
        except Exception as error:
            cause = _root_cause(error)
            if isinstance(cause, StageFailed):
                return self._fail(1, _with_flags(str(cause)))
            if isinstance(cause, UserError) and not os.environ.get("HARDSET_TRACEBACK"):
                return self._fail(2, f"error: {_told(cause)}")
            if isinstance(cause, StorageError):
                return self._fail(1, f"{cause}; finished shards are kept")
            if isinstance(cause, (OSError, *_ray_errors("RayError"))) and not os.environ.get("HARDSET_TRACEBACK"):
                return self._fail(1, f"{type(cause).__name__}: {cause}; finished shards are kept")
            raise
        finally:
            tracking.stop_spare()
        if any(getattr(group, "json", False) for group in options):
            print(credentials.redact(json.dumps(result, default=_plain)), flush=True)
        return self._fail(1, _with_flags(result["failed"])) if result.get("failed") else 0

    def _fail(self, status: int, message: str) -> int:
        sys.stderr.write(f"hardset {self.name}: {credentials.redact(' '.join(message.split()))}\n")
        return status


def flag_of(field: str) -> str:
    """`max_bad_fraction` -> `--max-bad-fraction`; `from_`, whose name alone Python keeps for itself, -> `--from`."""
    return "--" + field.strip("_").replace("_", "-")


def _with_flags(message: str) -> str:
    """A message in which options, fields in backticks, are called as on the command line."""
    return re.sub(r"`([a-z][a-z_]*)`", lambda found: flag_of(found[1]), message)


def _told(error: UserError) -> str:
    return _with_flags(error.message if error.field is None else error.told(flag_of(error.field)))


def _bare(name: str, value: Any) -> Any:
    """An option without credentials, which are remembered; MLflow's address, which nothing stores, keeps its own."""
    if name == "mlflow":
        return value
    if isinstance(value, list):
        return [_bare(name, inner) for inner in value]
    return credentials.strip(value) if isinstance(value, str) else value


def _without_credentials(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """A bug's traceback on standard error."""
    sys.stderr.write(credentials.redact("".join(traceback.format_exception(kind, error, where))))


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(credentials.redact(text), flush=True)


def option_help(group: type) -> dict[str, str]:
    """What the docstrings under a dataclass's fields say, those that it inherits too."""
    docs = [parse_from_object(base) for base in reversed(group.__mro__) if dataclasses.is_dataclass(base)]
    return {param.arg_name: param.description or "" for doc in docs for param in doc.params}


def _add_options(parser: ArgumentParser, group: type) -> None:
    """A flag for every field of a dataclass; its help is the docstring under the field."""
    help_of = option_help(group)
    target = parser.add_argument_group(parse_from_object(group).short_description)
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        flag, about = flag_of(field.name), {"dest": field.name, "help": help_of.get(field.name)}
        hint = hints[field.name]
        if field.default_factory is not dataclasses.MISSING:
            about["default"] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            about["default"] = field.default
        else:
            about["required"] = True
        if hint is bool:
            target.add_argument(flag, action="store_true", **about)
        elif typing.get_origin(hint) is list:
            target.add_argument(flag, type=typing.get_args(hint)[0], nargs="+", **about)
        else:
            target.add_argument(flag, type=hint, **about)


def _readable(message: str) -> str:
    """A mistake in an option as jsonargparse words it -> the option as it is typed, what was found, what would do."""
    found = re.match(r'Parser key "(\w+)": (.*)', message)
    if found is None:
        message = re.sub(r"(arguments are required:) (\w+)", lambda m: f"{m[1]} --{m[2].replace('_', '-')}", message)
        return message.replace(
            "Unexpected config:", "--config: expected options as a mapping of names to values, found"
        )
    flag, text = "--" + found[1].replace("_", "-"), found[2]
    names = {"int": "a whole number", "float": "a number", "bool": "yes or no", "str": "text"}
    kinds = re.findall(r"<class '(\w+)'>", text.partition("Errors:")[0])
    wanted = " or ".join(names[kind] for kind in kinds if kind in names)
    if choices := re.search(r"Literal\[(.*?)\]", text):
        wanted = f"one of {choices[1]}"
    value = re.search(r"(?:Got value|Given value): (.*)$", text)
    return f"{flag} {value[1]}: expected {wanted}" if wanted and value else f"{flag}: {text}"


def _dashed(word: str) -> str:
    """--max_bad_fraction=0.1 -> --max-bad-fraction=0.1; values stay as they are, and so does jsonargparse's own flag."""
    if not word.startswith("--") or word.startswith("--print_config"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _root_cause(error: BaseException) -> BaseException:
    """The error that a task or an actor met, out of the wrappers that Ray puts around it."""
    while isinstance(error, _ray_errors("RayTaskError")) and error.cause is not None:
        error = error.cause
    return error


def _ray_errors(name: str) -> tuple[type[BaseException], ...]:
    """That type of Ray's exceptions; none where Ray was never imported, and so raised nothing."""
    exceptions = sys.modules.get("ray.exceptions")
    return () if exceptions is None else (getattr(exceptions, name),)


def _plain(value: Any) -> Any:
    """numpy scalars and dataclasses for JSON."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return value.item() if hasattr(value, "item") else str(value)
