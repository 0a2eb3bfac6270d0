"""
What every stage does besides its work: flags with presets, its folder, its beginning and end, Ctrl-C.

A stage's folder: the model at its top, `training/` (what resumes an interrupted run), `log.jsonl`, `args.json` (flags,
inputs, commit), pictures, `.lock` (one run at a time), and `done.json` as the last file written. The same command
continues an unfinished run; on a finished one it says so.
"""

import argparse
import fcntl
import importlib.util
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lib.distributed import (
    default_device,
    fail,
    global_sum,
    is_main,
    leave,
    say,
    wait_for_all,
    without_keys,
)
from lib.records import disk, write_json
from lib.streams import Clock, commit_of_code, compare_with_earlier_run, fingerprints

# ---- flags ---------------------------------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """One row of a stage's table of flags. The type is that of the defaults, or `kind` where both are None."""

    name: str  # as typed, "--lr-floor"
    tiny: Any  # default of --preset tiny
    astra: Any  # default of --preset astra
    help: str  # unit, and "paper" only where the number is the paper's
    low: float | None = None  # bounds, both included
    high: float | None = None
    kind: type | None = None
    choices: tuple | None = None
    neutral: bool = False  # memory and speed only: may differ when a run goes on


def parse_flags(doc: str, flags: list[Flag], argv: list[str] | None = None) -> argparse.Namespace:
    """The command line by a table of flags; what the user types wins over --preset.

    A bool becomes --x / --no-x, a list takes several values. `parser` of the result says further errors in argparse's
    way: args.parser.error("...").
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", choices=("tiny", "astra"), default="tiny", help="defaults of the other flags"
    )
    for flag in flags:
        add_flag(parser, flag)
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**{key_of(flag): getattr(flag, preset) for flag in flags})
    args = parser.parse_args(argv)
    args.parser = parser
    return args


def key_of(flag: Flag) -> str:
    """The attribute of a flag: "--lr-floor" -> "lr_floor"."""
    return flag.name.removeprefix("--").replace("-", "_")


def help_of(flag: Flag) -> str:
    """What --help says of a flag: its text, and in brackets the defaults that it has."""
    defaults = {"tiny": flag.tiny, "astra": flag.astra}
    if flag.tiny == flag.astra:
        defaults = {"default": flag.tiny}
    words = []
    for name, value in defaults.items():
        if value is not None:
            value = " ".join(value) if isinstance(value, list) else value
            words.append(f"{name} {value}")
    return f"{flag.help} ({', '.join(words)})" if words else flag.help


def add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    """One row of the table as argparse takes it."""
    example = flag.tiny if flag.tiny is not None else flag.astra
    text = help_of(flag)
    if isinstance(example, bool):
        parser.add_argument(flag.name, action=argparse.BooleanOptionalAction, help=text)
        return
    several = {}
    if isinstance(example, list):
        example, several = example[0], {"nargs": "+"}
    kind = flag.kind or (str if example is None else type(example))
    if flag.low is not None:
        kind = bounded(kind, flag.low, flag.high)
    parser.add_argument(flag.name, type=kind, choices=flag.choices, help=text, **several)


def bounded(kind: type, low: float, high: float | None = None) -> Callable[[str], Any]:
    """What argparse takes as `type` for an int or a float from `low` to `high`, both included; nan is neither."""

    def number(text: str):
        value = kind(text)
        if not low <= value <= (math.inf if high is None else high):
            most = "" if high is None else f", and {high} at most"
            raise argparse.ArgumentTypeError(f"{text} is out of bounds: {low} or more{most}")
        return value

    number.__name__ = kind.__name__
    return number


# ---- a stage's beginning and end -----------------------------------------------------------------------------------------


def begin(
    title: str,
    args: argparse.Namespace,
    flags: list[Flag],
    needs: Iterable[tuple[str | Path, str]] = (),
) -> None:
    """Say what runs, and look at args.out: finished already, begun with other flags, or free to go.

    needs   (path, command that makes it) of every input
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    several = f" x {processes}" if processes > 1 else ""
    say(f"{title}: {args.preset} preset on {default_device()}{several}")
    neutral = {"parser", *(key_of(flag) for flag in flags if flag.neutral)}
    settings = {key: value for key, value in vars(args).items() if key not in neutral}
    inputs = fingerprints(settings)
    out = Path(args.out)
    has_begun = (out / "done.json").exists() or (out / "training").exists()
    if not has_begun:  # what cannot begin makes no folder
        for path, command in needs:
            need(path, command)
    lock_folder(out)
    if has_begun:
        compare_with_earlier_run(out, settings, inputs)
    elif is_main():  # what a run began with is what it is compared with, however often it goes on
        record = {"stage": title, "commit": commit_of_code(), **settings, "inputs": inputs}
        write_json(out / "args.json", record)


LOCKS = {}  # {lock: its open file}: the system lets go of a lock when its process ends, whatever ends it
LOCK_PATIENCE = 15.0  # seconds for a run before this one, which may be saving


def lock_folder(folder: str | Path) -> None:
    """Keep a folder to this run from now on, or stop with a sentence: rank 0 locks a file in it (a collective).

    Every command that writes a folder calls it, no reader does.
    """
    path = Path(os.path.abspath(folder), ".lock")
    is_locked = False
    try:
        if is_main() and path not in LOCKS:
            with disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open(path, "a+", errors="backslashreplace")
                wait_for_lock(file, folder)
                file.truncate(0)
                command = without_keys(" ".join(sys.argv))  # the words are for people
                file.write(f"process {os.getpid()} on {socket.gethostname()}: {command}")
                file.flush()
            LOCKS[path] = file
        is_locked = True
    finally:  # the other ranks must hear of a failure
        failures = global_sum(float(not is_locked))
    if failures:
        raise SystemExit(1)


def wait_for_lock(file: TextIO, folder: str | Path) -> None:
    """Lock an open file; a sentence about who holds it after LOCK_PATIENCE, a warning where nothing can be locked."""
    end = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                file.seek(0)
                holder = file.read()
                fail(f"{folder} is written by {holder}. Wait for its end, or give another --out.")
            time.sleep(0.2)
        except OSError as error:
            return say(f"{file.name}: {error.strerror}. Let no other run write to {folder}.")


def need(path: str | Path, command: str) -> str | Path:
    """The path of an input, or a sentence that says which command makes it. A hub id such as Qwen/Qwen3-VL passes."""
    here = Path(path)
    is_path = str(path).startswith(("out/", ".", "/", "~")) or str(path).count("/") != 1
    if is_path and not here.exists():
        fail(f"{path} is missing. `{command}` makes it.")
    if (here / "args.json").exists() and not (here / "done.json").exists():
        fail(f"{path} is not finished. Run `{command}` again: it continues where it stopped.")
    return path


def newest(stages: Iterable[str], file: str = "config.json") -> Path | None:
    """The folder of out/<stage>, its -astra, or out/demo/<stage> whose `file` was written last; None if there is none."""
    folders = []
    for stage in stages:
        folders += [f"out/{stage}", f"out/{stage}-astra", f"out/demo/{stage}"]
    files = [Path(folder, file) for folder in folders if Path(folder, file).exists()]
    return max(files, key=lambda path: path.stat().st_mtime).parent if files else None


def has_extras() -> bool:
    """Is the folder extras/ there? The core runs without: then there is no diagnosis, no report, no curve, no dose."""
    return importlib.util.find_spec("extras") is not None


def finish(folder: str | Path, steps: int, clock: Clock) -> None:
    """Write done.json, a stage's last file; drop the training state that only a resume needs."""
    spent = clock.read()
    if is_main():
        write_json(Path(folder) / "done.json", {**spent, "steps": steps})
        shutil.rmtree(Path(folder) / "training", ignore_errors=True)
    say(
        f"{folder} is complete: {steps} steps, {spent['seconds']:.0f} s, {spent['cpu_seconds']:.0f} CPU-s."
    )
    wait_for_all()


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; an interrupt, a full disk or a server that is down ends in a sentence, not in a traceback.

    SIGTERM is an interrupt too: Ctrl-C itself is ignored by what a script has started with `&`.
    """
    from lib.simulators import SimulatorError  # that module imports this one

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # for letters that the terminal has not
    try:
        with disk("what the stage was writing"):
            main()
            leave()
    except KeyboardInterrupt:
        say("Stopped. The same command goes on from what was saved.")
        raise SystemExit(130) from None
    except SimulatorError as error:
        fail(f"{error} The same command goes on from what was saved.")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "extras":
            raise
        fail("This needs extras/, which is not here: the core alone does without.")


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------------


class Interrupt:
    """`with Interrupt() as stop:` Ctrl-C or SIGTERM only raises a flag, so that the loop can end its step and save.

    A second Ctrl-C stops at once, without saving.
    """

    def __enter__(self):
        self.flag = False
        self.handlers = {}
        for sig in (signal.SIGINT, signal.SIGTERM):
            self.handlers[sig] = signal.signal(sig, self.handle)
        return self

    def __exit__(self, *error):
        for sig, handler in self.handlers.items():
            signal.signal(sig, handler)

    def handle(self, sig, frame) -> None:
        """Signal handler: remember; on the second Ctrl-C give up at once."""
        if self.flag and sig == signal.SIGINT:
            raise KeyboardInterrupt
        self.flag = True
        say("Stopping after this step, then saving (Ctrl-C again: at once, without saving).")

    def requested(self) -> bool:
        """True if any rank was asked to stop (a collective: call it once per step on every rank)."""
        return global_sum(float(self.flag)) > 0

    def save_or_leave(self, done: int, args: argparse.Namespace, save: Callable) -> None:
        """After `done` steps: `save(done)` where --save-every, the last step or Ctrl-C asks for it; after Ctrl-C, leave."""
        leaving = self.requested()
        if leaving or done % args.save_every == 0 or done == args.steps:
            save(done)
        if leaving:
            say(f"Stopped after step {done}; saved. The same command goes on from there.")
            raise SystemExit(130)  # so that a Makefile stops too
