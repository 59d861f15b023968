"""What an image lacks of what setup.py asks for, one requirement per line, for `pip install --no-deps -r`.

The Dockerfile runs it inside NVIDIA's image, which has most of it in versions of its own that fit each other: a package
that is there in any version is left as it is. What an image must bring itself, because no index has it built for that
image, ends the build where it is not there. On stderr: every package with setup.py's version and the image's.
"""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_THE_IMAGE = ("torch", "megatron-core", "nvidia-modelopt", "nvidia-resiliency-ext")


def requirements() -> list[str]:
    """REQUIREMENTS of setup.py, without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIREMENTS":
            return list(ast.literal_eval(node.value))
    raise SystemExit("setup.py: expected REQUIREMENTS, found none")


def applies(requirement: str) -> bool:
    """Whether its marker, of which setup.py uses python_version alone, holds here."""
    marker = re.search(r"python_version (<|>=) '3\.(\d+)'", requirement)
    if not marker:
        return True
    here = sys.version_info[:2]
    return here < (3, int(marker[2])) if marker[1] == "<" else here >= (3, int(marker[2]))


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    absent = []
    for requirement in filter(applies, requirements()):
        wanted = requirement.partition(";")[0].strip()
        name = re.split(r"[\[<>=!~ ]", wanted)[0]
        found = installed(name)
        print(f"{name:<24} setup.py {wanted.removeprefix(name):<22} here {found or 'none'}", file=sys.stderr)
        if found is None and name in OF_THE_IMAGE:
            absent.append(name)
        elif found is None:
            print(wanted)
    for name in absent:
        print(f"{name}: expected in the base image, found none. Build on NVIDIA's NeMo image.", file=sys.stderr)
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
