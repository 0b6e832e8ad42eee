"""Random OSFTJobs: a valid one with a few fields set to what the schema allows, or to hostile text.

Called by test_fuzz. Everything is drawn from the CRD's schema, so a new field is tried by itself;
quantities, numbers, times and depths also at the edges of what the API server takes.
"""

from __future__ import annotations

import re
from typing import Any

from hypothesis import strategies as st

from job_samples import Object, job
from osft_operator import crd
from osft_operator.resources import QUANTITY_PATTERN

HOSTILE = [
    "$(HF_TOKEN)",
    "$$(HF_TOKEN)",
    "`id`",
    "$(id); rm -rf / #",
    "a' || touch /tmp/x || '",
    "../../etc/passwd",
    "/checkpoints/../other",
    "/checkpoints/./a//b",
    "..",
    "a\nb: c",
    "- x\n---\nkind: Secret",
    "{{ .Values.secret }}",
    "${jndi:ldap://x}",
    "--attempt=99",
    "--run-id=other",
    "\u202egnp.exe",
    "\x00",
    "\x1b[31m",
    "grüße-日本語",
    "null",
    "~",
    "",
    " ",
    "x" * 3000,
    "kube-system/secret",
    "osft.dev/job",
]
"""Text that has done harm somewhere."""
FREE = [
    {},
    {"nodeSelector": {"gpu": "a"}},
    {"tolerations": [{"operator": "Exists"}]},
    {"hostNetwork": True},
    {"containers": [{"name": "pytorch", "securityContext": {"privileged": True}}]},
    {"volumes": [{"name": "h", "hostPath": {"path": "/"}}]},
    {"serviceAccountName": "admin"},
]
"""For what the schema leaves open: parts of a pod, good and bad."""

QUANTITIES = [
    "500m", "16Gi", "0", "1", ".5", "5.", "+1", "1.5k", "2000m", "0.5", "0.1", "1e3", "1E", "1e-9",
    "1e17", "1e18", "1e-99", "1e-100", "7Ei", "8Ei", "7.9E", "9E", "999999999999999999", "1e999",
    "9223372036854775807", "9223372036854775808", "1e-999", "0e999", "1e2147483648", "9e99", "1n",
    "1e99999999999999999999999999999", "000000000000000000000001", "-1", "1 Gi", "1i", "nonsense",
]  # fmt: skip
"""Around the bounds of what Kubernetes can count, and what is no quantity."""
WHOLE_NUMBERS = [0, 1, -1, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1]
FLOATS = [0.0, -0.0, 5e-324, 1e-320, 1.7e308, 1e15, 1e21, 0.1 + 0.2]
TIMES = [
    "2026-01-01T00:00:00Z", "2026-01-01t00:00:00.123456789012z", "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-01-01T00:00:00+99:99",
    "2026-02-29T00:00:00Z", "2026-01-01T00:00:60Z", "soon",
]  # fmt: skip
DEPTHS = [33, 40, 100, 300, 600]
"""Levels of a free part, where all of an OSFTJob may have 32."""

Path = tuple[str, ...]


def _leaves(schema: Object, path: Path) -> list[tuple[Path, Object]]:
    """Every field below a schema, objects also as a whole."""
    found = []
    for name, child in schema.get("properties", {}).items():
        found.append(((*path, name), child))
        found += _leaves(child, (*path, name))
    return found


FIELDS = _leaves(crd.schema()["properties"]["spec"], ("spec",))


def values(schema: Object) -> st.SearchStrategy[Any]:
    """What a schema allows, as far as a schema says it."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "x-kubernetes-int-or-string" in schema:
        return st.one_of(st.sampled_from(QUANTITIES), st.sampled_from([8, *WHOLE_NUMBERS]))
    match schema.get("type"):
        case "string":
            return _texts(schema)
        case "integer":
            low, high = schema.get("minimum", 0), schema.get("maximum", 2**31 - 1)
            near = st.integers(low, min(high, low + 1000))
            return st.one_of(near, near, st.just(high), st.sampled_from(WHOLE_NUMBERS))
        case "number":
            return _numbers(schema)
        case "boolean":
            return st.booleans()
        case "array":
            least = schema.get("minItems", 0)
            most = min(schema.get("maxItems", 3), max(3, least))
            return st.lists(values(schema["items"]), min_size=least, max_size=most)
        case "object":
            return _objects(schema)
    return st.none()


def _texts(schema: Object) -> st.SearchStrategy[str]:
    longest = schema.get("maxLength", 64)
    if schema.get("format") == "date-time":
        return st.sampled_from(TIMES)
    if schema.get("pattern") == QUANTITY_PATTERN:
        return st.sampled_from(QUANTITIES)
    if "pattern" in schema:
        pattern = re.compile(schema["pattern"], re.ASCII)
        good = st.from_regex(pattern, fullmatch=True).map(lambda text: text.rstrip("\n"))
        good = good.filter(lambda text: len(text) <= longest)
    else:
        good = st.text("abcXYZ019-_./ ", min_size=schema.get("minLength", 0), max_size=20)
    return st.one_of(good, good, st.sampled_from(HOSTILE))


def _numbers(schema: Object) -> st.SearchStrategy[float]:
    ordinary = st.floats(
        schema.get("minimum", -1e6),
        schema.get("maximum", 1e6),
        exclude_min=schema.get("exclusiveMinimum", False),
        exclude_max=schema.get("exclusiveMaximum", False),
        allow_nan=False,
        allow_infinity=False,
    )
    return st.one_of(ordinary, ordinary, st.sampled_from(FLOATS), st.sampled_from(WHOLE_NUMBERS))


def _objects(schema: Object) -> st.SearchStrategy[Any]:
    if isinstance(inner := schema.get("additionalProperties"), dict):
        keys = st.sampled_from(["a", "cpu", "nvidia.com/gpu", "osft.dev/job"])
        return st.dictionaries(keys, values(inner), max_size=2)
    if "properties" not in schema:
        return st.one_of(st.sampled_from(FREE), st.sampled_from(DEPTHS).map(nested))
    required = schema.get("required", [])
    optional = [name for name in schema["properties"] if name not in required]
    fields = {name: values(child) for name, child in schema["properties"].items()}
    return st.lists(st.sampled_from(optional or ["-"]), max_size=2, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries(
            {name: fields[name] for name in [*required, *chosen] if name in fields}
        )
    )


def nested(levels: int) -> Object:
    """An object that is so deep."""
    made: Object = {}
    for level in range(levels - 1):
        made = {"a": made if level % 3 else [made]}
    return made


def statuses() -> st.SearchStrategy[Object]:
    """A status that the API server takes, whoever wrote it; it need make no sense."""
    return values(crd.schema()["properties"]["status"])


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Object, list[Path]]:
    """An OSFTJob, and which fields are not those of the minimal one."""
    body, touched = job(), []
    for _ in range(draw(st.integers(0, 3))):
        path, schema = draw(st.sampled_from(FIELDS))
        place = body
        for part in path[:-1]:
            inner = place.get(part)
            if not isinstance(inner, dict):
                inner = place[part] = {}
            place = inner
        place[path[-1]] = draw(values(schema))
        touched.append(path)
    return body, touched
