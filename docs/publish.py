"""Write the project's address wherever it occurs: `make publish-config REPOSITORY=owner/name`.

    publish.py owner/name    publish from this GitHub repository
    publish.py --none        publish from nowhere: notebooks say how to install from the folder
    publish.py --check       exit with a message where a file disagrees with the setting or names another address

The setting is `Repository` under [project.urls] in pyproject.toml. Notebooks, README.md, CITATION.cff and the issue
templates get their links from it, pinned to the tag of the version; docs/conf.py reads it when the site is built.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTING = re.compile(r'^Repository = "https://github\.com/([\w.-]+/[\w.-]+)"\n', re.M)
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\n\n")
BADGES = re.compile(r"(?<=<!-- badges -->\n).*?(?=<!-- end of badges -->)", re.S)
CODE = re.compile(r"^repository-code: .*\n", re.M)
VERSION = re.compile(r"^version: .*$", re.M)
TEMPLATES = Path(".github", "ISSUE_TEMPLATE", "config.yml")
# What installs from, opens or clones a repository, and the name of a package that nobody here has published.
ADDRESS = re.compile(
    r"(?:git\+https://github\.com|colab\.research\.google\.com/github|mybinder\.org/v2/gh|raw\.githubusercontent\.com)"
    r"/([\w.-]+/[\w.-]+?)(?=\.git\b|[@/\s\"')?]|$)"
    r"|(?<!codeload\.)github\.com/([\w.-]+/pwlib)\b"
)
BY_NAME = re.compile(r"""pip install (?:-\S+ )*["'`]?pwlib(?![\w-]|.*git\+)""")

LOCAL_CELL = """\
try:
    import pwlib
except ImportError:
    raise ImportError(
        "pwlib is not installed in this kernel. Run `python install.py` in the course's folder and "
        'use the kernel of its .venv, or run `%pip install -e "..[notebooks]"` here.'
    ) from None"""

COLAB_CELL = """\
try:
    import pwlib
except ImportError:  # on Colab, for example
    import sys
    from importlib.metadata import version

    loaded = {{n: sys.modules[n].__version__ for n in ("numpy", "torch") if n in sys.modules}}
    %pip install --quiet "pwlib[widgets] @ git+https://github.com/{repository}@{tag}"
    if any(version(name) != old for name, old in loaded.items()):
        print("Libraries in use were updated: restart the session, then run the notebook again.")"""


def repository(root: Path = ROOT) -> str | None:
    """`owner/name`, or None while the project has no address."""
    found = SETTING.search((root / "pyproject.toml").read_text("utf-8"))
    return found[1] if found else None


def tag(root: Path = ROOT) -> str:
    return "v" + re.search(r'^__version__ = "(.+)"$', (root / "pwlib" / "__init__.py").read_text("utf-8"), re.M)[1]


def colab(root: Path, address: str, name: str) -> str:
    return f"https://colab.research.google.com/github/{address}/blob/{tag(root)}/notebooks/{name}"


def badge(root: Path, address: str, name: str) -> str:
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({colab(root, address, name)})"


def notebook(text: str, root: Path, address: str | None, name: str) -> str:
    """A notebook's file with its badge below the title and its first code cell; nothing else changes."""
    content = json.loads(text)
    title, first = content["cells"][0], next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    source = BADGE.sub("", "".join(title["source"]), count=1)
    if address:
        source = source.replace("\n\n", f"\n\n{badge(root, address, name)}\n\n", 1)
    title["source"] = source.splitlines(keepends=True)
    cell = COLAB_CELL.format(repository=address, tag=tag(root)) if address else LOCAL_CELL
    first["source"] = cell.splitlines(keepends=True)
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def badges(root: Path, address: str | None) -> str:
    if not address:
        return ""
    binder = f"https://mybinder.org/v2/gh/{address}/{tag(root)}?urlpath=lab/tree/notebooks/00_why_structure.ipynb"
    tests = f"https://github.com/{address}/actions/workflows/cpu.yml"
    owner, _, name = address.partition("/")
    return "\n".join(
        [
            f"[![Tests]({tests}/badge.svg)]({tests})",
            badge(root, address, "00_why_structure.ipynb"),
            f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})",
            f"[Read the course online](https://{owner.lower()}.github.io/{name}/)",
            "",
        ]
    )


def templates(address: str | None) -> str:
    text = "blank_issues_enabled: true\n"
    if address:
        text += f"""contact_links:
  - name: Ask a question
    url: https://github.com/{address}/discussions
    about: Questions about the material, an exercise or the library.
"""
    return text


def files(root: Path, address: str | None) -> dict[Path, str]:
    """The text that each file with an address ought to have."""
    texts = {}
    project = (root / "pyproject.toml").read_text("utf-8")
    setting = f'Repository = "https://github.com/{address}"\n' if address else ""
    texts[root / "pyproject.toml"] = SETTING.sub("", project).replace(
        "[project.urls]\n", f"[project.urls]\n{setting}", 1
    )
    texts[root / "README.md"] = BADGES.sub(badges(root, address), (root / "README.md").read_text("utf-8"))
    citation = CODE.sub("", (root / "CITATION.cff").read_text("utf-8"))
    code = f'repository-code: "https://github.com/{address}"\n' if address else ""
    citation = VERSION.sub(f"version: {tag(root)[1:]}", citation)
    texts[root / "CITATION.cff"] = citation.replace("license: MIT\n", f"license: MIT\n{code}", 1)
    texts[root / TEMPLATES] = templates(address)
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        texts[path] = notebook(path.read_text("utf-8"), root, address, path.name)
    return texts


def foreign(root: Path, address: str | None) -> list[str]:
    """One sentence for each foreign address in a tracked text file. (This file and its test hold examples.)"""
    found = []
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    # In a copy without git's history only what this program writes is looked at.
    names = listing.stdout.split("\0")[:-1] if listing.returncode == 0 else [str(p) for p in files(root, address)]
    for name in names:
        path = root / name
        if (
            path.suffix in (".png", ".jpg", ".npz", ".ico")
            or path.name in ("publish.py", "test_publish.py")
            or not path.is_file()
        ):
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            line = line if len(line) < 5000 else ""  # an image or an explorer's data
            others = {a or b for a, b in ADDRESS.findall(line)} - {address}
            found += [f"{name}, line {number}, names {other}, which is not the project's address" for other in others]
            if BY_NAME.search(line):
                found.append(f"{name}, line {number}, installs pwlib by name from a package index")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("repository", nargs="?", metavar="owner/name", help="on GitHub")
    what.add_argument("--none", action="store_true", help="remove the address")
    what.add_argument("--check", action="store_true", help="change nothing, and fail where something is not as set")
    options = parser.parse_args(arguments)
    if options.repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repository):
        parser.error(f"REPOSITORY is {options.repository!r}; expected owner/name, as in GitHub's address")
    address = repository() if options.check else options.repository
    wrong = []
    for path, text in files(ROOT, address).items():
        if not path.exists() or path.read_text("utf-8") != text:
            if options.check:
                wrong.append(f"{path.relative_to(ROOT)} disagrees with the address in pyproject.toml; run "
                             f"`python docs/publish.py {address or '--none'}`")  # fmt: skip
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, "utf-8", newline="\n")
                print(path.relative_to(ROOT))
    if options.check:
        wrong += foreign(ROOT, address)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
