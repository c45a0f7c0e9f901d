"""Source directories that `psgd submit` uploads, compared with the files that Ray itself would upload."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from psgd.cluster.upload import check_secrets, excludes
from psgd.errors import InputError

SECRETS = (".env", "deep/.env.production", "keys/server.pem", "id_rsa", ".aws/credentials", ".ssh/known_hosts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a source directory without secrets."""
    for name in ("ours/model.py", "ours/.env.example", "ours/__pycache__/x.key", "ours/.git/credentials.pem"):
        write(tmp_path / name)
    return tmp_path / "ours"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def uploaded(folder: Path, with_secrets: bool = False) -> set[str]:
    """Return the files that Ray uploads."""
    found: list[Path] = []
    _dir_travel(folder, [_get_excludes(folder, excludes(with_secrets))], found.append, include_gitignore=True)
    return {str(path.relative_to(folder)) for path in found if path.is_file()}


def test_a_directory_without_secrets_is_uploaded(folder: Path) -> None:
    check_secrets([folder])
    assert uploaded(folder) == {"model.py", ".env.example"}


@pytest.mark.parametrize("name", SECRETS)
def test_a_file_that_looks_like_a_secret_is_named_and_refused(folder: Path, name: str) -> None:
    write(folder / name)
    with pytest.raises(
        InputError, match=rf"--py-module .*ours holds files that look like .*: {name}\. .*--with-secrets"
    ):
        check_secrets([folder])
    assert name not in uploaded(folder)
    assert name in uploaded(folder, with_secrets=True)


@pytest.mark.parametrize("ignore", [".gitignore", ".rayignore"])
def test_a_secret_that_an_ignore_file_names_is_neither_refused_nor_uploaded(folder: Path, ignore: str) -> None:
    write(folder / "deep" / ".env")
    write(folder / "keys" / "server.pem")
    write(folder / ignore, "keys/\n")
    write(folder / "deep" / ignore, ".env\n")
    check_secrets([folder])
    assert uploaded(folder, with_secrets=True) == {"model.py", ".env.example", ignore, f"deep/{ignore}"}


def test_rays_variable_that_disables_gitignore_is_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / ".env")
    write(folder / ".gitignore", ".env\n")
    check_secrets([folder])
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    with pytest.raises(InputError):
        check_secrets([folder])


def test_many_secrets_are_counted_and_links_around_are_not_followed_for_ever(folder: Path) -> None:
    for number in range(20):
        write(folder / f"{number:02d}.pem")
    (folder / "again").symlink_to(folder)
    with pytest.raises(InputError, match=r"00\.pem, 01\.pem, 02\.pem, 03\.pem, 04\.pem and 15 more"):
        check_secrets([folder])


def test_an_ignore_file_that_is_no_text_is_read(folder: Path) -> None:
    (folder / ".gitignore").write_bytes(b"\xff\xfe\n*.pem\n")
    write(folder / "a.pem")
    check_secrets([folder])


def test_a_directory_that_cannot_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read --py-module .*nowhere"):
        check_secrets([folder / "nowhere"])
