"""Takes tests/gpu to a machine that has a GPU, torch and nothing else, not even a way to a package index.

    python tests/gpu/elsewhere.py pack build/wheels            # here: what fxnvtx and its tests need, without torch
    python tests/gpu/elsewhere.py run build/wheels RESULTS     # there, in a copy of this folder's repository

`pack` asks for wheels of another Python (`--python 3.12`) with the versions of constraints.txt. `run` unpacks those of
them that are missing there into a temporary folder, which also holds Inductor's and Triton's caches, and leaves the log
and a JUnit file in RESULTS. What follows goes to pytest. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 64 << 20
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64")


def requirements(setup: str) -> list[str]:
    """What setup.cfg says that the package and its tests need, less torch and less what the notebooks need."""
    config = configparser.ConfigParser()
    config.read_string(setup)
    extras = config["options.extras_require"]
    wanted = [*config["options"]["install_requires"].split("\n"), *extras["test"].split("\n")]
    left_out = {name_of(line) for line in extras["notebook"].split("\n")} | {"torch", ""}
    return [line for line in wanted if name_of(line) not in left_out]


def name_of(text: str) -> str:
    """A distribution's name as indexes compare it, of a requirement or a wheel."""
    found = re.match(r"[\w.-]+", text)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def pack(folder: Path, python: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--python-version", python]
    command += [*platforms, "--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder)]
    subprocess.run([*command, *requirements((ROOT / "setup.cfg").read_text())], check=True)
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.1f} MB in {folder}")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT >> 20} MiB: too much to carry")


def unpack_missing(folder: Path, target: Path) -> list[str]:
    """Unpack the wheels of what is not installed. A wheel is an archive of what lies in site-packages."""
    unpacked = []
    for wheel in sorted(folder.glob("*.whl")):
        name = name_of(wheel.name.split("-")[0])
        try:
            version(name)
        except PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            unpacked.append(name)
    return unpacked


def run(folder: Path, results: Path, more: list[str]) -> int:
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fxnvtx-gpu-") as work:
        packages = Path(work, "packages")
        packages.mkdir()
        print("unpacked:", *unpack_missing(folder, packages), flush=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), str(packages)))),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(work, "inductor")),
            "TRITON_CACHE_DIR": str(Path(work, "triton")),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-rs", "-v", "-p", "no:cacheprovider", "--durations=15"]
        command += [f"--junitxml={results / 'gpu.xml'}", *more, "tests/gpu"]
        with open(results / "log.txt", "w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for line in process.stdout or ():
                print(line, end="", flush=True)
                log.write(line)
                log.flush()  # what was seen so far is kept where the time is up
        return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--python", default="3.12")
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("results", type=Path)
    given, more = parser.parse_known_args()
    if given.command == "pack":
        if more:
            parser.error(f"unknown: {' '.join(more)}")
        pack(given.folder, given.python)
    else:
        raise SystemExit(run(given.folder.resolve(), given.results.resolve(), more))


if __name__ == "__main__":
    main()
