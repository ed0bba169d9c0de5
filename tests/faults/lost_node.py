"""A script: a training of four workers on two nodes, one of which is lost. Prints the result."""

import json
import sys

import ray
from ray.cluster_utils import Cluster
from small import Quiet

from stillhouse.jobs.run import run_job
from stillhouse.training.spec import TrainSpec


class Breaker(Quiet):
    """Takes the second node away when the training has got somewhere."""

    def __init__(self, cluster, node):
        super().__init__()
        self.cluster, self.node, self.starts = cluster, node, []

    def note(self, kind, content):
        if kind == "train start":
            self.starts.append(content["workers"])
        if kind == "train point" and content["step"] >= 60 and self.node is not None:
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = None


def main():
    content = json.loads(sys.argv[1])
    cluster = Cluster(
        initialize_head=True,
        connect=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False},
    )
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    breaker = Breaker(cluster, node)
    result = run_job(TrainSpec.model_validate(content), breaker)
    print(json.dumps({"result": result, "starts": breaker.starts}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
