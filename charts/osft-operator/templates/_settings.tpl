{{/*
The operator's settings as environment variables: all of them, so that the pod shows what is in force.
The operator refuses to start on an OSFT_ variable it does not know; tests/test_chart_values.py holds this
list against osft_operator.settings. toJson keeps large numbers out of exponent form and turns an
absent value into null.
*/}}
{{- define "osft-operator.list" -}}
{{- /* an empty variable would mean the operator's default; null is the empty list */ -}}
{{- default "null" (join "," .) | quote }}
{{- end }}

{{- define "osft-operator.settings" -}}
- name: OSFT_TRAINER_IMAGE
  value: {{ include "osft-operator.image" (dict "image" .Values.trainer.image "root" .) | quote }}
- name: OSFT_IMAGE_PULL_POLICY
  value: {{ .Values.trainer.image.pullPolicy | quote }}
- name: OSFT_PYTORCH_JOB_SHAPE
  value: {{ .Values.trainer.pytorchJobShape | quote }}
- name: OSFT_RUN_AS_USER
  value: {{ .Values.trainer.runAsUser | toJson | quote }}
- name: OSFT_RUN_AS_GROUP
  value: {{ .Values.trainer.runAsGroup | toJson | quote }}
- name: OSFT_FS_GROUP
  value: {{ .Values.trainer.fsGroup | toJson | quote }}
- name: OSFT_ALLOWED_IMAGES
  value: {{ include "osft-operator.list" .Values.policy.images }}
- name: OSFT_ALLOWED_SERVICE_ACCOUNTS
  value: {{ include "osft-operator.list" .Values.policy.serviceAccounts }}
- name: OSFT_ALLOWED_NODE_SELECTORS
  value: {{ include "osft-operator.list" .Values.policy.nodeSelectors }}
- name: OSFT_ALLOWED_PRIORITY_CLASSES
  value: {{ include "osft-operator.list" .Values.policy.priorityClasses }}
- name: OSFT_ALLOWED_CAPABILITIES
  value: {{ include "osft-operator.list" .Values.policy.capabilities }}
- name: OSFT_ALLOW_REMOTE_CODE
  value: {{ .Values.policy.trustRemoteCode | toJson | quote }}
- name: OSFT_NAMESPACES
  value: {{ join "," .Values.watch.namespaces | quote }}
- name: OSFT_OPERATOR_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: OSFT_INSTANCE_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: OSFT_LEADER_ELECTION
  value: {{ or .Values.leaderElection.enabled (gt (int .Values.replicas) 1) | toJson | quote }}
- name: OSFT_LEASE_NAME
  value: {{ include "osft-operator.leaseName" . | quote }}
- name: OSFT_LEASE_DURATION_SECONDS
  value: {{ .Values.leaderElection.durationSeconds | toJson | quote }}
- name: OSFT_LEASE_RENEW_SECONDS
  value: {{ .Values.leaderElection.renewSeconds | toJson | quote }}
- name: OSFT_WORKERS
  value: {{ .Values.reconcile.workers | toJson | quote }}
- name: OSFT_API_TIMEOUT_SECONDS
  value: {{ .Values.reconcile.apiTimeoutSeconds | toJson | quote }}
- name: OSFT_BACKOFF_INITIAL_SECONDS
  value: {{ .Values.reconcile.backoffInitialSeconds | toJson | quote }}
- name: OSFT_BACKOFF_MAX_SECONDS
  value: {{ .Values.reconcile.backoffMaxSeconds | toJson | quote }}
- name: OSFT_RESYNC_SECONDS
  value: {{ .Values.reconcile.resyncSeconds | toJson | quote }}
- name: OSFT_KIND_CHECK_SECONDS
  value: {{ .Values.reconcile.kindCheckSeconds | toJson | quote }}
- name: OSFT_WATCH_CHECK_SECONDS
  value: {{ .Values.reconcile.watchCheckSeconds | toJson | quote }}
- name: OSFT_SIDECAR_GRACE_SECONDS
  value: {{ .Values.reconcile.sidecarGraceSeconds | toJson | quote }}
- name: OSFT_KUEUE
  value: {{ .Values.kueue.enabled | toJson | quote }}
- name: OSFT_PROGRESS_POLL_SECONDS
  value: {{ .Values.progress.pollSeconds | toJson | quote }}
- name: OSFT_PROGRESS_WRITE_SECONDS
  value: {{ .Values.progress.writeSeconds | toJson | quote }}
- name: OSFT_PROGRESS_TIMEOUT_SECONDS
  value: {{ .Values.progress.timeoutSeconds | toJson | quote }}
- name: OSFT_PROGRESS_CONCURRENCY
  value: {{ .Values.progress.concurrency | toJson | quote }}
- name: OSFT_BIND_ADDRESS
  value: {{ .Values.probes.bindAddress | quote }}
- name: OSFT_PROBE_PORT
  value: {{ .Values.probes.port | toJson | quote }}
- name: OSFT_METRICS_PORT
  value: {{ .Values.metrics.port | toJson | quote }}
- name: OSFT_METRICS_PER_JOB
  value: {{ .Values.metrics.perJob | toJson | quote }}
- name: OSFT_LOOP_STALL_SECONDS
  value: {{ .Values.probes.loopStallSeconds | toJson | quote }}
- name: OSFT_QUEUE_STALL_SECONDS
  value: {{ .Values.probes.queueStallSeconds | toJson | quote }}
- name: OSFT_WATCH_STALL_SECONDS
  value: {{ .Values.probes.watchStallSeconds | toJson | quote }}
- name: OSFT_LOG_FORMAT
  value: {{ .Values.logging.format | quote }}
- name: OSFT_LOG_LEVEL
  value: {{ .Values.logging.level | quote }}
{{- end }}
