"""Print the lowest versions that pyproject.toml declares as exact requirements, one a line.

    python tools/minimum_requirements.py [extra ...]

The base dependencies come always, those of the named extras after them. Where one package is declared twice with different
bounds, the higher one is printed. A dependency without a lower bound is an error: it could not be tested.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10: pip carries the same parser
    from pip._vendor import tomli as tomllib

DECLARATION = re.compile(r"^\s*(?P<name>[A-Za-z0-9._-]+)\s*>=\s*(?P<bound>[0-9][0-9A-Za-z.]*)\s*$")


def minimum_requirements(project: dict, extras: list[str]) -> list[str]:
    """`project` is the table [project] of pyproject.toml. Returns lines such as `numpy==1.26.0`."""
    available = project.get("optional-dependencies", {})
    unknown = [extra for extra in extras if extra not in available]
    if unknown:
        raise SystemExit(f"pyproject.toml has no extra {unknown}; it has {sorted(available)}")
    bounds: dict[str, str] = {}
    for declaration in [*project["dependencies"], *(d for extra in extras for d in available[extra])]:
        match = DECLARATION.match(declaration)
        if match is None:
            raise SystemExit(
                f"{declaration!r} is not of the form 'name>=version': every dependency has a lower bound and only that"
            )
        name, bound = match["name"].lower(), match["bound"]
        bounds[name] = max(bound, bounds.get(name, bound), key=_numbers)
    return [f"{name}=={bound}" for name, bound in bounds.items()]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


if __name__ == "__main__":
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join(minimum_requirements(pyproject["project"], sys.argv[1:])))
