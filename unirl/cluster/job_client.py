"""A Ray cluster seen from outside, through its dashboard: what it has; jobs, submitted, followed and stopped."""

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from unirl.cluster.plan import may_grow
from unirl.cluster.upload import SubmitError, Upload

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_S = 10.0
"""Patience for one answer of the dashboard."""
LOST_S = 60.0
"""A cluster that gives no answer for this long while a job is followed is lost; so is one without a job agent."""
STOP_WAIT_S = 900
"""Time that a job gets between SIGTERM and SIGKILL, for the step under way and its checkpoint."""
ADDRESS, TOKEN, TOKEN_PATH = "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Nodes:
    """CPUs and GPUs of each node there is, and whether an autoscaler may add more."""

    resources: tuple[Mapping[str, float], ...]
    may_grow: bool

    @property
    def total(self) -> dict[str, float]:
        """CPUs and GPUs of all nodes."""
        return {name: sum(node.get(name, 0.0) for node in self.resources) for name in ("CPU", "GPU")}

    def fits(self, bundle: Mapping[str, float]) -> bool:
        """Whether one node has all of a bundle."""
        return any(all(node.get(k, 0.0) >= need - 1e-6 for k, need in bundle.items()) for node in self.resources)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """Of its command; None where Ray does not know it."""
    message: str


def dashboard_address(given: str | None) -> str:
    """Address of the dashboard: as given, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else of this machine.

    Raises:
        SubmitError: it is not one of a dashboard.
    """
    address = given or os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SubmitError(f"--address: expected the URL of a Ray dashboard; got {address}; try http://HEAD:8265")
    return address.rstrip("/")


def read_token(file: Path | None) -> str | None:
    """The cluster's token: of the file, else as Ray finds it itself; None when there is none or auth is off.

    Raises:
        SubmitError: the file cannot be read, or is empty.
    """
    if file is not None:
        token = file.read_text().strip() if file.is_file() else ""
        if not token:
            raise SubmitError(f"--token-file: expected a file with the cluster's token; got {file}; correct the path")
        return token
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if token := os.environ.get(TOKEN):
        return token.strip()
    default = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    return (default.read_text().strip() or None) if default.is_file() else None


class JobClient:
    """The jobs of one cluster. The token stays in this object: it is neither logged nor part of a job."""

    def __init__(self, address: str, token: str | None) -> None:
        """Look whether the cluster answers and takes the token.

        Raises:
            ConnectionError: no dashboard answers at the address, or it asks for another token.
        """
        self.address = address
        self._written = Counter[str]()  # characters of each job's log that were handed on
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._get("/api/version")
        os.environ[ADDRESS] = address  # Ray's client takes the address of the environment, whatever it is given
        if not token:
            os.environ["RAY_AUTH_MODE"] = "disabled"  # the cluster asks for none; Ray would warn of that
        self._client = _answered(address, lambda: JobSubmissionClient(address, headers=dict(self._headers)))
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def nodes(self) -> Nodes:
        """What the cluster has.

        Raises:
            ConnectionError: the dashboard is gone.
        """
        found = self._get("/api/v0/nodes?detail=1&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
        alive = {node["node_id"]: node["resources_total"] for node in found["data"]["result"]["result"]}
        status = self._get("/api/cluster_status")["data"]["clusterStatus"] or {}
        types = (status.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}
        return Nodes(tuple(alive.values()), may_grow=may_grow(types))

    def submit(
        self, entrypoint: str, upload: Upload, metadata: Mapping[str, str], *, job_id: str, num_gpus: float = 0.0
    ) -> None:
        """Upload the files and start the command among them.

        Args:
            entrypoint: a shell command.
            upload: becomes the working directory of the command and of its actors.
            metadata: kept beside the job; never secret.
            job_id: a new name.
            num_gpus: GPUs that the command itself holds, on a node that has them.

        Raises:
            SubmitError: the cluster has a job of this name.
            ConnectionError: the dashboard is gone, or has no agent that starts jobs.
            RuntimeError: the cluster refused; says why.
        """
        with TemporaryDirectory() as folder:
            archive = Path(folder) / "upload.zip"
            upload.write(archive)
            environment = {
                "working_dir": str(archive),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
            }
            deadline = time.monotonic() + LOST_S
            while True:
                try:
                    _answered(
                        self.address,
                        lambda: self._client.submit_job(
                            entrypoint=entrypoint,
                            submission_id=job_id,
                            runtime_env=environment,
                            metadata=dict(metadata),
                            entrypoint_num_gpus=num_gpus or None,
                        ),
                    )
                except RuntimeError as error:
                    reason = str(error).strip()
                    if "already exists" in reason:
                        raise SubmitError(
                            f"--job-id: expected a new name; got {job_id}, which {self.address} knows; choose another"
                        ) from error
                    # A head that has just started answers before its agent does.
                    if "No available agent" not in reason or time.monotonic() > deadline:
                        raise _refusal(self.address, reason) from error
                    time.sleep(1.0)
                else:
                    return

    def follow(self, job_id: str, write: Callable[[str], object]) -> Ending:
        """Wait for the end of a job and hand on what it prints; after an interruption, from where it came.

        Raises:
            SubmitError: there is no such job.
            ConnectionError: the cluster was silent for `LOST_S`.
        """
        lost_at = None
        while True:
            try:
                self._info(job_id)
                lost_at = None
                asyncio.run(self._tail(job_id, write))
                info = self._info(job_id)
                if info.status.is_terminal():
                    return Ending(info.status.value, info.driver_exit_code, (info.message or "").strip())
            except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > LOST_S:
                    raise ConnectionError(
                        f"{self.address}: expected to follow {job_id} to its end; got no answer for {LOST_S:g} s "
                        f"({error}); the job may go on; look at the head node"
                    ) from error
                log.debug("following %s: %s", job_id, error)
            time.sleep(1.0)

    async def _tail(self, job_id: str, write: Callable[[str], object]) -> None:
        skip = self._written[job_id]
        async for text in self._client.tail_job_logs(job_id):
            new, skip = text[skip:], max(0, skip - len(text))
            self._written[job_id] += len(new)
            write(new)

    def stop(self, job_id: str) -> bool:
        """Ask a job to end: SIGTERM, at which a run saves; SIGKILL after `STOP_WAIT_S`. False if it had ended.

        Raises:
            SubmitError: there is no such job.
            ConnectionError: the dashboard is gone.
        """
        if self._info(job_id).status.is_terminal():
            return False
        return _answered(self.address, lambda: self._client.stop_job(job_id))

    def _info(self, job_id: str) -> Any:
        try:
            return _answered(self.address, lambda: self._client.get_job_info(job_id))
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            jobs = sorted(job.submission_id or "" for job in self._client.list_jobs() if job.submission_id)
            raise SubmitError(
                f"{self.address}: expected one of its jobs ({', '.join(jobs[-5:]) or 'it has none'}); got {job_id}"
            ) from error

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with urlopen(Request(self.address + path, headers=self._headers), timeout=ANSWER_S) as response:
                return json.load(response)
        except HTTPError as error:
            if error.code in (401, 403):
                raise _token_refused(self.address, bool(self._headers)) from error
            reason = f"HTTP {error.code}"
        except URLError as error:
            reason = str(getattr(error.reason, "strerror", None) or error.reason)
        except (OSError, HTTPException, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise ConnectionError(
            f"{self.address}: expected the dashboard of a Ray cluster; got {reason}; start the cluster, forward its "
            "port 8265, or correct --address"
        )


def _token_refused(address: str, given: bool) -> ConnectionError:
    got = "one that it refuses" if given else "none"
    return ConnectionError(
        f"{address}: expected the cluster's token; got {got}; set {TOKEN}, or name its file with --token-file"
    )


def _refusal(address: str, reason: str) -> Exception:
    if "No available agent" in reason:
        return ConnectionError(
            f"{address}: expected a job agent; got none for {LOST_S:g} s; its port on the head (52365, "
            "--dashboard-agent-listen-port) may be taken by another Ray"
        )
    return RuntimeError(f"{address}: expected the job to be taken; got {reason.splitlines()[-1]}")


def _answered(address: str, ask: Callable[[], Answer]) -> Answer:
    """An answer of Ray's client; an address that is silent by now is a ConnectionError of ours."""
    try:
        return ask()
    except AuthenticationError:
        raise _token_refused(address, given=True) from None
    except OSError as error:  # what the client's HTTP library raises
        raise ConnectionError(
            f"{address}: expected an answer of the cluster; got {type(error).__name__}; look at the head node"
        ) from error
