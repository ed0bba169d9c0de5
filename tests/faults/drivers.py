"""Driver processes: started with their own Ray, killed by id, and what they left in a store."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import boto3
import yaml
from small import small_spec

from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.reachability import list_objects

STILLHOUSE = str(Path(sys.executable).with_name("stillhouse"))
SECRET = "marked-secret-that-nobody-writes-down"
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
}
SAME_BYTES = ("scans/parts", "drops/parts", "tokens/parts", "scores/parts", "selections")
PATIENCE_S = 280


@dataclass
class Job:
    """A folder with a pool and a target, and the models of the spec."""

    folder: Path
    models: dict


class Driver:
    """One `stillhouse run` in a session of its own, its output in files."""

    def __init__(self, arguments, folder, environment):
        self.folder = folder
        self.ray_folder = environment["RAY_TMPDIR"]
        folder.mkdir(parents=True)
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as errors:
            self.process = subprocess.Popen(
                arguments, stdout=out, stderr=errors, env=environment, start_new_session=True
            )

    def end(self, timeout=PATIENCE_S):
        """Wait for its end: exit code, what `--json` printed (or None), stderr."""
        code = self.process.wait(timeout)
        out, errors = (self.folder / name for name in ("stdout", "stderr"))
        return code, json.loads(out.read_text() or "null"), errors.read_text()

    def kill(self):
        """SIGKILL of the driver alone, dead on return: its Ray has to notice by itself.

        The driver is two processes, one that works and its parent, which takes it along.
        """
        family = [self.process.pid, *_children(self.process.pid)]
        self.process.send_signal(signal.SIGKILL)
        while any(_lives(pid) for pid in family):
            time.sleep(0.01)


def _children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for place in tasks for child in place.read_text().split()]


def descendants(pid):
    """Ids of a process and all that descend from it."""
    found, pending = [], [pid]
    while pending:
        found.append(pending.pop())
        pending += _children(found[-1])
    return found


class KillAt:
    """A proxy's rule: the n-th PUT (from 0) of such a path kills, once.

    `/selections/manifest` is the manifest of any selection.
    """

    def __init__(self, wanted, number, then, kill):
        self.wanted, self.number, self.then, self.kill = wanted, number, then, kill
        self.seen, self.killed = 0, False

    def __call__(self, n, method, path):
        if self.killed or method != "PUT" or not self._matches(path):
            return None
        self.seen += 1
        if self.seen <= self.number:
            return None
        self.killed = True
        self.kill()
        return self.then

    def _matches(self, path):
        kind, _, rest = self.wanted.strip("/").partition("/")
        if rest == "manifest":
            return f"/{kind}/" in path and path.split("?")[0].endswith("/manifest.json")
        return self.wanted in path


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Bench:
    """Runs the job on stores of one test; `address` is that of a Ray to join, or None."""

    def __init__(self, job, s3_server, folder, address=None):
        self.job, self.s3_server, self.folder, self.address = job, s3_server, folder, address
        self.s3 = boto3.client(
            "s3", endpoint_url=s3_server, aws_access_key_id="test", aws_secret_access_key=SECRET
        )
        self.drivers = []

    def bucket(self):
        """The name of a new bucket."""
        name = f"stillhouse-{uuid4().hex[:12]}"
        self.s3.create_bucket(Bucket=name)
        return name

    def upload(self, bucket, *folders):
        """Copy folders of the job into a bucket."""
        for folder in folders:
            for path in (self.job.folder / folder).iterdir():
                self.s3.upload_file(str(path), bucket, f"{folder}/{path.name}")

    def start(self, store, *, endpoint=None, **changes):
        """Start a driver of the job; all its S3 requests go to `endpoint`."""
        compute = {"scorers": 1, "packers": 1, "trainers": 1, "address": self.address}
        changes = {"store": store, "compute": compute, "part_tokens": 8000} | changes
        if self.address is not None:  # its workers do not inherit the driver's environment
            changes["storage_options"] = {"endpoint_url": endpoint or self.s3_server}
        return self.launch(small_spec(self.job.folder, **self.job.models, **changes), endpoint)

    def launch(self, content, endpoint=None):
        """Start a driver of any spec."""
        number = len(self.drivers)
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = self.folder / f"spec-{number}.yaml"
        spec.write_text(yaml.safe_dump(content))
        arguments = [STILLHOUSE, "run", str(spec), "--json"]
        driver = Driver(arguments, self.folder / f"driver-{number}", self._environment(endpoint))
        self.drivers.append(driver)
        return driver

    def _environment(self, endpoint):
        ray_folder = tempfile.mkdtemp(prefix="sh-")  # Ray's sockets need a short path
        endpoint = endpoint or self.s3_server
        return os.environ | KEYS | {"AWS_ENDPOINT_URL": endpoint, "RAY_TMPDIR": ray_folder}

    def verify(self, uri):
        """Exit code and output of `stillhouse verify`."""
        done = subprocess.run(
            [STILLHOUSE, "verify", uri, "--sample", "8", "--json"],
            capture_output=True,
            text=True,
            env=self._environment(None),
            timeout=PATIENCE_S,
        )
        return done.returncode, done.stdout

    def keys(self, bucket):
        """The keys of everything in a bucket."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def objects(self, bucket):
        """Everything in a bucket: bytes by key."""
        keys = self.keys(bucket)
        return {k: self.s3.get_object(Bucket=bucket, Key=k)["Body"].read() for k in keys}

    def contents(self, store):
        """sha256 of everything in a store that two runs must have in common, by path."""
        if store.startswith("s3://"):
            bucket, _, prefix = store.removeprefix("s3://").partition("/")
            found = self.objects(bucket).items()
            all_bytes = {key.removeprefix(f"{prefix}/"): data for key, data in found}
        elif "://" in store:
            paths = [item.path for item in list_objects(store)]
            all_bytes = {path: read_bytes(f"{store}/{path}") for path in paths}
        else:
            files = [path for path in Path(store).rglob("*") if path.is_file()]
            all_bytes = {str(p.relative_to(store)): p.read_bytes() for p in files}
        return {
            path: hashlib.sha256(data).hexdigest()
            for path, data in all_bytes.items()
            if path.startswith(SAME_BYTES)
        }

    def close(self):
        """Nothing outlives the test."""
        for driver in self.drivers:
            if driver.process.poll() is None:
                driver.kill()
                driver.process.wait()
            shutil.rmtree(driver.ray_folder, ignore_errors=True)
