"""Dataset distillation: memory, time and exactness of the adjoint, experts an hour, quality.

    python benchmarks/distillation.py --stage memory,time,tesla --dir FOLDER --json OUT
    python benchmarks/distillation.py --stage experts --dir FOLDER --json OUT
    python benchmarks/distillation.py --stage quality --dir FOLDER --data FASHION

`memory` measures each number of inner steps in a process of its own; `quality` runs the job's
pipeline in one process on one thread and keeps every expert, set and evaluation in FOLDER/store, so
that a killed run goes on where it was. It says "no difference" where two means are within two
standard errors of their difference.
"""

import argparse
import gzip
import io
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from distillation_cells import BASE, CELLS
from numpy.typing import NDArray
from PIL import Image
from processes import in_fresh_process, memory_mb

from stillhouse.distillation.adjoint import Descent, FlatModule, adjoint, descend
from stillhouse.distillation.matching import Match, matching_objective
from stillhouse.models.device import initialised
from stillhouse.models.networks import ConvNet

STEPS = (1, 4, 10, 20, 50)
CLASSES, WIDTH, IMAGES = 10, 32, 10
NO_POOLS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed memory goes back at once, so that the peak is what was needed."""


def problem(images: int, width: int, eta: float) -> tuple[Descent, torch.Tensor, Any, list[Any]]:
    """A matching problem on 28x28 images: descent, start, objective, leaves."""
    network = FlatModule(
        initialised(
            lambda: ConvNet(num_channels=1, image_size=28, num_classes=CLASSES, width=width), 0
        )
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 1, 28, 28, generator=generator).requires_grad_()
    labels = torch.arange(images) % CLASSES
    start = network.parameters()
    target = start + 0.01 * torch.randn(len(start), generator=generator)

    def loss(_step: int, theta: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(theta, pixels), labels)

    def objective(num_steps: int) -> Any:
        return matching_objective(start, [Match(num_steps, target)])

    return Descent(loss, torch.tensor(eta)), start, objective, [pixels]


def gradient(way: str, num_steps: int, eta: float = 0.01, width: int = WIDTH) -> torch.Tensor:
    """The gradient of the images by one of the ways."""
    descent, start, objective, leaves = problem(IMAGES, width, eta)
    if way == "unrolled":
        sys.path.append(str(Path(__file__).parents[1] / "tests"))
        from unrolled import unrolled

        return unrolled(descent, start, num_steps, objective(num_steps), leaves).leaves[0]
    run = descend(descent, start, num_steps)
    found = adjoint(
        descent, run.states, objective(num_steps), leaves, first_order=way == "first order"
    )
    return found.leaves[0]


def peak(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory above what one step has touched, MB; in a fresh process."""
    torch.set_num_threads(1)
    base = memory_mb("VmRSS")
    gradient(options.way, options.steps)
    return {"peak_mb": memory_mb("VmHWM") - base}


def memory() -> dict[str, Any]:
    """Peaks of adjoint and full unroll by number of inner steps, and what the target asks."""
    found: dict[str, Any] = {}
    parameters_mb = (
        4
        * FlatModule(
            ConvNet(num_channels=1, image_size=28, num_classes=CLASSES, width=WIDTH)
        ).num_parameters
        / 1e6
    )
    for steps in STEPS:
        for way in ("adjoint", "unrolled"):
            made = in_fresh_process(__file__, "--way", way, "--steps", str(steps), **NO_POOLS)
            found[f"{way}, N = {steps}, MB"] = round(made["peak_mb"], 1)
    stored = 40 * parameters_mb
    allowed = 1.1 * found["adjoint, N = 10, MB"] + stored
    found["N = 50 over 1.1 x N = 10 plus stored parameters"] = (
        found["adjoint, N = 50, MB"] / allowed
    )
    return found


def timing() -> dict[str, Any]:
    """CPU seconds of an outer gradient on one thread, medians of five side by side; both agree."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for steps in (4, 10, 20):
        seconds: dict[str, list[float]] = {"adjoint": [], "unrolled": []}
        for _ in range(5):
            for way, times in seconds.items():
                started = time.process_time()
                gradient(way, steps)
                times.append(time.process_time() - started)
        ratio = statistics.median(seconds["adjoint"]) / statistics.median(seconds["unrolled"])
        found[f"adjoint over unroll, N = {steps}"] = round(ratio, 3)
        found[f"adjoint, N = {steps}, CPU s"] = round(statistics.median(seconds["adjoint"]), 3)
    one, two = gradient("adjoint", 10), gradient("unrolled", 10)
    found["relative difference, float32, N = 10"] = float((one - two).norm() / two.norm())
    return found


def tesla() -> dict[str, Any]:
    """Cosine of TESLA's gradient to the exact one."""
    found: dict[str, Any] = {}
    for eta in (0.01, 0.05):
        for steps in (1, 4, 10, 20, 50):
            exact, first = (gradient(w, steps, eta, width=8) for w in ("adjoint", "first order"))
            cosine = torch.nn.functional.cosine_similarity(exact.flatten(), first.flatten(), dim=0)
            found[f"eta {eta}, N = {steps}"] = round(float(cosine), 4)
    return found


class _Quiet:
    """A listener that says nothing."""

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """Nothing."""

    def advance(self, step: str, done: float, amount: float) -> None:
        """Nothing."""

    def end(self, step: str, seconds: float) -> None:
        """Nothing."""

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Nothing."""


def image_source(folder: Path, data: str, num_images: int) -> dict[str, Any]:
    """A spec's `data`: digits, or files; a folder of IDX files becomes Parquet in `folder`."""
    if data == "digits":
        return {"dataset": data}
    for part, stem in (("train", "train"), ("test", "t10k")):
        made = folder / "images" / f"{part}.parquet"
        for images in Path(data).glob(f"{stem}-images-idx3-ubyte*"):
            labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
            if not made.exists():
                made.parent.mkdir(parents=True, exist_ok=True)
                cells = [encoded(pixels) for pixels in read_idx(images)]
                pq.write_table(pa.table({"image": cells, "label": read_idx(labels)}), made)
    return {"path": str(made.parent if made.exists() else data), "num_images": num_images}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Unsigned bytes in the IDX format: [N, H, W] or [N]."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of [H, W]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def run_cell(folder: Path, data: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """One job; everything that an earlier run finished is found."""
    from stillhouse.distillation.spec import DistillSpec
    from stillhouse.jobs.run import run_job

    content = BASE | {"store": str(folder / "store"), "data": data} | cell
    return run_job(DistillSpec.model_validate(content), _Quiet())


def distil_here(ctx: Any, task: Any, host: Any) -> list[Any]:
    """`stillhouse.pipelines.distill.distil` in this process."""
    from stillhouse.distillation.matching_task import run_matching

    reused = len(ctx.store.finished(task.KIND, task.names))
    with ctx.step("distil", total=len(task.names), reused=reused, unit="iterations"):
        if reused < len(task.names):
            run_matching(host.build(ctx.store), task)
    done = ctx.store.finished(task.KIND, task.names)
    return [done[name] for name in task.names]


def run_here(folder: Path, data: dict[str, Any], cell: dict[str, Any]) -> tuple[Any, Any]:
    """One job's pipeline in this process, on one thread and without Ray: context and outcome."""
    import stillhouse.pipelines.distill as pipeline
    from stillhouse.distillation.spec import DistillSpec
    from stillhouse.jobs.distill import DistillationJob
    from stillhouse.pipelines import steps
    from stillhouse.pipelines.context import Context
    from stillhouse.storage.artifact import Store
    from stillhouse.storage.task import commit

    hosts: list[Any] = []

    def done_here(ctx: Any, step: Any, todo: list[Any]) -> Any:
        if not hosts:
            hosts.append(step.host.build(ctx.store))
        for task in todo:
            started = time.perf_counter()
            made = task.run(ctx.store, hosts[0], None)
            yield commit(ctx.store, task, made), time.perf_counter() - started

    pipeline.distil, steps._done = distil_here, done_here
    torch.set_num_threads(1)
    content = BASE | {"store": str(folder / "store"), "data": data} | cell
    spec = DistillSpec.model_validate(content)
    store = Store(spec.store)
    ctx = Context(store, spec.compute, _Quiet())
    job = DistillationJob(spec).open(store, remember=True)
    return ctx, pipeline.run_distill(ctx, spec, job.inputs)


def quality(folder: Path, data: str, cells: list[str], num_images: int) -> dict[str, Any]:
    """Test accuracy of each cell beside random real images of equal bytes."""
    found: dict[str, Any] = {}
    source = image_source(folder, data, num_images)
    for name in cells:
        ctx, made = run_here(folder, source, CELLS[name])
        best, (random,) = next(iter(made.tests.values())), made.controls
        found[name] = {
            "bytes": made.stored.total,
            "label bytes": made.stored.labels,
            "random real bytes": random.num_bytes,
            "random real images a class": random.images_per_class,
            "accuracies": [round(a, 4) for a in best.accuracies],
            "random real accuracies": [round(a, 4) for a in random.tested.accuracies],
            "over random real": compared(best.accuracies, random.tested.accuracies),
            "validation": round(statistics.fmean(made.best.validation), 4),
            "iteration": made.best.iteration,
            "learning rate": made.best.learning_rate,
            "experts or teachers, last loss": [round(one[-1], 4) for one in made.made.guide_losses],
            "seconds": {n: round(w.seconds, 1) for n, w in ctx.work.items()},
        }
        print(json.dumps({name: found[name]}), flush=True)
    return found | {
        f"{one} over {two}": compared(found[one]["accuracies"], found[two]["accuracies"])
        for one, two in PAIRS
        if one in found and two in found
    }


PAIRS = (
    ("ast, 1", "mtt, 1"),
    ("ast, 1, long", "mtt, 1, long"),
    ("ast, 10", "mtt, 10"),
    ("ast, 10, unbalanced", "mtt, 10"),
    ("datm, 10", "mtt, 10"),
    ("infer, 10", "sre2l, 11"),
    ("nrr_dd, 10", "rded, 10"),
    ("nrr_dd, 10", "rded, views, 10"),
)


def compared(one: Sequence[float], two: Sequence[float]) -> str:
    """Points of accuracy between two means, and two standard errors of the difference."""
    gap = statistics.fmean(one) - statistics.fmean(two)
    error = sqrt(sum(statistics.variance(given) / len(given) for given in (one, two)))
    verdict = "differs" if abs(gap) > 2 * error else "no difference"
    return f"{100 * gap:+.1f} points, two standard errors {200 * error:.1f}: {verdict}"


def experts(folder: Path, data: str, num_images: int) -> dict[str, Any]:
    """Experts an hour of two actors, and of one bare loop with the same threads."""
    script = (
        "import sys, time, torch\n"
        "from stillhouse.distillation.experts import ExpertTask\n"
        "from stillhouse.storage.artifact import Store\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "import distillation as b\n"
        "print(b.bare(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))\n"
    )
    command = [sys.executable, "-c", script, str(folder), data, str(num_images)]
    bare_s = float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])
    started = time.perf_counter()
    cell = {
        "method": {"name": "mtt", "images_per_class": 1, "num_iterations": 1, "num_steps": 1},
        "experts": {"count": 8, "epochs": 3, "seed": int(started * 1000) % 2**30},
        "evaluate": {"seeds": 1, "epochs": 1},
        "controls": [],
    }
    source = image_source(folder, data, num_images)
    result = run_cell(folder, source, cell)
    busy = result["cost"]["device_seconds"]["experts"]
    return {
        "bare loop, s an expert": bare_s,
        "two actors, busy s an expert": busy / 8,
        "busy ratio": bare_s / (busy / 8),
    }


def bare(folder: Path, data: str, num_images: int) -> float:
    """Seconds an expert in one loop of this process."""
    from stillhouse.distillation.experts import ExpertTask, resolved
    from stillhouse.distillation.image_sources import ImageData
    from stillhouse.distillation.prepared import ImageHostSettings, ImagesTask, Preparation
    from stillhouse.distillation.recipes import DSA_GROUPS
    from stillhouse.distillation.spec import ExpertSettings
    from stillhouse.models.network_settings import NetworkSettings
    from stillhouse.storage.artifact import Store

    given = Preparation("0" * 64, False)
    store = Store(str(folder / f"bare-{os.getpid()}"))
    host = ImageHostSettings(given).build(store)
    source = image_source(folder, data, num_images)
    ImagesTask(given, ImageData.model_validate(source)).run(store, host)
    assert host.prepared  # loaded before the clock starts
    network = NetworkSettings.model_validate(BASE["network"])
    started = time.perf_counter()
    for seed in range(2):
        settings = resolved(ExpertSettings(epochs=3, seed=seed))
        ExpertTask(given, network, settings, DSA_GROUPS, (0, 1, 2, 3)).run(store, host)
    return (time.perf_counter() - started) / 2


def main() -> None:
    """The stages that were asked for, each printed as it is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", default="memory,time,tesla")
    parser.add_argument("--dir", type=Path, default=Path("bench_files"))
    parser.add_argument("--data", default="digits")
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--cells", default=";".join(CELLS), help="separated by ;")
    parser.add_argument("--json", type=Path)
    for hidden in ("--way", "--steps"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        options.steps = int(options.steps)
        print(json.dumps(peak(options)))
        return
    folder, cells = options.dir.resolve(), options.cells.split(";")
    stages = {
        "memory": memory,
        "time": timing,
        "tesla": tesla,
        "experts": lambda: experts(folder, options.data, options.num_images),
        "quality": lambda: quality(folder, options.data, cells, options.num_images),
    }
    found: dict[str, Any] = {}
    for stage in options.stage.split(","):
        found[stage] = stages[stage]()
        print(json.dumps({stage: found[stage]}, indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
