"""Runs as Ray jobs: the driver runs on the cluster, to which psgd's source is uploaded."""

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
from psgd.cluster.upload import check_secrets, excludes
from psgd.errors import ClusterError, InputError, RunError, RunNotFoundError, SpecError
from psgd.spec import JobSpec
from psgd_workers.redaction import redact

__all__ = ["Jobs"]

RUN_KEY = "psgd_run"  # key of a job's metadata for the name of its run
EXIT_REFUSED = 2  # exit code of `psgd train` for a job that it refuses
LOGS_MARK = ", last available logs"  # in Ray's message about a failed job, before a repetition of the output

# Ray looks for a job's command on the PATH that Ray was started with, which may lack Ray's own Python interpreter. The
# parent process of this shell runs on that interpreter and has loaded Ray's library. The script reads the path of the
# library in the parent's memory map, and derives the path of the interpreter from it.
DRIVER_SCRIPT = r"""
library='s|^[^/]*\(/.*\)/lib[0-9]*/\(python[^/]*\)/[^/]*/ray/_raylet\.so$|\1/bin/\2|p'
python=$(sed -n "$library" "/proc/$PPID/maps" | head -n 1)
[ -x "$python" ] || python=python
exec "$python" -m psgd.cli train job.yaml --resume --name "$1"
"""
EXPECTED_URL = "expected the URL of Ray's dashboard, such as http://HEAD:8265"


class Jobs:
    """The Ray jobs of one cluster that are runs of psgd.

    Args:
        address: URL of the cluster's dashboard, such as `http://head:8265`.

    Raises:
        ClusterError: the URL is malformed, or nothing answers there.
    """

    def __init__(self, address: str) -> None:
        try:
            parts = urlparse(address)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ClusterError(f"address {address!r}: {error}; {EXPECTED_URL}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterError(f"address {address!r}: {EXPECTED_URL}")
        check_listening(parts.hostname, port, address)
        with _map_errors(address):
            self._client = JobSubmissionClient(address)
        self._address = address

    def submit(self, spec: JobSpec, name: str, modules: Sequence[Path] = (), with_secrets: bool = False) -> str:
        """Start a run's driver on the cluster. If a run of that name exists, the driver continues it.

        Args:
            spec: the job. The cluster must be able to reach its paths.
            name: name of the run.
            modules: folders with the user's Python code that the model imports.
            with_secrets: True to upload files there that look like passwords or private keys.

        Returns:
            The submission id of the Ray job.

        Raises:
            SpecError: a path is relative: the cluster does not know this machine's folders.
            InputError: a source directory holds files that look like secrets.
            ClusterError: the job server refused the job, or could not be reached.
        """
        _check_paths(spec)
        if not with_secrets:
            check_secrets(modules)
        with TemporaryDirectory() as folder, _map_errors(self._address):
            tree = spec.model_dump(mode="json", exclude_unset=True)
            (Path(folder) / "job.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
            (Path(folder) / "driver.sh").write_text(DRIVER_SCRIPT)
            return str(
                self._client.submit_job(
                    entrypoint=shlex.join(["exec", "sh", "driver.sh", name]),
                    runtime_env={
                        "working_dir": folder,
                        "py_modules": [*py_modules(), *(str(module.absolute()) for module in modules)],
                        "excludes": excludes(with_secrets),
                        "env_vars": {SHIPPED: "1"},
                    },
                    metadata={RUN_KEY: name},
                )
            )

    def wait(self, job: str, run: str) -> None:
        """Print the driver's output on stderr until the driver ends.

        Args:
            job: submission id of the Ray job.
            run: name of the run.

        Raises:
            InputError: the driver refused the job.
            RunError: the run did not succeed, or the connection to the cluster was lost.
            KeyboardInterrupt: the user pressed Ctrl-C. The run goes on, and a line on stderr says so.
        """
        address = redact(self._address)
        advice = (
            f"run {run} goes on as job {job}. To follow it: psgd status {run} --address {address}. To stop it: "
            f"psgd stop {run} --address {address}"
        )
        try:
            with _map_errors(self._address):
                asyncio.run(self._print_output(job))
                found = self._client.get_job_info(job)
        except KeyboardInterrupt:
            sys.stderr.write(f"psgd: {advice}\n")
            raise
        if not found.status.is_terminal():
            raise RunError(f"the connection to {self._address} was lost; {advice}")
        if found.status == JobStatus.SUCCEEDED:
            return
        if found.driver_exit_code == EXIT_REFUSED:
            raise InputError(f"Ray job {job}: its driver refused the training job, for the reason printed above")
        reason = str(found.message).partition(LOGS_MARK)[0]
        raise RunError(f"Ray job {job} ended {found.status.value}: {reason}")

    async def _print_output(self, job: str) -> None:
        async for lines in self._client.tail_job_logs(job):
            sys.stderr.write(lines)

    def find(self, run: str) -> JobDetails:
        """Return the newest Ray job of a run.

        Raises:
            RunNotFoundError: no job belongs to a run of that name.
        """
        with _map_errors(self._address):
            jobs = [job for job in self._client.list_jobs() if (job.metadata or {}).get(RUN_KEY) == run]
        if not jobs:
            raise RunNotFoundError(
                f"no job of the cluster at {self._address} belongs to a run named {run!r}: check the name and the "
                "address"
            )
        return max(jobs, key=lambda job: job.start_time or 0)

    def status(self, run: str) -> dict[str, str | None]:
        """Describe the newest job of a run.

        Returns:
            Ray's `status`, the `job` id, Ray's `message`, and the newest line of `progress` that the driver printed.
        """
        job = self.find(run)
        with _map_errors(self._address):
            output = str(self._client.get_job_logs(job.submission_id or ""))
        lines = [line for line in output.splitlines() if line.startswith("epoch ")]
        return {
            "status": job.status.value,
            "job": job.submission_id,
            "message": str(job.message).partition(LOGS_MARK)[0],
            "progress": lines[-1] if lines else None,
        }

    def logs(self, run: str) -> str:
        """Return the output of a run's driver."""
        job = self.find(run)
        with _map_errors(self._address):
            return str(self._client.get_job_logs(job.submission_id or ""))

    def stop(self, run: str) -> None:
        """Ask Ray to stop a run's driver. Ray gives the driver some seconds, in which it saves the run.

        Raises:
            InputError: the run has ended already.
        """
        job = self.find(run)
        if job.status.is_terminal():
            raise InputError(f"run {run} is not running: its job {job.submission_id} ended {job.status.value}")
        with _map_errors(self._address):
            self._client.stop_job(job.submission_id or "")


def _check_paths(spec: JobSpec) -> None:
    paths = {"run.storage": spec.run.storage, "data.path": getattr(spec.data, "path", None)}
    for field, path in paths.items():
        if path and "://" not in path and not Path(path).expanduser().is_absolute():
            raise SpecError(
                f"{field}: {path!r} is relative, but a submitted job runs in a folder that Ray creates and deletes. "
                "Give an absolute path, or a URL that every node can reach"
            )


@contextmanager
def _map_errors(address: str) -> Iterator[None]:
    try:
        yield
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"a request to the job server at {address} failed: {error}. Check that the cluster runs and that its "
            "dashboard is at this address"
        ) from error
