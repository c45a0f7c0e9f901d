"""Runs as Ray jobs: the driver runs on the cluster, psgd travels as source."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlparse

import yaml
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from psgd.cluster.address import check_listening
from psgd.cluster.session import SHIPPED, py_modules
from psgd.errors import ClusterError, InputError, RunError, RunNotFoundError, SpecError
from psgd.spec import JobSpec

__all__ = ["Jobs"]

RUN = "psgd_run"  # the job's metadata that names its run
REFUSED = 2  # exit code of `psgd train`
OUTPUT = ", last available logs"  # in Ray's message about a job that failed; what follows was printed already

# Ray looks for a job's command on the PATH that it was started with, which need not have its own interpreter. The
# shell's parent is a process of that interpreter's, and has mapped Ray's library from the environment they are in.
DRIVER = r"""
library='s|^[^/]*\(/.*\)/lib[0-9]*/\(python[^/]*\)/[^/]*/ray/_raylet\.so$|\1/bin/\2|p'
python=$(sed -n "$library" "/proc/$PPID/maps" | head -n 1)
[ -x "$python" ] || python=python
exec "$python" -m psgd.cli train job.yaml --resume --name "$1"
"""


class Jobs:
    """The Ray jobs of one cluster that are runs.

    Args:
        address: of the dashboard, such as `http://head:8265`.

    Raises:
        ClusterError: nobody answers there.
    """

    def __init__(self, address: str) -> None:
        parts = urlparse(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterError(f"address {address!r}: expected the dashboard's URL, such as http://HEAD:8265")
        check_listening(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), address)
        with _errors(address):
            self._client = JobSubmissionClient(address)
        self._address = address

    def submit(self, spec: JobSpec, name: str, modules: Sequence[Path] = ()) -> str:
        """Start a run's driver on the cluster, continuing the run if there is one of that name.

        Args:
            spec: the job; its paths must be reachable from the cluster.
            name: of the run.
            modules: source directories of the user's own that the model needs.

        Returns:
            The job's submission id.

        Raises:
            SpecError: a path is relative to this folder, which the cluster does not have.
        """
        _check_paths(spec)
        with TemporaryDirectory() as folder, _errors(self._address):
            tree = spec.model_dump(mode="json", exclude_unset=True)
            (Path(folder) / "job.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
            (Path(folder) / "driver.sh").write_text(DRIVER)
            return str(
                self._client.submit_job(
                    entrypoint=shlex.join(["exec", "sh", "driver.sh", name]),
                    runtime_env={
                        "working_dir": folder,
                        "py_modules": [*py_modules(), *(str(module.absolute()) for module in modules)],
                        "excludes": ["__pycache__"],
                        "env_vars": {SHIPPED: "1"},
                    },
                    metadata={RUN: name},
                )
            )

    def wait(self, job: str, run: str) -> None:
        """Pass on the driver's output until it ends.

        Args:
            job: its submission id.
            run: the run's name.

        Raises:
            InputError: the driver refused the job.
            RunError: the run did not succeed, or its job can no longer be followed.
            KeyboardInterrupt: the run goes on, as is printed.
        """
        goes_on = (
            f"run {run} goes on as job {job}. Follow it with psgd status, end it with psgd stop: "
            f"psgd stop {run} --address {self._address}"
        )
        try:
            with _errors(self._address):
                asyncio.run(self._tail(job))
                found = self._client.get_job_info(job)
        except KeyboardInterrupt:
            sys.stderr.write(f"psgd: {goes_on}\n")
            raise
        if not found.status.is_terminal():
            raise RunError(f"the connection to {self._address} was lost; {goes_on}")
        if found.status == JobStatus.SUCCEEDED:
            return
        if found.driver_exit_code == REFUSED:
            raise InputError(f"job {job}: its driver refused the job, for the reason printed above")
        reason = str(found.message).partition(OUTPUT)[0]
        raise RunError(f"job {job} ended {found.status.value}: {reason}")

    async def _tail(self, job: str) -> None:
        async for lines in self._client.tail_job_logs(job):
            sys.stderr.write(lines)

    def find(self, run: str) -> JobDetails:
        """The newest job of a run."""
        with _errors(self._address):
            jobs = [job for job in self._client.list_jobs() if (job.metadata or {}).get(RUN) == run]
        if not jobs:
            raise RunNotFoundError(f"no job of {self._address} is a run named {run!r}")
        return max(jobs, key=lambda job: job.start_time or 0)

    def status(self, run: str) -> dict[str, str | None]:
        """Describe the newest job of a run: Ray's status of it, and its driver's newest line of progress."""
        job = self.find(run)
        with _errors(self._address):
            output = str(self._client.get_job_logs(job.submission_id or ""))
        lines = [line for line in output.splitlines() if line.startswith("epoch ")]
        return {
            "status": job.status.value,
            "job": job.submission_id,
            "message": str(job.message).partition(OUTPUT)[0],
            "progress": lines[-1] if lines else None,
        }

    def logs(self, run: str) -> str:
        """What the driver of a run printed."""
        job = self.find(run)
        with _errors(self._address):
            return str(self._client.get_job_logs(job.submission_id or ""))

    def stop(self, run: str) -> None:
        """Ask Ray to stop a run's driver, which saves what it can in the seconds it is given.

        Raises:
            InputError: it has ended already.
        """
        job = self.find(run)
        if job.status.is_terminal():
            raise InputError(f"run {run} is not running: its job {job.submission_id} ended {job.status.value}")
        with _errors(self._address):
            self._client.stop_job(job.submission_id or "")


def _check_paths(spec: JobSpec) -> None:
    paths = {"run.storage": spec.run.storage, "data.path": getattr(spec.data, "path", None)}
    for field, path in paths.items():
        if path and "://" not in path and not Path(path).expanduser().is_absolute():
            raise SpecError(
                f"{field}: {path!r} is relative, and a submitted job runs in a folder that Ray makes and deletes; "
                "give an absolute path or a URL that every node reaches"
            )


@contextmanager
def _errors(address: str) -> Iterator[None]:
    try:
        yield
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"the job server at {address} refused: {error}") from error
