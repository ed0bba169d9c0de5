"""The names under which Ray exports a job's metrics, for the tests that look for them."""

from stillhouse.actors.metrics import METRICS


def exported_names(name):
    """What Prometheus sees of one of METRICS."""
    ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return [f"ray_{name}{end}" for end in ends[METRICS[name].kind]]
