"""What a submitted job runs on the cluster, in the sent folder.

python -m stillhouse.jobs.entry JOB_ID
"""

import json
import os
import sys
from pathlib import Path

from stillhouse.jobs import supervised
from stillhouse.jobs.cli import main


def warn_of_versions() -> None:
    """Name the libraries of this image that differ from those that the project is tested with."""
    from stillhouse.jobs.package import VERSIONS_FILE, installed_versions, version_differences

    tested = json.loads(Path(VERSIONS_FILE).read_text())
    differing = version_differences(tested, installed_versions())
    if differing:
        print(f"warning: the cluster's image has {', '.join(differing)}", file=sys.stderr)


if __name__ == "__main__":
    supervised.supervise()  # before anything that is imported starts a thread
    from stillhouse.jobs.package import SPEC_FILE
    from stillhouse.jobs.run import SUBMISSION_VARIABLE

    warn_of_versions()
    os.environ[SUBMISSION_VARIABLE] = sys.argv[1]
    sys.argv = ["stillhouse", "run", SPEC_FILE]
    main()
