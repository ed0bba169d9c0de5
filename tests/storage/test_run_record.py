import json

from stillhouse.storage.commit import create
from stillhouse.storage.filesystem import list_names, read_bytes
from stillhouse.storage.run_record import RunRecord, event_files, read_json


def events(uri):
    lines = [line for n in event_files(uri) for line in read_bytes(f"{uri}/{n}").splitlines()]
    return [json.loads(line) for line in lines]


def test_record_of_a_run(store):
    record = RunRecord(store, "r")
    record.start("job: select\n", "select")
    record.step("scores", parts=2)
    record.step("scores", done=1)
    record.event("progress", {"done": 1})
    assert read_json(record.uri, "result.json") is None
    record.put_result({"kept": 3})
    record.finish("done")
    assert list_names(record.uri) == [
        "digests.json",
        "events-00000001.jsonl",
        "events-00000002.jsonl",
        "result.json",
        "spec.yaml",
        "status.json",
    ]
    assert [event["event"] for event in events(record.uri)] == ["started", "progress", "done"]
    status = read_json(record.uri, "status.json")
    assert status["steps"] == {"scores": {"parts": 2, "done": 1}}
    assert (status["state"], status["job"], status["error"]) == ("done", "select", None)
    assert read_json(record.uri, "result.json") == {"kept": 3}


def test_two_attempts_lose_no_event(store):
    one, two = RunRecord(store, "r"), RunRecord(store, "r")
    for record in (one, two, one):
        record.event("progress", {"done": 1}, flush=True)
    assert len(event_files(one.uri)) == 3
    attempts = [event["attempt"] for event in events(one.uri)]
    assert attempts[0] == attempts[2] != attempts[1]


def test_next_attempt_goes_on_counting(store):
    RunRecord(store, "r").event("started", {}, flush=True)
    create(store.path("runs/r/events-00000002.jsonl.0123.tmp"), b'{"time"')
    again = RunRecord(store, "r")
    again.finish("failed", "no more disk")
    assert event_files(again.uri) == ["events-00000001.jsonl", "events-00000002.jsonl"]
    assert events(again.uri)[-1]["error"] == "no more disk"


def test_event_whose_answer_was_lost_is_written_once(bucket, proxied):
    from stillhouse.storage.artifact import Store

    record = RunRecord(Store(bucket), "r")
    proxied.rule = lambda n, method, path: (
        "lose answer" if "events" in path and "lose answer" not in proxied.faults else None
    )
    record.event("progress", {}, flush=True)
    assert proxied.faults == ["lose answer"]
    assert len(events(record.uri)) == 1
