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

from psgd.cluster.session import SHIPPED, check_listening, py_modules
from psgd.errors import ClusterError, RunError, RunNotFoundError, SpecError
from psgd.spec import JobSpec

__all__ = ["Jobs"]

RUN = "psgd_run"  # the job's metadata that names its run


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
            SpecError: the run would be kept in the job's own folder, which Ray deletes.
        """
        storage = spec.run.storage
        if "://" not in storage and not Path(storage).expanduser().is_absolute():
            raise SpecError(
                f"run.storage: {storage!r} is relative, and a submitted job runs in a folder that Ray deletes; "
                "give --storage an absolute path or a URL that every node reaches"
            )
        with TemporaryDirectory() as folder, _errors(self._address):
            tree = spec.model_dump(mode="json", exclude_unset=True)
            (Path(folder) / "job.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
            return str(
                self._client.submit_job(
                    entrypoint=shlex.join(
                        ["python", "-m", "psgd.cli", "train", "job.yaml", "--resume", "--name", name]
                    ),
                    runtime_env={
                        "working_dir": folder,
                        "py_modules": [*py_modules(), *(str(module.absolute()) for module in modules)],
                        "excludes": ["__pycache__"],
                        "env_vars": {SHIPPED: "1"},
                    },
                    metadata={RUN: name},
                )
            )

    def wait(self, job: str) -> None:
        """Pass on the driver's output until it ends.

        Raises:
            RunError: it did not succeed.
        """
        with _errors(self._address):
            asyncio.run(self._tail(job))
            status = self._client.get_job_status(job)
            message = self._client.get_job_info(job).message
        if status != JobStatus.SUCCEEDED:
            raise RunError(f"job {job} ended {status.value}: {message}")

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

    def logs(self, run: str) -> str:
        """What the driver of a run printed."""
        job = self.find(run)
        with _errors(self._address):
            return str(self._client.get_job_logs(job.submission_id or ""))

    def stop(self, run: str) -> None:
        """Ask Ray to stop a run's driver, which saves what it can in the seconds it is given."""
        job = self.find(run)
        with _errors(self._address):
            self._client.stop_job(job.submission_id or "")


@contextmanager
def _errors(address: str) -> Iterator[None]:
    try:
        yield
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"the job server at {address} refused: {error}") from error
