{{/* Names, labels and image references. Used by every template. */}}

{{- define "osft-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 52 characters leave room for the longest suffix, "-job-viewer", in a 63 character name. */}}
{{- define "osft-operator.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Never add to these: a Deployment's selector cannot be changed. */}}
{{- define "osft-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "osft-operator.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* The pod of `helm test`. Not the operator's: its Service must not lead there. */}}
{{- define "osft-operator.testLabels" -}}
app.kubernetes.io/name: {{ include "osft-operator.name" . | trunc 58 | trimSuffix "-" }}-test
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* The labels of an object that has none of its own. */}}
{{- define "osft-operator.labels" -}}
{{- include "osft-operator.labelsWith" (dict "root" .) }}
{{- end }}

{{/*
Call with (dict "root" $ "own" <labels>): an object's own labels win over commonLabels, and ours over
both ("ours" in the dict when they are others). Each name once: a second one is an error to strict
readers of YAML, and to others chance.
*/}}
{{- define "osft-operator.labelsWith" -}}
{{- $labels := dict }}
{{- $ours := default (include "osft-operator.ourLabels" .root | fromYaml) .ours }}
{{- range list .root.Values.commonLabels .own $ours }}
{{- range $name, $value := . }}
{{- $_ := set $labels $name $value }}
{{- end }}
{{- end }}
{{- toYaml $labels }}
{{- end }}

{{- define "osft-operator.ourLabels" -}}
{{ include "osft-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: osft
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "osft-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "osft-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "osft-operator.leaseName" -}}
{{- default (include "osft-operator.fullname" .) .Values.leaderElection.leaseName }}
{{- end }}

{{/* Call with (dict "image" <image values> "root" $): registry/repository:tag or ...@digest. */}}
{{- define "osft-operator.image" -}}
{{- $registry := default .image.registry (.root.Values.global).imageRegistry }}
{{- with $registry }}{{ . }}/{{ end }}
{{- .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ default .root.Chart.AppVersion .image.tag }}{{ end }}
{{- end }}
