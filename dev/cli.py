"""The command line for developers and curious users. Uses the standard library only.

    python dev.py demo      make one picture without and one with steering, in a real ComfyUI
    python dev.py test      run all tests; further arguments go to pytest. --host VERSION: on another ComfyUI
    python dev.py serve     leave a ComfyUI with this pack running, for the browser
    python dev.py bench     measure: accuracy ..., cost ...; prints a table, writes JSON
    python dev.py run ...   run Python in the environment, e.g. run -m dev.toyworld.train --help

The first start builds an environment (a virtual environment and the pinned ComfyUI) in a cache folder. The folder's name is
a hash of all pins, so all clones share it and a second start takes seconds.
With --comfyui PATH (or the variable COMFYUI_PATH) an existing installation is used instead.
"""
from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from . import demo
from .client import ServerError
from .environment import HOSTS, NEWEST_HOST, OLDEST_HOST, ROOT, Environment, Failure, cache_folder, open_environment, say
from .server import Server
from .workflow import WorkflowError

DEMO_WORKFLOW = ROOT / "workflows" / "toyworld_steering.json"
PASSING_ON = ("test", "run", "bench")  # commands that pass unknown arguments to another program


def command_run(env: Environment, arguments: argparse.Namespace) -> int:
    return env.call(*arguments.rest, here=True)


def command_test(env: Environment, arguments: argparse.Namespace) -> int:
    env.need("pytest")
    tests = ROOT / "tests"
    named = any((ROOT / word.split("::")[0]).exists() for word in arguments.rest)
    folders = [] if named else [tests / "host", tests / "server"] if arguments.host else [tests]
    apart = [] if arguments.rest or not env.has("xdist") else ["-n", str(min(2, os.cpu_count() or 1)), "--dist", "loadfile"]
    return env.call("-m", "pytest", "-c", str(tests / "pytest.ini"), *apart, *arguments.rest, *map(str, folders))


def command_bench(env: Environment, arguments: argparse.Namespace) -> int:
    return env.call("-m", f"dev.benchmarks.{arguments.what}", *arguments.rest, here=True)


def command_serve(env: Environment, arguments: argparse.Namespace) -> int:
    clone = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
    base = cache_folder() / f"serve-{clone}"  # kept: it holds the user's pictures and workflows
    server = Server(env.python, env.host, base=base, port=arguments.port, host_models=not env.pinned)
    try:
        demo.start(server)
        say(f"open {server.address} in a browser; the pack's workflows are in its template browser")
        say(f"pictures, models and the log lie in {base}; Ctrl-C ends it")
        while server.alive():
            time.sleep(0.5)
        raise Failure("ComfyUI ended by itself.\n" + server.log_tail())
    except KeyboardInterrupt:
        say("stopping")
        return 0
    finally:
        server.stop()


def command_demo(env: Environment, arguments: argparse.Namespace) -> int:
    if not DEMO_WORKFLOW.is_file():
        raise Failure(f"{DEMO_WORKFLOW} is missing; is this the whole repository?")
    out = Path(arguments.out).expanduser().resolve()
    server = Server(env.python, env.host, port=arguments.port)
    try:
        demo.start(server)
        text, files = demo.make_pictures(server, DEMO_WORKFLOW, out, arguments.prompt, arguments.seed)
    finally:
        server.stop()
    for name, file in files.items():
        say(f"{name}: {file}")
    judged = [f"{name}={files[name]}" for name in ("unsteered", "steered") if name in files]
    return env.call("-m", "dev.benchmarks.verdict", "--prompt", text, *judged)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI installation (also: COMFYUI_PATH)")
    shared.add_argument("--python", metavar="FILE", help="interpreter of that installation, where it is not found")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|test|serve|bench|run")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=text, description=text, allow_abbrev=False,
                                    add_help=name not in ("bench", "run"))  # --help is for the other program
        added.set_defaults(run=run, fresh=False, host=None)
        return added

    shown = command("demo", command_demo, "make one picture without and one with steering")
    shown.add_argument("--prompt", help='what to paint, e.g. "a dog above a cat"')
    shown.add_argument("--seed", type=int, help="another picture of the same prompt")
    shown.add_argument("--out", default="demo", metavar="FOLDER", help="where the pictures go (demo)")
    served = command("serve", command_serve, "leave a ComfyUI with this pack running, for the browser")
    for added in (shown, served):
        added.add_argument("--port", type=int, help="port of the server (any free one)")
    tested = command("test", command_test, "run all tests; further words go to pytest")
    tested.add_argument("--fresh", action="store_true", help="in an environment built for this run alone")
    tested.add_argument("--host", metavar="VERSION", choices=[*HOSTS, "oldest"],
                        help="run the host and server tests on another ComfyUI: %(choices)s")
    benched = command("bench", command_bench, "measure; further words go to the benchmark")
    benched.add_argument("what", help="accuracy, cost, ...: a module of dev/benchmarks/")
    command("run", command_run, "run Python in the environment; further words go to it")
    arguments, arguments.rest = parser.parse_known_args(argv)
    if arguments.rest and arguments.command not in PASSING_ON:
        parser.error(f"{arguments.command} does not know: {' '.join(arguments.rest)}")
    if arguments.comfyui and (arguments.fresh or arguments.host):
        parser.error("--comfyui excludes --fresh and --host")
    if arguments.host == "oldest":
        arguments.host = OLDEST_HOST
    return arguments


def main() -> int:
    arguments = parse()
    # SIGTERM unwinds like Ctrl-C, so that no server is left running
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    comfyui = arguments.comfyui or (None if arguments.fresh or arguments.host else os.environ.get("COMFYUI_PATH"))
    try:
        with open_environment(comfyui, arguments.python, arguments.fresh, arguments.host or NEWEST_HOST) as env:
            return arguments.run(env, arguments)
    except (Failure, ServerError, WorkflowError) as error:
        say(f"{error}")
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130

