"""Random OSFTJobs: a valid one with a few fields set to what the schema allows, or to hostile text.

Called by test_fuzz. Everything is drawn from the CRD's schema, so a new field is tried by itself.
"""

from __future__ import annotations

import re
from typing import Any

from hypothesis import strategies as st

from job_samples import Object, job
from osft_operator import crd

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
        return st.sampled_from([1, 8, "500m", "16Gi", "nonsense"])
    match schema.get("type"):
        case "string":
            return _texts(schema)
        case "integer":
            low, high = schema.get("minimum", 0), schema.get("maximum", 2**31 - 1)
            return st.one_of(st.integers(low, min(high, low + 1000)), st.just(high))
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
    if "pattern" in schema:
        pattern = re.compile(schema["pattern"], re.ASCII)
        good = st.from_regex(pattern, fullmatch=True).map(lambda text: text.rstrip("\n"))
        good = good.filter(lambda text: len(text) <= longest)
    else:
        good = st.text("abcXYZ019-_./ ", min_size=schema.get("minLength", 0), max_size=20)
    return st.one_of(good, good, st.sampled_from(HOSTILE))


def _numbers(schema: Object) -> st.SearchStrategy[float]:
    return st.floats(
        schema.get("minimum", -1e6),
        schema.get("maximum", 1e6),
        exclude_min=schema.get("exclusiveMinimum", False),
        exclude_max=schema.get("exclusiveMaximum", False),
        allow_nan=False,
        allow_infinity=False,
    )


def _objects(schema: Object) -> st.SearchStrategy[Any]:
    if isinstance(inner := schema.get("additionalProperties"), dict):
        keys = st.sampled_from(["a", "cpu", "nvidia.com/gpu", "osft.dev/job"])
        return st.dictionaries(keys, values(inner), max_size=2)
    if "properties" not in schema:
        return st.sampled_from(FREE)
    required = schema.get("required", [])
    optional = [name for name in schema["properties"] if name not in required]
    fields = {name: values(child) for name, child in schema["properties"].items()}
    return st.lists(st.sampled_from(optional or ["-"]), max_size=2, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries(
            {name: fields[name] for name in [*required, *chosen] if name in fields}
        )
    )


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
