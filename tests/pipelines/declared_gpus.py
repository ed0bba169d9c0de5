"""Jobs on a Ray of this process that declares two GPUs which are not there.

Reads specs as JSON lines; prints for each a line with its `result` or `error`.
"""

import json
import sys

import ray
from small import Quiet

from stillhouse.jobs.kinds import spec_model
from stillhouse.jobs.run import run_job


def main():
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
    )
    for line in sys.stdin:
        try:
            spec = json.loads(line)
            result = run_job(spec_model(spec).model_validate(spec), Quiet())
            said = {"result": result}
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
