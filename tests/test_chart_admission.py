"""The chart's admission policy: who may create OSFTJobs, in the words of the API server's own CEL.

Evaluated here by a CEL interpreter that asks a table for the author's rights, with the OSFTJobs of
job_samples; on a server that is new enough, by the server itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cel
import pytest
import yaml

import job_samples
from chart_release import installed
from chart_rendering import only, render
from cluster.api import Api, ApiError, wait_for
from cluster.control_plane import ControlPlane

ACCOUNT = {"spec.podTemplate.spec": {"serviceAccountName": "builder"}}
PYTORCH_JOBS = ("kubeflow.org", "pytorchjobs", "", "create")
BUILDER = ("", "serviceaccounts", "builder", "use")

Right = tuple[str, str, str, str]


def policy(values: dict[str, Any] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = only(render(values or {}), "ValidatingAdmissionPolicy")["spec"]
    return found


class Author:
    """Somebody's rights in namespace `team`, as the functions that CEL's authorizer has."""

    def __init__(self, *rights: Right) -> None:
        self._rights = rights

    def context(self, job: dict[str, Any], old: dict[str, Any] | None = None) -> cel.Context:
        """What a policy sees of a request."""
        context = cel.Context()
        for part in ("group", "resource", "namespace", "name"):
            context.add_function(part, self._narrowed(part))
        context.add_function("check", lambda asked, verb: {**asked, "verb": verb})
        context.add_function("allowed", self._allowed)
        operation = "UPDATE" if old else "CREATE"
        seen = {"namespace": "team", "operation": operation}
        context.update({"authorizer": {}, "request": seen, "object": job, "oldObject": old or {}})
        return context

    @staticmethod
    def _narrowed(part: str) -> Any:
        return lambda asked, value: {**asked, part: value}

    def _allowed(self, asked: dict[str, str]) -> bool:
        assert asked["namespace"] == "team"
        right = (asked["group"], asked["resource"], asked.get("name", ""), asked["verb"])
        return right in self._rights


def denied(author: Author, job: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    """The messages of the validations that refuse a request; none when it is let through."""
    spec, context = policy(), author.context(job, old)
    conditions = [condition["expression"] for condition in spec["matchConditions"]]
    if not all(cel.evaluate(expression, context) for expression in conditions):
        return []
    named = {each["name"]: cel.evaluate(each["expression"], context) for each in spec["variables"]}
    context.update({"variables": named})
    return [
        cel.evaluate(each["messageExpression"], context)
        for each in spec["validations"]
        if not cel.evaluate(each["expression"], context)
    ]


def test_an_author_needs_the_right_to_create_pytorchjobs() -> None:
    assert denied(Author(PYTORCH_JOBS), job_samples.job()) == []
    (message,) = denied(Author(), job_samples.job())
    assert message == (
        "an OSFTJob makes a PyTorchJob, and you may not create pytorchjobs.kubeflow.org in "
        "namespace team: ask for that right"
    )


def test_a_service_account_must_be_the_authors_to_use() -> None:
    body = job_samples.job(ACCOUNT)
    assert denied(Author(PYTORCH_JOBS, BUILDER), body) == []
    (message,) = denied(Author(PYTORCH_JOBS), body)
    assert "may not `use` the service account builder" in message
    other = ("", "serviceaccounts", "other", "use")
    assert len(denied(Author(PYTORCH_JOBS, other), body)) == 1
    assert denied(Author(PYTORCH_JOBS), job_samples.job({"spec.podTemplate.spec": {}})) == []
    assert denied(Author(PYTORCH_JOBS), job_samples.job({"spec.podTemplate": {}})) == []


def test_a_change_of_the_spec_is_judged_and_a_label_is_not() -> None:
    old = job_samples.job()
    assert denied(Author(), job_samples.job(labels={"a": "b"}), old) == []
    assert len(denied(Author(), job_samples.job({"spec.suspend": True}), old)) == 1
    assert len(denied(Author(PYTORCH_JOBS), job_samples.job(ACCOUNT), old)) == 1


def test_the_policy_is_bound_and_matches_osftjobs_only() -> None:
    objects = render({"watch": {"namespaces": ["team"]}})
    found = only(objects, "ValidatingAdmissionPolicy")
    (rule,) = found["spec"]["matchConstraints"]["resourceRules"]
    assert (rule["apiGroups"], rule["resources"]) == (["osft.dev"], ["osftjobs"])
    assert rule["operations"] == ["CREATE", "UPDATE"]
    binding = only(objects, "ValidatingAdmissionPolicyBinding")["spec"]
    assert binding["policyName"] == found["metadata"]["name"]
    assert binding["validationActions"] == ["Deny"]
    (where,) = binding["matchResources"]["namespaceSelector"]["matchExpressions"]
    assert where["values"] == ["team"], "other namespaces are none of this release's business"


def test_it_can_be_left_out_and_soft() -> None:
    kinds = {item["kind"] for item in render({"admissionPolicy": {"enabled": False}})}
    assert not {kind for kind in kinds if kind.startswith("ValidatingAdmission")}
    assert policy()["failurePolicy"] == "Fail"
    assert policy({"admissionPolicy": {"failurePolicy": "Ignore"}})["failurePolicy"] == "Ignore"


@contextmanager
def _person(plane: ControlPlane, namespace: str, rules: list[dict[str, Any]]) -> Iterator[Api]:
    """A client with the rights of a service account of its own."""
    name = "person"
    base = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    plane.api.post(base, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    version = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": name}}
    plane.api.post(f"{rbac}/roles", {**version, "kind": "Role", "rules": rules})
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    subjects = [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]
    body = {**version, "kind": "RoleBinding", "roleRef": reference, "subjects": subjects}
    plane.api.post(f"{rbac}/rolebindings", body)
    written = yaml.safe_load(plane.service_account_kubeconfig(namespace, name).read_text())
    yield Api(plane.url, written["users"][0]["user"]["token"], plane.ca)


@pytest.mark.cluster
def test_the_server_refuses_who_may_not_create_pytorchjobs(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    if control_plane.binaries.joined:
        pytest.skip("this server is older than ValidatingAdmissionPolicy (1.30)")
    jobs = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs"
    may = {"apiGroups": ["osft.dev"], "resources": ["osftjobs"], "verbs": ["create"]}
    with (
        installed(control_plane, namespace, tmp_path / "chart"),
        _person(control_plane, namespace, [may]) as person,
    ):

        def refusal() -> str:
            try:
                person.post(f"{jobs}?dryRun=All", job_samples.job(name="run"))
            except ApiError as error:
                return error.message
            return ""

        # the server takes up a new policy within seconds
        words = wait_for("the refusal", refusal)
        assert "you may not create pytorchjobs.kubeflow.org in namespace" in words
        role = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles/person"
        more = {"apiGroups": ["kubeflow.org"], "resources": ["pytorchjobs"], "verbs": ["create"]}
        control_plane.api.patch(role, {"rules": [may, more]})
        wait_for("the permission", lambda: not refusal())
        named = job_samples.job(ACCOUNT, name="run")
        with pytest.raises(ApiError, match="service account builder"):
            person.post(jobs, named)
