import re
from base64 import b64encode

from stillhouse.report.data import Curve, HealthWarning
from stillhouse.report.distill import (
    ClassRow,
    DistillReport,
    OtherSet,
    SetRow,
    Stage,
    StepRow,
    from_json,
    render_distill,
    to_json,
)

PNG = b64encode(b"\x89PNG").decode()


def report(method="mtt", images_per_class=2, shown=2, hostile="", **changes):
    rows = [SetRow(method.upper(), images_per_class, 662, [0.6, 0.7], 3.0)]
    stages = [Stage(0, [PNG] * 2), Stage(40, [PNG] * 2)] if method == "mtt" else []
    fields = {
        "title": f"A set{hostile}",
        "created": "2026-11-21T09:00:00+00:00",
        "run_uri": "/store/runs/a",
        "method": method,
        "network": f"convnet-3{hostile}",
        "images_per_class": images_per_class,
        "num_classes": 2,
        "num_train": 1295,
        "image_side": 8,
        "image_bytes": 652,
        "began": method in ("mtt", "nrr_dd"),
        "label_bytes": 10,
        "learning_rate": None,
        "iteration": 40,
        "validation": [0.6],
        "rows": [*rows, SetRow("random real", images_per_class, 650, [0.5, 0.4], None)],
        "networks": [SetRow(n + hostile, 2, 662, [0.6, 0.7], None) for n in ("a", "b")],
        "classes": [ClassRow(f"class {i}{hostile}", [PNG], [PNG] * shown) for i in range(2)],
        "stages": stages,
        "losses": [Curve("synthetic", 0, [(1.0, 5.0), (2.0, 4.0)])],
        "accuracy": [],
        "experts": [],
        "steps": [],
        "peak_bytes": None,
        "warnings": [],
        "spec_yaml": "job: distill",
        "artifacts": [],
        "environment": [],
        "num_images": 2 * images_per_class,
    }
    return DistillReport(**fields | changes)


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))


def test_a_matching_page_says_what_its_loss_means():
    said = text_of(render_distill(report()))
    assert "Matching loss: 1 is no progress" in said
    assert "The same set, made with convnet-3." in said
    assert "1,295 images became 4." in said
    assert "they began as beneath." in said


def test_a_decoupled_page_names_its_teachers_and_no_matching_loss():
    said = text_of(render_distill(report("infer", num_images=9)))
    assert "Loss of the first of the units" in said and "no progress" not in said
    assert "taught by convnet-3." in said
    assert "became 9, in the room of 4." in said


def test_pictures_that_are_not_all_are_said_to_be_the_first_ones():
    said = text_of(render_distill(report(images_per_class=50, shown=10)))
    assert "beneath; the first 10 of each class." in said


def test_one_image_a_class_says_what_stands_beside_it():
    one = {"images_per_class": 1, "shown": 1}
    assert "what 40 updates made of it." in text_of(render_distill(report(**one)))
    said = text_of(render_distill(report("rded", **one, num_classes=120)))
    assert "Small, a real image of each class; large, the one that was made." in said
    assert "they began as beneath" in text_of(render_distill(report("nrr_dd")))
    assert "The first 2 of 120 classes." in said


def test_other_networks_show_the_controls_beside_the_set():
    control = [SetRow(name, 2, 650, [0.5, 0.4 - i / 10], None) for i, name in enumerate("ab")]
    page = render_distill(report(control_networks=[control]))
    table = page[page.index('<section id="networks">') : page.index('<section id="cost">')]
    assert "beside the same controls." in text_of(table)
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    shown = [[text_of(cell).split(" ±")[0] for cell in row] for row in cells]
    assert shown == [
        ["Network", "MTT", "random real"],
        ["a", "65.0", "45.0"],
        ["b", "65.0", "40.0"],
    ]
    assert "beside the same controls" not in text_of(render_distill(report()))


def test_other_sets_of_the_same_images_are_a_table():
    others = [OtherSet("DATM", 10, 80_412, 0.785, 0.003, "p1, 300 epochs", 65.0, "c" * 64)]
    page = render_distill(report(others=others, judged_by="p1, 300 epochs"))
    table = page[page.index('<section id="others">') : page.index('<section id="networks">')]
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in table.split("<tr")[2:]]
    shown = [[text_of(cell) for cell in row] for row in cells]
    judged = "p1, 300 epochs"
    assert shown == [
        ["MTT, this one", "2", "662", "65.0 ± 7.1", judged, "3.0 s", ""],
        ["DATM", "10", "80.4 k", "78.5 ± 0.3", judged, "1 min 05 s", "cccccccc"],
    ]
    assert '<section id="others">' not in render_distill(report())


def test_keys_in_warnings_are_code_and_nothing_else_is_markup():
    warning = HealthWarning("`a <b>` is\0 low.", "Raise `method.num_iterations`, or <i>.")
    page = render_distill(report(warnings=[warning]))
    assert "<strong><code>a &lt;b&gt;</code> is\u2400 low.</strong>" in page
    assert "Raise <code>method.num_iterations</code>, or &lt;i&gt;." in page


def test_names_are_text_and_json_comes_back():
    data = report(hostile="<script>")
    assert "<script>" not in render_distill(data)
    assert from_json(to_json(data)) == data


def test_steps_that_cost_nothing_show_no_zeros():
    steps = [
        StepRow("experts", 10, 10, 0.0, 0.0),
        StepRow("distil", 3, 1, 61.0, 122.0),
        StepRow("evaluate", 6, 0, 30.0, 0.0),
    ]
    page = render_distill(report(steps=steps))
    table = page[page.index('<section id="cost">') : page.index("</tfoot>")]
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in table.split("<tr")[2:]]
    assert [[text_of(cell) for cell in row] for row in cells] == [
        ["experts reused", "10", "–", "–"],
        ["distil 1 reused", "3", "1 min 01 s", "2 min 02 s"],
        ["evaluate", "6", "30 s", "–"],
        ["This run", "", "1 min 31 s", "2 min 02 s"],
    ]
