"""Fill in what ComfyUI's registry asks for, and check it, in the checkout that is published.

    python tools/registry.py REPOSITORY TAG PUBLISHER

REPOSITORY is the address of the repository on GitHub, TAG the tag that is published, such as v0.2.0, and PUBLISHER the
publisher's id in the registry. pyproject.toml is changed in place: .github/workflows/publish.yml runs this, and commits nothing.
Rules: https://docs.comfy.org/registry/specifications
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10: pip carries the same parser
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ICON = "comfy_nodes/web/icon.svg"


def filled(text: str, repository: str, tag: str, publisher: str) -> str:
    """`text` of pyproject.toml with the publisher's id, the addresses of repository and icon, and without the empty fields."""
    repository = repository.rstrip("/").removesuffix(".git")
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")
    text = text.replace('PublisherId = ""', f'PublisherId = "{publisher}"')
    text = text.replace('Icon = ""', f'Icon = "{raw}/{tag}/{ICON}"')
    return text.replace("[project.scripts]", f'[project.urls]\nRepository = "{repository}"\n\n[project.scripts]')


def problems(pyproject: dict, tag: str) -> list[str]:
    """What the registry would refuse, or show wrongly, in the tables of a filled pyproject.toml; a line each."""
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["name"]) or len(project["name"]) >= 100:
        found.append(f"project.name {project['name']!r} is not letters and digits with single hyphens between")
    if not re.fullmatch(r"\d+\.\d+\.\d+", project["version"]):
        found.append(f"project.version {project['version']!r} is not of the form 1.2.3")
    if tag != f"v{project['version']}":
        found.append(f"the tag {tag} is not v{project['version']}")
    if not project["urls"]["Repository"].startswith("https://github.com/"):
        found.append(f"the repository {project['urls']['Repository']!r} is not an address on GitHub")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", comfy["PublisherId"]):
        found.append(f"the publisher's id {comfy['PublisherId']!r} is empty or not lower-case letters, digits and hyphens")
    found += [f"tool.comfy.{name} is empty" for name in ("DisplayName", "Icon") if not comfy[name]]
    found += [f"{path} is missing" for path in (ICON, "LICENSE", "requirements.txt") if not (ROOT / path).is_file()]
    return found


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    path = ROOT / "pyproject.toml"
    text = filled(path.read_text(encoding="utf-8"), *sys.argv[1:])
    if found := problems(tomllib.loads(text), sys.argv[2]):
        raise SystemExit("\n".join(found))
    path.write_text(text, encoding="utf-8")
