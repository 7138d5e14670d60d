"""The lock file holds every requirement, at a version that pyproject.toml admits."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
WANTED = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
    if not line.startswith(PROJECT["name"])  # an extra that holds another
]


def locked(path: Path) -> dict[str, Requirement]:
    joined = path.read_text().replace("\\\n", "").splitlines()
    lines = [line.split("#")[0].split("--hash")[0].strip() for line in joined]
    entries = [Requirement(line) for line in lines if line]
    return {canonicalize_name(entry.name): entry for entry in entries}


@pytest.mark.parametrize("wanted", WANTED, ids=lambda requirement: requirement.name)
def test_the_lock_satisfies_pyproject(wanted):
    entry = locked(Path("requirements/dev.lock"))[canonicalize_name(wanted.name)]
    if wanted.name == "torch":  # a range in both: see the Makefile
        assert entry.specifier == wanted.specifier
        return
    (pin,) = entry.specifier
    assert pin.operator == "=="
    assert wanted.specifier.contains(pin.version)


LOCKS = [*Path("requirements").glob("*.lock"), *Path("owl_deploy").rglob("locks/*.txt")]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_entry_but_torch_is_pinned(path):
    for entry in locked(path).values():
        if entry.name != "torch":
            assert [part.operator for part in entry.specifier] == ["=="], entry
        assert "+cpu" not in str(entry)
