"""The user's source directories that `psgd submit` uploads: refuses those that hold passwords and private keys.

An uploaded file is readable by every process of the cluster, and stays on its disks. Ray leaves out the files that
`.gitignore` and `.rayignore` name; this module looks at the files that are left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

from psgd.errors import InputError

__all__ = ["check_secrets", "excludes"]

NEVER = ("__pycache__", ".git")  # no model needs them; with a slash at the end, Ray would still enter them
SECRETS = (  # in the language of .gitignore
    *(".env", ".env.*", "!.env.example", "!.env.sample", "!.env.template", ".envrc"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "!id_*.pub"),
    *(".aws", ".azure", ".config/gcloud", ".docker", ".gnupg", ".kube", ".ssh"),
    *(".git-credentials", ".htpasswd", ".netrc", ".npmrc", ".pgpass", ".pypirc"),
    *("credentials.json", "service-account*.json", "service_account*.json"),
)
IGNORE_GITIGNORE = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"  # Ray's variable: 1 uploads what .gitignore names
MOST_NAMED = 5  # files that an error names


def excludes(with_secrets: bool) -> list[str]:
    """Return the patterns of files that Ray does not upload.

    Args:
        with_secrets: True to upload files that look like secrets.
    """
    return [*NEVER, *(() if with_secrets else SECRETS)]


def check_secrets(folders: Sequence[Path]) -> None:
    """Refuse to upload source directories with files that look like secrets.

    Raises:
        InputError: a directory holds such files, which the message names, or cannot be read.
    """
    secret = GitIgnoreSpec.from_lines(SECRETS)
    for folder in folders:
        files = (file.relative_to(folder) for file in _uploaded(folder, (), frozenset()))
        try:
            found = sorted(str(file) for file in files if secret.match_file(file))
        except OSError as error:
            raise InputError(f"cannot read --py-module {folder}: {error}") from error
        if found:
            more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
            raise InputError(
                f"--py-module {folder} holds files that look like passwords or private keys: "
                f"{', '.join(found[:MOST_NAMED])}{more}. Each process of the cluster could read them: move them out of "
                "the folder, or name them in a .gitignore or .rayignore there. --with-secrets uploads them all the same"
            )


def _uploaded(folder: Path, above: tuple[tuple[Path, GitIgnoreSpec], ...], parents: frozenset[Path]) -> Iterator[Path]:
    """Yield the files in a folder that Ray uploads.

    Args:
        folder: the folder.
        above: pairs of a folder and the patterns that hold in it, of the folders around this one.
        parents: the folders around this one, without links: a link to one of them is not followed.
    """
    real = folder.resolve()
    if real in parents:
        return
    patterns = (*above, (folder, _patterns(folder)))
    for entry in sorted(folder.iterdir()):
        is_folder = entry.is_dir()
        if any(spec.match_file(f"{entry.relative_to(root)}{'/' * is_folder}") for root, spec in patterns):
            continue
        if is_folder:
            yield from _uploaded(entry, patterns, parents | {real})
        else:
            yield entry


def _patterns(folder: Path) -> GitIgnoreSpec:
    """Return the patterns of files in a folder that are not uploaded."""
    lines = list(NEVER)
    for name in (".gitignore", ".rayignore")[os.environ.get(IGNORE_GITIGNORE, "0") == "1" :]:
        file = folder / name
        if file.is_file():
            lines += file.read_text(encoding="utf-8", errors="replace").splitlines()
    return GitIgnoreSpec.from_lines(lines)
