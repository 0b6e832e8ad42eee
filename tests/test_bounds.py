"""No depth and no size of an OSFTJob reaches code that calls itself; each is one error in words."""

from __future__ import annotations

import asyncio
import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from job_samples import Object, job
from osft_operator import cli
from osft_operator.bounds import MAX_LEVELS, Excess, excess, read_json
from osft_operator.cache import Cache, trimmed
from osft_operator.handlers import _read_event
from osft_operator.kinds import OSFTJOBS, PYTORCHJOBS
from osft_operator.merge_patch import merge_patch
from osft_operator.queue import Key
from osft_operator.run_policy import RunPolicy
from osft_operator.spec import problems

DEPTHS = [33, 100, 600, 990, 2000, 9900]
"""Around Python's limits of some hundred and of 1,000; the API server takes 10,000."""


def nested(levels: int, kind: str = "both") -> str:
    """JSON that is so deep, in objects, lists or both."""
    opening, closing = {"object": ('{"a":', "}"), "list": ("[", "]"), "both": ('{"a":[', "]}")}[
        kind
    ]
    count = levels // 2 if kind == "both" else levels
    return opening * count + '"[]{}\\""' + closing * count


def deep_job(levels: int, where: str = "podTemplate.spec.affinity") -> str:
    """An OSFTJob with a free part that is so deep, as the API server gives it."""
    body = json.dumps(job({f"spec.{where}": "HERE"}, namespace="n", uid="u", resourceVersion="7"))
    return body.replace('"HERE"', nested(levels))


@pytest.mark.parametrize("levels", DEPTHS)
@pytest.mark.parametrize("kind", ["object", "list", "both"])
def test_json_of_any_depth_is_read(levels: int, kind: str) -> None:
    found = read_json(f'{{"first": 1, "deep": {nested(levels, kind)}, "last": [2, "}}"]}}'.encode())
    assert (found["first"], found["last"]) == (1, [2, "}"])
    assert excess(found) is not None, "that it was deep is seen"


def test_what_is_no_json_is_still_an_error() -> None:
    for text in (nested(2000)[:-3], nested(2000) + "}", "[" * 5000, '{"a'):
        with pytest.raises(ValueError):
            read_json(text)


def test_texts_keep_their_brackets_where_a_document_is_cut() -> None:
    chance = random.Random(1)
    texts = ["".join(chance.choices('[]{}"\\a,:é\n', k=12)) for _ in range(200)]
    found = read_json(f"[{json.dumps(texts)}, {nested(3000)}, {json.dumps(texts)}]")
    assert found[0] == found[2] == texts


@pytest.mark.parametrize("levels", DEPTHS)
@pytest.mark.parametrize("where", ["podTemplate.spec.affinity", "training.lrSchedulerKwargs.a"])
def test_a_deep_job_from_the_server_is_an_error_in_words(levels: int, where: str) -> None:
    """As it comes in a watch and in a list: read, kept, judged, compared."""
    line = f'{{"type":"ADDED","object":{deep_job(levels, where)}}}'
    cache = Cache()
    for body in (_read_event(line)["object"], read_json(deep_job(levels, where))):
        assert cache.put(OSFTJOBS, {**body, "metadata": {**body["metadata"]}}) in (
            Key("n", "sample"),
            None,
        )
        kept = cache.get(OSFTJOBS, "n", "sample")
        assert kept is not None
        (told,) = problems(kept)
        assert told.startswith(f"spec.{where}")
        assert f"more than {MAX_LEVELS} levels deep: write it flatter" in told
        assert RunPolicy.of(kept).max_restarts == 3, "what is made of it is followed all the same"
        assert merge_patch(kept, trimmed(OSFTJOBS, kept)) == {}


def test_managed_fields_repeat_the_depth_and_are_not_read() -> None:
    fields = f'"managedFields": [{{"fieldsV1": {nested(5000)}}}], "name":'
    event = _read_event(f'{{"type":"ADDED","object":{deep_job(9)}}}'.replace('"name":', fields, 1))
    assert "managedFields" not in event["object"]["metadata"]
    assert problems(event["object"]) == []


@pytest.mark.parametrize("size", [131_000, 140_000, 1_400_000])
def test_a_large_pod_template_is_not_kept(size: int) -> None:
    body = job({"spec.podTemplate.metadata.annotations": {"a": "x" * size}}, namespace="n")
    kept = trimmed(OSFTJOBS, body)
    if size < 131_072:
        assert problems(kept) == problems(body) == []
        return
    assert isinstance(kept["spec"]["podTemplate"], Excess)
    assert problems(kept) == problems(body)
    (told,) = problems(kept)
    assert "spec.podTemplate: has 14" in told
    assert "at most 131072 are taken: shorten it" in told


def test_what_an_ordinary_job_has_is_within_bounds() -> None:
    term = {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"] * 50}]}
    affinity = {"nodeAffinity": {"required": {"nodeSelectorTerms": [term] * 50}}}
    assert excess(job({"spec.podTemplate.spec.affinity": affinity})) is None


LAUGHS = "a0: &a0 [x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("spec: {affinity: " + "{a: " * 40 + "1" + "}" * 40 + "}", "levels deep: write it flatter"),
        ("spec: {affinity: " + "{a: " * 600 + "1" + "}" * 600 + "}", "levels deep: write it"),
        ("spec: {affinity: &here {a: *here}}", "levels deep: write it flatter"),
        ("spec:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()), "characters"),
        ("metadata: {labels: {day: 2026-01-01}}", "day: 2026-01-01 is a date to YAML: put it in"),
        ("spec: {1: 2}", "a name must be text: put 1 in quotes"),
        ("spec: {a: .inf}", "a number that is none in JSON"),
        ("spec: {a: !!set {x}}", "to YAML"),
    ],
    ids=["deep", "deeper", "itself", "laughs", "date", "key", "infinite", "set"],
)
@pytest.mark.parametrize("command", ["validate", "render", "plan", "run"])
def test_files_are_refused_in_one_line(
    command: str, template: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "  podTemplate:\n" + "".join(f"    {line}\n" for line in template.splitlines())
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job(), sort_keys=False) + text, encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        cli.main([command, str(file)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    "made",
    [object(), datetime.datetime(2026, 1, 1), (1,), b"x"],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_json_is_named(made: Any) -> None:
    found = excess(job({"spec.podTemplate.spec": {"a": [made]}}))
    assert found is not None
    assert found.startswith("spec.podTemplate.spec.a[0]: ")


class Pages:
    """An API server whose objects are so large that few fit into a page."""

    def __init__(self, sizes: list[int], most: int) -> None:
        self.sizes, self.most, self.longest = sizes, most, 0

    def answer(self, url: str) -> bytes | None:
        """A page; None when it is longer than may be read."""
        query = dict(part.split("=") for part in url.split("?")[1].split("&"))
        start, limit = int(query.get("continue", 0)), int(query["limit"])
        sizes = self.sizes[start : start + limit]
        items: list[Object] = [{"metadata": {"name": str(start + n)}} for n in range(len(sizes))]
        end = start + limit
        metadata = {"continue": str(end)} if end < len(self.sizes) else {}
        if limit > 1 and sum(sizes) > self.most:
            return None
        self.longest = max(self.longest, sum(sizes))
        return json.dumps({"items": items, "metadata": metadata}).encode()


def test_a_list_of_large_objects_is_read_in_smaller_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes import client

    from osft_operator.cluster import Cluster
    from osft_operator.cluster_errors import TooLarge

    server = Pages([1] * 300 + [50] * 40 + [1] * 300 + [200], most=250)

    def raw(_: Cluster, method: str, kind: object, url: str, body: object, whole: bool) -> bytes:
        answer = server.answer(url)
        assert whole == ("limit=1&" in f"{url}&")
        if answer is None:
            raise TooLarge("too large")
        return answer

    monkeypatch.setattr(Cluster, "_raw", raw)
    cluster = Cluster(client.Configuration())
    try:
        found = asyncio.run(cluster.list_all(PYTORCHJOBS, None))
    finally:
        cluster.close()
    assert [item["metadata"]["name"] for item in found.items] == [str(n) for n in range(641)]
    assert server.longest <= 250
