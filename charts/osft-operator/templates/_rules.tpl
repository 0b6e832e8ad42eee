{{/*
Says yes when there is an admission policy, and nothing else. ValidatingAdmissionPolicy came with 1.30;
an older server would refuse the whole release.
*/}}
{{- define "osft-operator.authorsAreAsked" -}}
{{- if and .Values.admissionPolicy.enabled (semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version) }}yes{{ end }}
{{- end }}

{{/*
What the operator may do where it works, and nothing it does not do: no secrets, no exec, no
wildcards, no update of whole objects. The same rules for a ClusterRole and for a namespace's Role.
*/}}
{{- define "osft-operator.rules" -}}
- apiGroups: [osft.dev]
  resources: [osftjobs]
  # delete: ttlSecondsAfterFinished.
  verbs: [get, list, watch, delete]
- apiGroups: [osft.dev]
  resources: [osftjobs/status]
  verbs: [patch]
- apiGroups: [osft.dev]
  resources: [osftjobs/finalizers]
  # Clusters with OwnerReferencesPermissionEnforcement ask for it (blockOwnerDeletion on children).
  verbs: [update]
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  # Exit codes and termination messages.
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, create]
- apiGroups: [""]
  resources: [events]
  # list: why a job has no pods.
  verbs: [list, create, patch]
{{- if .Values.kueue.enabled }}
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  # Why a job waits in its queue.
  verbs: [list]
{{- end }}
{{- end }}
