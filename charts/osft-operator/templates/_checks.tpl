{{/*
Values that are right one by one and wrong together: refused here, with the cure, before anything is
installed. Called once, by the Deployment; what only one other template needs is checked there.
*/}}
{{- define "osft-operator.checks" -}}
{{- with .Values.leaderElection }}
{{- if gt (mulf 2 .renewSeconds) (float64 .durationSeconds) }}
{{- fail (printf "leaderElection.renewSeconds is %v, but one late renewal must not lose the Lease: set it to at most half of leaderElection.durationSeconds (%v)" .renewSeconds .durationSeconds) }}
{{- end }}
{{- end }}
{{- if eq (int .Values.probes.port) (int .Values.metrics.port) }}
{{- fail (printf "probes.port and metrics.port are both %v, and one process cannot serve both there: change one of them" .Values.metrics.port) }}
{{- end }}
{{- with .Values.reconcile }}
{{- if gt (float64 .backoffInitialSeconds) (float64 .backoffMaxSeconds) }}
{{- fail (printf "reconcile.backoffInitialSeconds is %v, more than reconcile.backoffMaxSeconds (%v): make it the smaller one" .backoffInitialSeconds .backoffMaxSeconds) }}
{{- end }}
{{- $needed := addf (mulf 2 .watchCheckSeconds) 15 }}
{{- if lt (float64 $.Values.probes.watchStallSeconds) $needed }}
{{- fail (printf "probes.watchStallSeconds is %v, so liveness would fail before silent watches are opened anew and found well: set it to at least %v (2 times reconcile.watchCheckSeconds, and 15)" $.Values.probes.watchStallSeconds $needed) }}
{{- end }}
{{- end }}
{{- if and .Values.rbac.create (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) }}
{{- fail "serviceAccount.create is off and serviceAccount.name is empty, so every pod under the namespace's default account would get the operator's rights: name an account" }}
{{- end }}
{{- with .Values.podDisruptionBudget }}
{{- $away := .maxUnavailable }}
{{- if kindIs "string" $away }}
{{- /* Kubernetes rounds a share up. */}}
{{- $away = divf (mulf (trimSuffix "%" $away) $.Values.replicas) 100 | ceil }}
{{- end }}
{{- if and .enabled (gt (int $.Values.replicas) 1) (ge (int $away) (int $.Values.replicas)) }}
{{- fail (printf "podDisruptionBudget.maxUnavailable is %v of %v replicas, which keeps none: set it lower" .maxUnavailable $.Values.replicas) }}
{{- end }}
{{- end }}
{{- with .Values.networkPolicy }}
{{- if and .metricsFrom (not .enabled) (not .trainers) }}
{{- fail "networkPolicy.metricsFrom closes nothing as long as no policy is made: set networkPolicy.enabled" }}
{{- end }}
{{- end }}
{{- $seen := dict }}
{{- range .Values.extraEnv }}
{{- if hasKey $seen .name }}
{{- fail (printf "extraEnv has %s twice: keep one" .name) }}
{{- end }}
{{- $_ := set $seen .name true }}
{{- end }}
{{- end }}
