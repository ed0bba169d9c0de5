"""A script: a head without CPUs whose autoscaler starts nodes on this machine; until it is killed.

`ray.cluster_utils.AutoscalingCluster` stops every other Ray of the machine first, so this does what
it does without that: Ray's fake node provider, version 2 of the autoscaler (KubeRay's).
"""

import json
import os
import signal
import sys
from pathlib import Path

HEAD_ID = "f" * 51 + "00000"  # what the fake provider takes the head for
LISTS = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray")


def configuration(gcs, node, count):
    """Up to `count` nodes with the resources `node`; idle ones go after six seconds."""
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "fake",
        "max_workers": count,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10.0,
        "provider": {  # as `external`: the wheel lacks the defaults of `fake_multinode`
            "type": "external",
            "module": module,
            "gcs_address": gcs,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": node | {"object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": count,
            },
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "worker_start_ray_commands": [],
        **{f"{name}_commands": [] for name in LISTS},
    }


def main():
    folder, port, node, count = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    os.environ |= {  # before Ray is imported
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    import ray
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    address = f"{ray.util.get_node_ip_address()}:{port}"
    path = folder / "cluster.json"
    path.write_text(json.dumps(configuration(address, json.loads(node), count)))
    parameters = RayParams(
        gcs_server_port=port,
        num_cpus=0,
        num_gpus=0,
        object_store_memory=100_000_000,
        include_dashboard=False,
        temp_dir=str(folder),
        autoscaling_config=str(path),
    )
    Node(parameters, head=True, shutdown_at_exit=True, spawn_reaper=False)
    print(address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
